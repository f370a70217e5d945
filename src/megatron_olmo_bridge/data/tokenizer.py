"""Load a tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_olmo_bridge.errors import InputError
from megatron_olmo_bridge.formats.hf_folder import artifact_files
from megatron_olmo_bridge.storage.execute import sha256
from megatron_olmo_bridge.storage.hub import hub_repository

_FILE = "tokenizer.json"


@dataclass(frozen=True)
class TextTokenizer:
    """A tokenizer, and what is recorded about it."""

    name: str
    """Its folder, as an absolute path; or its hub id."""
    sha256: str | None
    """SHA-256 of its tokenizer.json, if there is one."""
    vocab_size: int
    """Largest token id plus 1."""
    eos_id: int
    serialized: str
    """Content of a tokenizer.json, without padding and truncation. Processes that tokenize load it,
    and need neither transformers nor torch."""


def load_tokenizer(name: str) -> TextTokenizer:
    """Load a fast tokenizer with transformers.

    Args:
        name: a folder, or a hub id.

    Raises:
        InputError: there is none, or it has no eos token, or is not a fast tokenizer.
    """
    loaded, local = load_pretrained(name)
    if not getattr(loaded, "is_fast", False):
        raise InputError(f"{name}: not a fast tokenizer (one with a {_FILE})")
    if loaded.eos_token_id is None:
        raise InputError(
            f"{name}: the tokenizer has no eos token, which ends each document. Set eos_token in "
            "its tokenizer_config.json."
        )
    backend = loaded.backend_tokenizer
    backend.no_padding()
    backend.no_truncation()
    return TextTokenizer(
        name=str(local or name),
        sha256=_sha256(name, local),
        vocab_size=max(backend.get_vocab(with_added_tokens=True).values()) + 1,
        eos_id=loaded.eos_token_id,
        serialized=backend.to_str(),
    )


def load_pretrained(name: str) -> tuple[Any, Path | None]:
    """Load a tokenizer with transformers; also return its folder, or None if it is from the hub.

    Args:
        name: a folder, or a hub id.

    Raises:
        InputError: there is none.
        FormatError: see :func:`~megatron_olmo_bridge.formats.hf_folder.artifact_files`.
    """
    from transformers import AutoTokenizer

    folder = Path(name).expanduser()
    if not folder.is_dir() and hub_repository(name) != name:  # an impossible id is not asked for
        raise InputError(
            f"{name}: no such folder. --tokenizer takes a folder or a hub id (owner/name)."
        )
    local = folder.resolve() if folder.is_dir() else None
    if local is not None:
        artifact_files(local)  # refuses pipes and huge files, which transformers would read
    try:
        return AutoTokenizer.from_pretrained(local or name), local
    except Exception as error:  # transformers, tokenizers and the hub raise many kinds
        why = str(error).strip().partition("\n")[0]
        raise InputError(f"{name}: no tokenizer could be loaded: {why}") from error


def _sha256(name: str, local: Path | None) -> str | None:
    from huggingface_hub import try_to_load_from_cache

    file = local / _FILE if local else try_to_load_from_cache(name, _FILE)
    return sha256(Path(file)) if isinstance(file, str | Path) and Path(file).is_file() else None
