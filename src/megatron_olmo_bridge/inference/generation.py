"""Generate text from a checkpoint, with a live model in processes of its own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from megatron_olmo_bridge.checkpoints.checkpoint import Checkpoint
from megatron_olmo_bridge.checkpoints.open import open_checkpoint
from megatron_olmo_bridge.data.tokenizer import load_pretrained
from megatron_olmo_bridge.errors import InputError, quote
from megatron_olmo_bridge.formats.dtypes import parse_dtype
from megatron_olmo_bridge.formats.files import read_json
from megatron_olmo_bridge.formats.remote_path import address_of
from megatron_olmo_bridge.storage.hub import fetch

from .compare import tokenizer_of
from .jobs import STEP, TOKEN, Job, Tell
from .sampling import check_request

if TYPE_CHECKING:
    import torch

_UNFINISHED = "\ufffd"
"""Last character of a decoded text whose last token is part of a character."""


class Generation:
    """Continuation of one prompt.

    Args:
        checkpoint: a checkpoint of any kind, or a hub id.
        prompt: text to continue; give either this or ``tokens``.
        tokens: token ids to continue.
        tokenizer: tokenizer folder or hub id; by default, for a text, the checkpoint's. With
            ``tokens`` and without a tokenizer, token ids are generated instead of text.
        dtype: dtype of the model; ``keep`` takes that of the checkpoint.
        tp, pp: tensor and pipeline parallel size.

    Attributes:
        prompt: token ids of the prompt.
        tokens: token ids generated so far.
        text: the generated text so far; None without a tokenizer.

    Raises:
        BridgeError: the checkpoint is damaged, or has no tokenizer.
    """

    def __init__(
        self,
        checkpoint: str,
        *,
        prompt: str | None,
        tokens: list[int] | None,
        tokenizer: str | None = None,
        dtype: str | torch.dtype = "keep",
        tp: int = 1,
        pp: int = 1,
    ) -> None:
        dtype = parse_dtype(dtype)
        source = open_checkpoint(fetch(checkpoint, None)[0])
        if source.bridge.num_labels is not None:
            raise InputError(f"{source.path}: has a classification head, and generates nothing")
        self._tokenizer: Any = None
        if tokenizer is not None:
            self._tokenizer, _ = load_pretrained(tokenizer)
        elif prompt is not None:
            self._tokenizer = tokenizer_of(source)
        self.prompt = tokens or []
        if prompt is not None:
            self.prompt = [int(token) for token in self._tokenizer(prompt)["input_ids"]]
        self.tokens: list[int] = []
        self._stop_at = _end_tokens(source)
        positions = source.bridge.config_values.get("max_position_embeddings")
        self._limits: dict[str, Any] = {
            "vocab_size": source.bridge.vocab_size,
            "positions": positions,
        }
        self._job = Job(address_of(source.path), tp, pp, dtype=dtype, tokens=[self.prompt])

    @property
    def text(self) -> str | None:
        return None if self._tokenizer is None else str(self._tokenizer.decode(self.tokens))

    def stream(
        self,
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        tell: Tell = lambda _: None,
    ) -> Iterator[str]:
        """Generate, and yield pieces of text, or token ids without a tokenizer.

        The arguments are those of :func:`inference.generate.generate`, and ``tell``, which is
        called with each step as it begins.

        Raises:
            BridgeError: an option is out of range, or the error that a process ended with.
        """
        options: dict[str, Any] = {
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "top_p": top_p,
        }
        check_request(self.prompt, **self._limits, **options)
        options |= {"seed": seed, "stop_at": self._stop_at}
        printed = 0
        tell(self._job.starting)
        with replace(self._job, generate=options).started() as output:
            for line in output:
                if line.startswith(STEP):
                    tell(line.removeprefix(STEP).rstrip())
                if not line.startswith(TOKEN):
                    continue
                self.tokens.append(int(line.removeprefix(TOKEN)))
                text = self.text
                if text is None:
                    yield f"{self.tokens[-1]} "
                elif not text.endswith(_UNFINISHED):
                    yield text[printed:]
                    printed = len(text)
        if self.text is not None:
            yield self.text[printed:]


def _end_tokens(source: Checkpoint) -> list[int]:
    """Return the tokens that end a generation, the same as in transformers."""
    config = dict(source.hf_config)
    folder = source.artifacts_folder
    if folder is not None and (file := folder / "generation_config.json").exists():
        config |= read_json(file)
    found = config.get("eos_token_id")
    ids = [] if found is None else found if isinstance(found, list) else [found]
    if any(type(token) is not int for token in ids):
        raise InputError(f"{source.path}: eos_token_id must be token ids, not {quote(found)}")
    return ids
