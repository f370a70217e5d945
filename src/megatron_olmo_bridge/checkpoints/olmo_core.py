"""Training checkpoints of OLMo-core: ``stepN`` with ``config.json`` and ``model_and_optim``."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from megatron_olmo_bridge.errors import BridgeError, InputError, quote
from megatron_olmo_bridge.formats.dcp_folder import DCPFolder
from megatron_olmo_bridge.formats.hf_folder import CONFIG, read_config
from megatron_olmo_bridge.formats.remote_path import AnyPath
from megatron_olmo_bridge.formats.tensors import Piece, StoredArray, TensorView
from megatron_olmo_bridge.mapping.placement import Region, Shape
from megatron_olmo_bridge.mapping.registry import ResolvedMapping, bulleted, check_tensors
from megatron_olmo_bridge.models.bridge import ModelBridge
from megatron_olmo_bridge.models.families import bridge_for
from megatron_olmo_bridge.models.olmo_core_config import hf_config, is_dropless
from megatron_olmo_bridge.models.olmo_core_names import StoredAs, stored_as

from .checkpoint import Checkpoint, OptimizerState, ReadOptions
from .olmo_core_state import MOMENTS, PROGRESS, STATE, WEIGHTS, optimizer_values, read_progress

TENSORS = "model_and_optim"
"""Folder of the tensors in a step's folder."""
_STEP = re.compile(r"step([0-9]{1,18})")


@dataclass(frozen=True, kw_only=True)
class OLMoCoreCheckpoint(Checkpoint):
    """A step of OLMo-core's trainer, with float32 weights and optimizer state."""

    kind: ClassVar[str] = "OLMo-core"
    looks_like: ClassVar[str] = f"{CONFIG} and {TENSORS}"
    accepted_options: ClassVar[tuple[str, ...]] = ("iteration", "hf_config", "vocab_size")

    model: ModelBridge
    """The model as OLMo-core has it, perhaps with more rows in the vocabulary."""
    dropless: bool
    """Whether it is a mixture of experts that drops no tokens, which stores them differently."""
    views: dict[str, TensorView]
    """Tensors of the Hugging Face model, assembled from those of the files."""

    @classmethod
    def find(cls, path: AnyPath, iteration: int | str | None) -> AnyPath | None:
        if (path / TENSORS).is_dir():
            return path
        steps = step_folders(path) if path.is_dir() else {}
        if not steps:
            return None
        name = str(max(steps) if iteration is None else iteration)
        if not (name.isdecimal() and int(name) in steps):
            raise InputError(
                f"{path}: has no step {quote(name)}. Steps there: {', '.join(map(str, steps))}."
            )
        return steps[int(name)]

    @classmethod
    def file_patterns(cls, path: AnyPath) -> dict[AnyPath, tuple[str, ...]]:
        return {path: (CONFIG,), path / PROGRESS.parent: (PROGRESS.name,), path / TENSORS: ("*",)}

    @classmethod
    def open(cls, path: AnyPath, options: ReadOptions, strict: bool) -> OLMoCoreCheckpoint:
        config = read_config(path)
        bridge, model = _bridges(path, config, options)
        dropless = is_dropless(config)
        registry, folder = bridge.mapping_registry(), DCPFolder.read(path / TENSORS)
        registry.check_size(len(folder.tensors), path)
        mapping = registry.resolve()
        rows = model.vocab_size - bridge.vocab_size
        return cls(
            path=path,
            bridge=bridge,
            mapping=mapping,
            config_from=path / CONFIG,
            artifacts_folder=Path(options.hf_config) if options.hf_config else None,
            model=model,
            dropless=dropless,
            views=_hf_views(folder.select(WEIGHTS), mapping, model, dropless),
            reading_notes=(f"{rows} rows of the vocabulary were left out",) if rows else (),
        )

    @property
    def tensors(self) -> dict[str, TensorView]:
        return self.views

    @cached_property
    def optimizer_state(self) -> OptimizerState:
        folder = DCPFolder.read(self.path / TENSORS)
        step, settings, decayed = optimizer_values(folder)
        moments = {kind: self._with_tensors(folder.select(STATE, f".{kind}")) for kind in MOMENTS}
        iteration, trainer = read_progress(self.path)
        return OptimizerState(
            iteration=iteration,
            step=step,
            settings=settings,
            decayed=decayed,
            trainer=trainer,
            tensors={"param": self, **moments},
        )

    def _with_tensors(self, folder: DCPFolder) -> OLMoCoreCheckpoint:
        """Return the model with other tensors than the weights, by the same names."""
        views = _hf_views(folder, self.mapping, self.model, self.dropless)
        return replace(self, views=views)

    @property
    def layout(self) -> str:
        folder = DCPFolder.read(self.path / TENSORS)
        state = sum(not key.startswith(WEIGHTS) for key in folder.tensors)
        chunks = max(len(t.chunks) for t in folder.tensors.values())
        return f"tensors in up to {chunks} chunk(s), {state} tensors of optimizer state"

    @property
    def iterations(self) -> list[str]:
        return [folder.name for folder in step_folders(self.path.parent).values()]


def step_folders(root: AnyPath) -> dict[int, AnyPath]:
    """Return the folders of a run's steps by number, in order."""
    found = {
        int(match[1]): folder
        for folder in root.iterdir()
        if (match := _STEP.fullmatch(folder.name)) and (folder / TENSORS).is_dir()
    }
    return dict(sorted(found.items()))


def _bridges(
    path: AnyPath, own: dict[str, Any], options: ReadOptions
) -> tuple[ModelBridge, ModelBridge]:
    """Return the Hugging Face model, and the model as OLMo-core has it.

    They differ if the options give the Hugging Face model a smaller vocabulary, or name a folder
    with its ``config.json``, which must be of the same model.

    Raises:
        InputError: the two are of different models; or see :func:`hf_config`.
        UnsupportedError: see :func:`hf_config`.
    """
    file = path / CONFIG
    stated = read_config(Path(options.hf_config)) if options.hf_config else {}
    try:
        config = hf_config(own, stated.get("max_position_embeddings"))
    except BridgeError as error:
        raise type(error)(f"{file}: {error}") from error
    model = bridge_for(config, file)
    config = {**config, **stated}
    if options.vocab_size is not None:
        config["vocab_size"] = options.vocab_size
    config_folder = Path(options.hf_config) if options.hf_config else path
    bridge = bridge_for(config, config_folder / CONFIG)
    if bridge.vocab_size > model.vocab_size:
        raise InputError(
            f"{file}: the embedding has {model.vocab_size} rows, fewer than the vocabulary of "
            f"{bridge.vocab_size} that --hf-config or --vocab-size names"
        )
    if bridge.family != model.family:
        raise InputError(f"{options.hf_config}: is {bridge.family}, {file} is {model.family}")
    values = bridge.config_values | {"vocab_size": model.vocab_size}
    if wrong := [
        f"{k} is {values[k]}, not {v}" for k, v in model.config_values.items() if values[k] != v
    ]:
        raise InputError(f"{options.hf_config}: not the config of {file}:\n{bulleted(wrong)}")
    return bridge, model


def _hf_views(
    folder: DCPFolder, mapping: ResolvedMapping, model: ModelBridge, dropless: bool
) -> dict[str, TensorView]:
    """Return every Hugging Face tensor, assembled from OLMo-core's.

    Args:
        folder: OLMo-core's tensors.
        mapping: mapping of the Hugging Face model, which may have a smaller vocabulary.
        model: the model as OLMo-core has it.
        dropless: see :func:`.stored_as`.

    Raises:
        MappingError: tensors are missing, unexpected, or have the wrong shape.
        FormatError: a file is absent or damaged, or chunks don't cover a tensor.
    """
    shapes = model.mapping_registry().resolve_hf()
    stored = {name: stored_as(name, shape, model, dropless) for name, shape in shapes.items()}
    expected = {s.name: s.shape for s in stored.values()}
    check_tensors(expected, {k: tensor.shape for k, tensor in folder.tensors.items()}, folder.path)
    folder.read_ahead(expected)
    views = {name: folder.view(name) for name in expected}
    return {
        name: TensorView.assembled(
            name, shape, _pieces(views[stored[name].name], stored[name], shape)
        )
        for name, shape in mapping.hf_shapes.items()
    }


def _pieces(view: TensorView, stored: StoredAs, shape: Shape) -> Iterator[Piece]:
    whole = Region.whole(shape)
    if stored.expert:
        yield from view.pieces_of(stored.expert, whole, transposed=stored.transposed)
    elif len(shape) > len(stored.shape):
        for piece in view.pieces:
            yield from _folded(piece, whole.columns)
    else:
        yield from view.pieces_of(whole, whole)


def _folded(piece: Piece, columns: int) -> Iterator[Piece]:
    """Yield a piece of a vector as pieces of the matrix whose rows the vector concatenates."""
    array, at, end = piece.array, piece.tensor_region.top, piece.tensor_region.bottom
    assert array is not None  # a checkpoint of a trainer stores every element
    offset = array.offset
    while at < end:
        row, left = divmod(at, columns)
        if left or end - at < columns:
            region = Region(row, row + 1, left, min(columns, left + end - at))
        else:
            region = Region(row, row + (end - at) // columns, 0, columns)
        part = StoredArray(array.file, offset, (region.rows, region.columns), array.dtype)
        yield Piece(part, Region.whole(part.shape), region)
        at += region.size
        offset += part.nbytes
