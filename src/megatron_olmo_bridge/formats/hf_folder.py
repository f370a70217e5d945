"""A Hugging Face checkpoint folder: config.json, safetensors shards and their index."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from megatron_olmo_bridge.errors import FormatError, InputError, UnsupportedError, quote

from .files import ARTIFACT_FILES_LIMIT, is_file_name, read_json, read_small
from .remote_path import AnyPath, RemotePath, for_each, glob
from .safetensors import read_header
from .tensors import StoredArray

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
CHAT_TEMPLATES = "additional_chat_templates"
ARTIFACT_FILES = (
    CONFIG,
    "generation_config.json",
    "modelcard.json",
    # Tokenizers: what all have, and the vocabulary files of transformers' classes.
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.*",
    f"{CHAT_TEMPLATES}/*.jinja",
    "*vocab*.json",
    "vocab.txt",
    "merges.txt",
    "*.model",
    "*.spm",
    "*.tiktoken",
    "bpe.codes",
    "byte_maps.json",
    "dict.txt",
    "emoji.json",
    "normalizer.json",
    "prophetnet.tokenizer",
    "tekken.json",
    "word_pronunciation.json",
    "word_shape.json",
    # Processors.
    "*processor_config.json",
    "audio_tokenizer_config.json",
)
"""Patterns of the small files that ``save_pretrained`` of a model, its tokenizer and its processor
writes in addition to the weights; from transformers 5.23's constants."""
CODE = "*.py"
"""A model's own code, which ``save_pretrained`` writes where a config has an ``auto_map``."""
HUB_PATTERNS = (*ARTIFACT_FILES, CODE, "*.safetensors", INDEX)
"""Files of a model that are fetched from the hub."""


SHOWN = 4
"""Folders that an error lists."""


@dataclass(frozen=True)
class HFFolder:
    """A Hugging Face checkpoint, by its headers."""

    path: AnyPath
    config: dict[str, Any]
    arrays: dict[str, StoredArray]

    @classmethod
    def read(
        cls,
        path: AnyPath,
        is_buffer: Callable[[str], bool] = lambda _: False,
        may_be_tied: Callable[[str], bool] = lambda _: False,
    ) -> HFFolder:
        """Read the config and every shard's header.

        Args:
            path: the folder.
            is_buffer: whether a tensor of this name is not a weight, so that it may have any dtype.
            may_be_tied: whether the index may name a tensor of this name that no file has.

        Raises:
            InputError: config.json or the weights are absent.
            FormatError: a file is damaged, or index and shards disagree.
            UnsupportedError: an adapter, quantized weights or PyTorch ``.bin`` files.
        """
        refuse_other_weights(path)
        config = read_config(path)
        if method := config.get("quantization_config"):
            method = method.get("quant_method") if isinstance(method, dict) else method
            raise UnsupportedError(
                f"{path / CONFIG}: the weights are quantized ({method}) and can't be converted. "
                "Use the unquantized checkpoint."
            )
        return cls(path, config, _read_arrays(path, is_buffer, may_be_tied))

    @property
    def shards(self) -> list[AnyPath]:
        return sorted({a.file for a in self.arrays.values()}, key=str)


def is_hf_folder(path: AnyPath) -> bool:
    """Return whether a folder holds a Hugging Face checkpoint, or the rest of one."""
    return (path / CONFIG).is_file() or any(path.glob("*.safetensors")) or (path / INDEX).exists()


def hint_at_folders_inside(path: AnyPath) -> str | None:
    """Return advice to name a folder inside this one, if one there holds a checkpoint.

    A run's folder of transformers' Trainer has such folders, and a model's in the hub's cache.
    """
    cached = re.fullmatch(r"models--(.+?)--(.+)", path.resolve().name)
    snapshots = [p for p in glob(path, "snapshots/*") if is_hf_folder(p)]
    if cached and snapshots:
        names = " or ".join(map(str, snapshots))
        return f"The hub's cache: name {names}, or {'/'.join(cached.groups())}."
    inside = [p for p in path.iterdir() if p.is_dir() and is_hf_folder(p)]
    if not inside:
        return None
    inside.sort(key=lambda p: [int(n) for n in re.findall(r"\d+", p.name)][-1:] or [0])
    names = ", ".join(p.name for p in inside[-SHOWN:])
    return f"The checkpoints are in folders inside ({names}): name one, {inside[-1]} for example."


def read_config(path: AnyPath) -> dict[str, Any]:
    """Return the folder's config.json.

    Raises:
        InputError: there is none.
        FormatError: not sound JSON, or a link that leads out of the folder.
    """
    if not (path / CONFIG).exists():
        raise InputError(f"{path}: no {CONFIG}: it says what model the weights are")
    refuse_outside(path / CONFIG, path)
    return read_json(path / CONFIG)


def artifact_files(path: AnyPath) -> dict[str, bytes]:
    """Return the config and tokenizer files of a folder by name, and its code if a config uses it.

    A config uses the Python files by an ``auto_map``. Links out of the folder are refused: its
    author could have linked a private file of the reader's, which would be converted, and uploaded,
    with the model. A hard link can't be told from a file.

    Raises:
        FormatError: a file is a link out of the folder, not a regular file or a Git LFS pointer; or
            its name is not UTF-8; or all together are too large.
    """
    entries = (*path.iterdir(), *path.glob(f"{CHAT_TEMPLATES}/*"))
    names = sorted(p.relative_to(path).as_posix() for p in entries if not p.is_dir())
    own = _read_all(path, [name for name in names if _matches(name, ARTIFACT_FILES)])
    if any(b'"auto_map"' in data for name, data in own.items() if name.endswith(CONFIG)):
        own |= _read_all(path, [name for name in names if _matches(name, (CODE,))])
    return own


def _read_all(path: AnyPath, names: list[str]) -> dict[str, bytes]:
    files: dict[str, bytes] = {}
    total = 0
    for name in names:
        refuse_outside(path / name, path)
        if not (path / name).exists():
            raise FormatError(f"{path / name}: is a link to a file that is not there")
        files[name] = read_small(path / name, ARTIFACT_FILES_LIMIT)
        total += len(files[name])
        if total > ARTIFACT_FILES_LIMIT:
            raise FormatError(
                f"{path}: its config and tokenizer files have more than {ARTIFACT_FILES_LIMIT:,} "
                "bytes together"
            )
    return files


def refuse_outside(file: AnyPath, folder: AnyPath) -> None:
    """Raise FormatError if a file is a link that leads out of its folder.

    In the hub's cache, links from ``models--owner--name/snapshots/COMMIT`` to its ``blobs`` folder
    are allowed.
    """
    if isinstance(folder, RemotePath) or isinstance(file, RemotePath):
        return  # there are no links
    inside = Path(os.path.realpath(folder))
    places = [inside]
    if inside.parent.name == "snapshots" and inside.parent.parent.name.startswith("models--"):
        places.append(inside.parent.parent / "blobs")
    end = Path(os.path.realpath(file))  # Path.resolve() raises RuntimeError for a loop
    if not any(end.is_relative_to(place) for place in places):
        raise FormatError(
            f"{file}: is a link to {end}, outside of its folder. If that file belongs to the "
            "model, copy it here."
        )


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(
        fnmatchcase(name, pattern) for pattern in patterns if name.count("/") == pattern.count("/")
    )


def refuse_other_weights(path: AnyPath) -> None:
    """Raise UnsupportedError for adapters and for weights in PyTorch's ``.bin`` files."""
    if (path / "adapter_config.json").exists():
        raise UnsupportedError(
            f"{path}: a LoRA or other PEFT adapter, not a model. Merge it into its base model "
            "first (peft: merge_and_unload(), then save_pretrained()) and convert the result."
        )
    binaries = glob(path, "pytorch_model*.bin*")
    if binaries and not any(path.glob("*.safetensors")):
        raise UnsupportedError(
            f"{binaries[0]}: PyTorch .bin weights are pickles and are not read. Load the model "
            "with transformers and save_pretrained() it: that writes safetensors."
        )


def _read_arrays(
    path: AnyPath, is_buffer: Callable[[str], bool], may_be_tied: Callable[[str], bool]
) -> dict[str, StoredArray]:
    index, single = path / INDEX, path / SINGLE
    weight_map = _weight_map(path)
    if not weight_map:
        files = [single] if single.exists() else glob(path, "*.safetensors")
        if not files:
            where = f". {hint}" if (hint := hint_at_folders_inside(path)) else ""
            raise InputError(f"{path}: has a {CONFIG} but no safetensors files{where}")
    else:
        files = [path / name for name in sorted(set(weight_map.values()))]
    optional = {name for name in weight_map if is_buffer(name) or may_be_tied(name)}
    needed = {file for name, file in weight_map.items() if name not in optional}
    is_there = dict(zip(files, for_each(lambda file: file.is_file(), files, path), strict=True))
    for file in files:
        if not is_there[file] and (not weight_map or file.name in needed):
            raise FormatError(f"{index if weight_map else path}: names {file.name}, absent here")
    arrays: dict[str, StoredArray] = {}
    files = [file for file in files if is_there[file]]
    headers = for_each(lambda file: read_header(file, is_buffer), files, path)
    for file, header in zip(files, headers, strict=True):
        for name, array in header.items():
            if name in arrays:
                raise FormatError(
                    f"{file}: tensor {name} stands in {arrays[name].file.name} as well"
                )
            if weight_map and weight_map.get(name) != file.name:
                listed = f"in {weight_map[name]}" if name in weight_map else "nowhere"
                raise FormatError(
                    f"{index}: tensor {name} is in {file.name}, the index says {listed}. If the "
                    "files are right, delete the index: without it, every safetensors file is read."
                )
            arrays[name] = array
    for name, listed in weight_map.items():
        if name not in arrays and name not in optional:
            raise FormatError(f"{index}: tensor {name} is not in {listed}, where it should be")
    return arrays


def _weight_map(path: AnyPath) -> dict[str, str]:
    """Return the file of each tensor according to the index; {} without an index or if it is stale.

    An index is stale if its files are absent and a single file has all weights; transformers too
    reads that one first.
    """
    index = path / INDEX
    if not index.exists():
        return {}
    weight_map = _read_index(index)
    files = set(weight_map.values())
    if SINGLE in files or not (path / SINGLE).exists():
        return weight_map
    if all((path / name).is_file() for name in files):
        raise FormatError(
            f"{path}: has both {SINGLE} and the files that {INDEX} names; it is unclear which to "
            "read. Remove the single file, or the index."
        )
    return {}


def _read_index(index: AnyPath) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError(f"{index}: has no weight_map")
    for name, file in weight_map.items():
        if not is_file_name(file):
            raise FormatError(
                f"{index}: tensor {name} would be in {quote(file)}, which is not a file of this "
                "folder"
            )
    return weight_map
