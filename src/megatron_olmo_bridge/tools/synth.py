"""Make a Hugging Face checkpoint with random weights in a published architecture."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_olmo_bridge.checkpoints.hf_files import (
    MAX_SHARD_SIZE,
    config_with_dtype,
    index_of,
    parse_size,
    shards,
)
from megatron_olmo_bridge.errors import InputError, OutputError
from megatron_olmo_bridge.formats.dtypes import parse_dtype
from megatron_olmo_bridge.formats.files import check_name
from megatron_olmo_bridge.formats.hf_folder import CONFIG
from megatron_olmo_bridge.formats.tensors import ITEM_SIZE, TensorSpec
from megatron_olmo_bridge.models.families import published_sizes
from megatron_olmo_bridge.models.hf_values import MAX_LAYERS, is_count
from megatron_olmo_bridge.storage.plan import Literal, OutputFile
from megatron_olmo_bridge.storage.progress import Reporter
from megatron_olmo_bridge.storage.transfer import write_all

if TYPE_CHECKING:
    import torch

BLOCK_ELEMENTS = 1 << 20


def synth(
    name: str,
    destination: str | Path,
    *,
    dtype: str | torch.dtype = "bfloat16",
    seed: int = 0,
    layers: int | None = None,
    max_shard_size: str | int = MAX_SHARD_SIZE,
    reporter: Reporter | None = None,
) -> Path:
    """Write random weights: norm gains uniform in 0.5 to 1.5, others normal with deviation 0.02.

    The same arguments give the same bytes. Memory does not grow with the model.

    Args:
        name: a published size, for example ``olmo2-1b``.
        destination: folder to create; it must not exist, or be empty.
        dtype: ``float32``, ``bfloat16`` or ``float16``; also ``bf16`` or a torch dtype.
        seed: seed of the random numbers.
        layers: number of layers; None for the published number.
        max_shard_size: bytes, or a text such as ``5GB``.
        reporter: receives progress.

    Raises:
        InputError: the name, the dtype or the number of layers is invalid.
        OutputError: the folder is not empty, or can't be created.
    """
    sizes = published_sizes()
    if name not in sizes:
        raise InputError(f"{name!r} is not known. Known are: {', '.join(sizes)}")
    dtype = parse_dtype(dtype, keep=False)
    if layers is not None and not is_count(layers, MAX_LAYERS):
        raise InputError(f"--layers must be a number from 1 to {MAX_LAYERS:,}")
    family = sizes[name]
    config = family.sizes[name]
    if layers is not None:
        config = family.with_layers(config, layers)
    shapes = family(config).hf_shapes
    tensors = {name: TensorSpec(name, shape, dtype) for name, shape in shapes.items()}
    files = shards(tensors, dtype, parse_size(max_shard_size))
    folder = Path(destination).expanduser()
    check_name(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise OutputError(f"{folder}: exists already; name a new folder")
    reporter = reporter or Reporter()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder}: can't be made: {error.strerror}") from error
    reporter.begin("synthesising", sum(f.size for f in files))
    try:
        _write(folder, files, config, dtype, seed, reporter)
    except BaseException:
        shutil.rmtree(folder)  # it was absent or empty before
        raise
    reporter.end()
    return folder


def _write(
    folder: Path,
    files: tuple[OutputFile, ...],
    config: dict[str, Any],
    dtype: str,
    seed: int,
    reporter: Reporter,
) -> None:
    for file in files:
        with (folder / file.name).open("wb") as handle:
            for part in file.parts:
                if isinstance(part, Literal):
                    write_all(handle.fileno(), part.data, part.offset)
                else:
                    _write_random(handle.fileno(), part.offset, part.view, seed, reporter)
    for name, data in index_of(files).items():
        (folder / name).write_bytes(data)
    token_ids = {k: config.get(k) for k in ("bos_token_id", "eos_token_id", "pad_token_id")}
    generation_config = {"_from_model_config": True} | {
        key: token_id for key, token_id in token_ids.items() if token_id is not None
    }
    (folder / "generation_config.json").write_text(json.dumps(generation_config, indent=2))
    # Last, since config.json makes the folder a checkpoint.
    (folder / CONFIG).write_bytes(config_with_dtype(config, dtype))


def _write_random(fd: int, offset: int, view: TensorSpec, seed: int, reporter: Reporter) -> None:
    import torch

    # A generator for each tensor, so that its values depend on its name only, not on the order.
    digest = hashlib.sha256(f"{seed} {view.name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    count, item = math.prod(view.shape), ITEM_SIZE[view.dtype]
    for first in range(0, count, BLOCK_ELEMENTS):
        values = _random(view.name, min(BLOCK_ELEMENTS, count - first), generator)
        data = bytearray(len(values) * item)
        torch.frombuffer(data, dtype=getattr(torch, view.dtype)).copy_(values)
        reporter.advance(write_all(fd, data, offset + first * item))


def _random(name: str, count: int, generator: torch.Generator) -> torch.Tensor:
    import torch

    values = torch.empty(count)
    if "norm" in name or (".ln_" in name and name.endswith(".weight")):
        return values.uniform_(0.5, 1.5, generator=generator)
    return values.normal_(0, 0.02, generator=generator)
