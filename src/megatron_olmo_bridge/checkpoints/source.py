"""A checkpoint of any kind, opened with its model: tensors by Hugging Face names."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from glob import escape
from pathlib import Path
from typing import Any

from megatron_olmo_bridge.checkpoints.detect import Kind, detect
from megatron_olmo_bridge.checkpoints.name_hints import name_hint
from megatron_olmo_bridge.errors import (
    InputError,
    MappingError,
)
from megatron_olmo_bridge.formats.hf_folder import (
    CHAT_TEMPLATES,
    CONFIG,
    HUB_PATTERNS,
    HFFolder,
    read_config,
)
from megatron_olmo_bridge.formats.olm import read_olm
from megatron_olmo_bridge.formats.tensors import Piece, TensorView
from megatron_olmo_bridge.formats.torch_dist import TorchDistFolder
from megatron_olmo_bridge.mapping.placement import Region
from megatron_olmo_bridge.mapping.registry import Parameter, ResolvedMapping
from megatron_olmo_bridge.models.bridge import ModelBridge
from megatron_olmo_bridge.models.families import bridge_for
from megatron_olmo_bridge.models.gpt2 import olm
from megatron_olmo_bridge.storage.identity import Snapshot

from .hf_source import read_hf_model
from .megatron_config import HF_SUBFOLDER, check_agreement, config_of


@dataclass(frozen=True)
class Source:
    """A checkpoint and the model it holds."""

    kind: Kind
    folder: Path
    """The very folder that holds the weights; of OLM the file."""
    bridge: ModelBridge
    mapping: ResolvedMapping
    megatron: dict[str, TensorView]
    """Tensors by Megatron names; empty for a checkpoint of another kind."""
    config_from: Path
    """The file that says what model it is."""
    side_folder: Path | None
    """Where config, generation config and tokenizer files are."""
    hf_folder: HFFolder | None = None
    new: frozenset[str] = frozenset()
    """Tensors that no file has, and that begin as zeros: a new classification head."""
    olm: dict[str, TensorView] | None = None
    """Of OLM: the Hugging Face tensors, each put together from the file's."""
    read_as: tuple[str, ...] = ()
    """What was read otherwise than the config says."""
    snapshot: Snapshot = field(default_factory=lambda: Snapshot({}, {}))
    """The checkpoint's files before they were read."""

    @cached_property
    def tensors(self) -> dict[str, TensorView]:
        """Every tensor of the Hugging Face model, in the mapping's order."""
        if self.olm is not None:
            return self.olm
        if self.hf_folder is not None:
            found = self.hf_folder.arrays
            known = [n for n in self.mapping.hf_shapes if n in found]
            others = [n for n in found if n not in self.mapping.hf_shapes]
            ignored = self.mapping.reason_to_ignore
            held = {
                n: TensorView.of_array(n, found[n]) for n in known + others if ignored(n) is None
            }
            return held | {n: self._zeros(n, held) for n in self.new}
        views = {}
        for name, shape in self.mapping.hf_shapes.items():
            pieces: list[Piece] = []
            for p in self.mapping.placements_by_hf_name[name]:
                stored = self.megatron[p.megatron_name]
                pieces += stored.pieces_of(p.megatron_region, p.hf_region, p.transposed)
            views[name] = TensorView.assembled(name, shape, pieces)
        return views

    def _zeros(self, name: str, held: dict[str, TensorView]) -> TensorView:
        shape = self.mapping.hf_shapes[name]
        dtype = next(iter(held.values())).dtype
        return TensorView(name, shape, dtype, (Piece.zeros(Region.whole(shape)),))

    def pieces(self, parameter: Parameter, region: Region) -> Iterator[Piece]:
        """Yield where the elements of one region of a Megatron parameter are stored.

        The pieces are those of a tensor that is the region alone: row 0 is the region's first.
        """
        origin = Region(0, 0, 0, 0)
        stored = self.megatron.get(parameter.name)
        for p in parameter.placements:
            if part := p.megatron_region.intersect(region):
                at = part.moved(region, origin)
                if p.hf_name is not None:
                    hf_tensor = self.tensors[p.hf_name]
                    yield from hf_tensor.pieces_of(p.hf_region_of(part), at, p.transposed)
                elif stored is not None and stored.shape == parameter.shape:
                    yield from stored.pieces_of(part, at)
                else:
                    yield Piece.zeros(at)

    @cached_property
    def padding(self) -> dict[str, TensorView]:
        """Rows of a Megatron vocabulary that no Hugging Face tensor has."""
        views = {}
        for name, view in self.megatron.items():
            for p in self.mapping.parameters[name].placements:
                if p.hf_name is None:
                    label = f"{name} padding rows"
                    shape = (p.megatron_region.rows, *view.shape[1:])
                    views[label] = replace(view.region(p.megatron_region, shape), name=label)
        return views

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding as Megatron holds it."""
        return self.mapping.parameters[self.bridge.vocab_param].shape[0]

    @property
    def parameters(self) -> int:
        """Elements of the Hugging Face model."""
        return sum(math.prod(shape) for shape in self.mapping.hf_shapes.values())

    @property
    def dtypes(self) -> list[str]:
        return sorted({view.dtype for view in self.tensors.values()})

    @property
    def notes(self) -> list[str]:
        """What somebody who converts this checkpoint should be told."""
        return [*self.bridge.notes, *self.read_as]

    @property
    def hf_config(self) -> dict[str, Any]:
        return self.bridge.hf_config


def open_source(
    path: str | Path,
    *,
    iteration: int | str | None = None,
    hf_config: str | Path | None = None,
    vocab_size: int | None = None,
    num_labels: int | None = None,
    heads: int | None = None,
    strict: bool = True,
) -> Source:
    """Open a checkpoint and check it against the mapping of its model, from headers alone.

    Args:
        path: a Hugging Face folder, a Megatron checkpoint root or an iteration's folder, or a
            ``.pt`` file of OLM's trainer.
        iteration: of a Megatron checkpoint root; None takes the tracker's.
        hf_config: folder with a config.json, for a Megatron checkpoint that doesn't say enough,
            or one of OLM.
        vocab_size: rows of the Hugging Face embedding, where a Megatron checkpoint with a padded
            vocabulary doesn't say.
        num_labels: give a Hugging Face language model a new classification head of so many
            classes, of zeros, instead of its own.
        heads: attention heads of a checkpoint of OLM, which doesn't say.
        strict: refuse a Hugging Face folder whose tensors are not those of its config.

    Raises:
        InputError, FormatError, UnsupportedError, MappingError: see each.
    """
    path = Path(path).expanduser()
    try:
        kind, folder = detect(path, iteration)
        snapshot = _snapshot(kind, folder, hf_config)
        if heads is not None and kind is not Kind.OLM:
            raise InputError(f"{path}: --heads is for a checkpoint of OLM; this one says it itself")
        if kind is Kind.HF:
            return replace(_open_hf(folder, strict, num_labels), snapshot=snapshot)
        if num_labels is not None:
            raise InputError(f"{path}: only a Hugging Face checkpoint can be given a new head")
        if kind is Kind.OLM:
            if iteration is not None or vocab_size is not None:
                raise InputError(f"{path}: --iteration and --vocab-size are not for one of OLM")
            return replace(_open_olm(folder, hf_config, heads), snapshot=snapshot)
        return replace(_open_megatron(folder, hf_config, vocab_size), snapshot=snapshot)
    except PermissionError as error:
        raise InputError(f"{error.filename}: no permission to read it") from error
    except OSError as error:
        raise InputError(f"{error.filename or path}: {error.strerror or error}") from error


def _snapshot(kind: Kind, folder: Path, hf_config: str | Path | None) -> Snapshot:
    """Look at the files of a checkpoint, and of the folder that its config is taken from."""
    config_folders = [Path(hf_config)] if hf_config else []
    folders: dict[Path, tuple[str, ...]] = {}
    if kind is Kind.OLM:
        folders[folder.parent] = (escape(folder.name),)
    elif kind is Kind.MEGATRON:
        folders[folder] = ("*",)
        config_folders.append(folder / HF_SUBFOLDER)
    else:
        config_folders.append(folder)
    for config_folder in config_folders:
        folders[config_folder] = HUB_PATTERNS
        folders[config_folder / CHAT_TEMPLATES] = ("*",)
    return Snapshot.of(folders)


def _open_hf(folder: Path, strict: bool, num_labels: int | None) -> Source:
    hf = read_hf_model(folder, num_labels)
    registry = hf.bridge.mapping_registry()
    registry.check_size(len(hf.folder.arrays), folder)
    mapping = registry.resolve()
    if strict:
        held = {name: a.shape for name, a in hf.folder.arrays.items()}
        with _explaining_names(held, hf.bridge):
            mapping.check_hf(held | {name: mapping.hf_shapes[name] for name in hf.new}, folder)
    return Source(
        Kind.HF, folder, hf.bridge, mapping, {}, folder / CONFIG, folder,
        hf_folder=hf.folder, new=hf.new, read_as=hf.notes,
    )  # fmt: skip


def _open_megatron(folder: Path, hf_config: str | Path | None, vocab_size: int | None) -> Source:
    dist = TorchDistFolder.read(folder)
    _ = dist.common  # where nothing in it is needed, it is refused all the same if it isn't sound
    config, config_from, side_folder = config_of(dist, hf_config, vocab_size)
    bridge = bridge_for(config, config_from)
    check_agreement(dist, bridge, config_from, any_vocab_size=vocab_size is not None)
    rows = dist.rows(bridge.vocab_param)
    if rows is not None and rows < bridge.vocab_size:
        raise InputError(
            f"{folder}: the embedding has {rows} rows, fewer than the vocabulary of "
            f"{bridge.vocab_size} that {config_from} names"
        )
    registry = bridge.mapping_registry(rows)
    registry.check_size(sum(len(tensor.chunks) for tensor in dist.weights.values()), folder)
    mapping = registry.resolve()
    with _explaining_names(dist.weights, bridge):
        views = dist.views(mapping)
    return Source(Kind.MEGATRON, folder, bridge, mapping, views, config_from, side_folder)


@contextmanager
def _explaining_names(names: Collection[str], bridge: ModelBridge) -> Iterator[None]:
    """Append to an error about tensor names what the names say."""
    try:
        yield
    except MappingError as error:
        if hint := name_hint(names, bridge):
            raise MappingError(f"{error}\n{hint}") from error
        raise


def _open_olm(file: Path, hf_config: str | Path | None, heads: int | None) -> Source:
    arrays, side_folder = read_olm(file), Path(hf_config) if hf_config else None
    config = read_config(side_folder) if side_folder else None
    config_from = side_folder / CONFIG if side_folder else file
    bridge = olm.bridge_of(arrays, heads, config, file, config_from)
    mapping = bridge.mapping_registry().resolve()
    views = olm.hf_views(arrays, mapping.hf_shapes, file)
    return Source(Kind.OLM, file, bridge, mapping, {}, config_from, side_folder, olm=views)


def recorded_dtypes(config: dict[str, Any]) -> dict[str, Any]:
    """What config.json says of the weights' dtype, by the keys of transformers 5 and of 4."""
    return {key: config[key] for key in ("dtype", "torch_dtype") if key in config}


def config_with_dtype(config: dict[str, Any], dtype: str) -> bytes:
    """config.json for weights of this dtype, under every key that the config has for it."""
    keys = recorded_dtypes(config) or ("torch_dtype",)
    return json.dumps({**config, **dict.fromkeys(keys, dtype)}, indent=2).encode() + b"\n"
