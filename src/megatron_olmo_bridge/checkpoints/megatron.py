"""Megatron checkpoints: a root with iterations, each a folder of format ``torch_dist``."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar

from megatron_olmo_bridge.errors import (
    BridgeError,
    FormatError,
    InputError,
    UnsupportedError,
    quote,
)
from megatron_olmo_bridge.formats.dcp_metadata import METADATA
from megatron_olmo_bridge.formats.files import refuse_pointer
from megatron_olmo_bridge.formats.hf_folder import is_hf_folder
from megatron_olmo_bridge.formats.iterations import (
    TRACKER,
    iteration_folder,
    iteration_folders,
    iteration_number,
)
from megatron_olmo_bridge.formats.remote_path import AnyPath, glob
from megatron_olmo_bridge.formats.tensors import Piece, TensorView
from megatron_olmo_bridge.formats.torch_dist import FORMAT_FILE, TorchDistFolder, read_format
from megatron_olmo_bridge.models.families import bridge_for

from .checkpoint import Checkpoint, OptimizerState, ReadOptions, artifact_patterns
from .megatron_config import HF_SUBFOLDER, check_agreement, config_of
from .megatron_optimizer import STATE, optimizer_values, read_iteration, read_record
from .name_hints import explaining_names

_CONVERT_WITH_MEGATRON = (
    "Convert it with the Megatron that wrote it, then export the result. Megatron-LM converts with "
    "--ckpt-convert-format torch_dist --ckpt-convert-save FOLDER; with others, load it and save it "
    "in the format torch_dist."
)


@dataclass(frozen=True, kw_only=True)
class MegatronCheckpoint(Checkpoint):
    """Iteration written by megatron-core, Megatron-LM, Megatron-Bridge or this package."""

    kind: ClassVar[str] = "Megatron torch_dist"
    looks_like: ClassVar[str] = f"{TRACKER}, or an iter_ folder with {FORMAT_FILE}"
    accepted_options: ClassVar[tuple[str, ...]] = ("iteration", "hf_config", "vocab_size")

    @classmethod
    def find(cls, path: AnyPath, iteration: int | str | None) -> AnyPath | None:
        if not path.is_dir():
            return None
        if (path / FORMAT_FILE).is_file():
            _refuse_unless_torch_dist(path)
            return path
        if (path / TRACKER).exists() or iteration is not None or iteration_folders(path):
            folder = iteration_folder(path, iteration)
            _refuse_other_megatron(folder)
            _refuse_unless_torch_dist(folder)
            return folder
        _refuse_other_megatron(path)
        return None

    @classmethod
    def file_patterns(cls, path: AnyPath) -> dict[AnyPath, tuple[str, ...]]:
        return {path: ("*",), **artifact_patterns(path / HF_SUBFOLDER)}

    @classmethod
    def open(cls, path: AnyPath, options: ReadOptions, strict: bool) -> MegatronCheckpoint:
        dist = TorchDistFolder.read(path)
        _ = dist.common  # refuse an unsound one, even if nothing in it is needed
        vocab_size = options.vocab_size
        config, config_from, artifacts_folder = config_of(dist, options.hf_config, vocab_size)
        bridge = bridge_for(config, config_from)
        check_agreement(dist, bridge, config_from, any_vocab_size=vocab_size is not None)
        rows = dist.rows(bridge.vocab_param)
        if rows is not None and rows < bridge.vocab_size:
            raise InputError(
                f"{path}: the embedding has {rows} rows, fewer than the vocabulary of "
                f"{bridge.vocab_size} that {config_from} names"
            )
        registry = bridge.mapping_registry(rows)
        registry.check_size(sum(len(tensor.chunks) for tensor in dist.weights.values()), path)
        mapping = registry.resolve()
        with explaining_names(dist.weights, bridge):
            views = dist.views(mapping)
        return cls(
            path=path,
            bridge=bridge,
            mapping=mapping,
            config_from=config_from,
            artifacts_folder=artifacts_folder,
            megatron=views,
        )

    @cached_property
    def tensors(self) -> dict[str, TensorView]:
        views = {}
        for name, shape in self.mapping.hf_shapes.items():
            pieces: list[Piece] = []
            for p in self.mapping.placements_by_hf_name[name]:
                stored = self.megatron[p.megatron_name]
                pieces += stored.pieces_of(p.megatron_region, p.hf_region, p.transposed)
            views[name] = TensorView.assembled(name, shape, pieces)
        return views

    @cached_property
    def optimizer_state(self) -> OptimizerState:
        dist = TorchDistFolder.read(self.path)
        step, settings = optimizer_values(dist)
        decayed, trainer = read_record(dist)
        master = next((n for n in ("param.", "fp32_param.") if dist.select(STATE + n).tensors), "")
        if not master and self.dtypes != ["float32"]:
            raise FormatError(
                f"{self.path}: its optimizer state doesn't have the float32 weights "
                f"({STATE}fp32_param.* or {STATE}param.*)"
            )
        prefixes = {
            "param": STATE + master if master else "",
            "exp_avg": f"{STATE}exp_avg.",
            "exp_avg_sq": f"{STATE}exp_avg_sq.",
        }
        tensors = {
            kind: replace(self, megatron=dist.select(prefix).views(self.mapping))
            for kind, prefix in prefixes.items()
        }
        return OptimizerState(
            iteration=read_iteration(dist),
            step=step,
            settings=settings,
            decayed=decayed,
            trainer=trainer,
            tensors=tensors,
        )

    @cached_property
    def padding(self) -> dict[str, TensorView]:
        views = {}
        for name, view in self.megatron.items():
            for p in self.mapping.parameters[name].placements:
                if p.hf_name is None:
                    label = f"{name} padding rows"
                    shape = (p.megatron_region.rows, *view.shape[1:])
                    views[label] = replace(view.region(p.megatron_region, shape), name=label)
        return views

    @property
    def layout(self) -> str:
        dist = TorchDistFolder.read(self.path)
        layered = [p for p in self.mapping.parameters.values() if p.index]
        layers_are_stacked = any(p.key(len(p.index)) in dist.tensors for p in layered)
        chunks = max(len(view.pieces) for view in self.megatron.values())
        keys = "layers stacked in one key" if layers_are_stacked else "a key for each layer"
        optimizer_tensors = len(dist.tensors) - len(dist.weights)
        state = f", {optimizer_tensors} tensors of optimizer state" if optimizer_tensors else ""
        return f"{keys}, tensors in up to {chunks} chunk(s){state}"

    @property
    def iterations(self) -> list[str]:
        return [folder.name for folder in iteration_folders(self.path.parent)]

    @property
    def load_flags(self) -> list[str]:
        folder = self.path.resolve()
        number = iteration_number(folder)
        step = [] if number is None or _is_latest(folder) else ["--ckpt-step", str(number)]
        return ["--load", str(folder.parent), *step]


def _is_latest(folder: AnyPath) -> bool:
    """Return whether Megatron-LM loads this iteration if its command line names none."""
    try:
        return iteration_folder(folder.parent, None) == folder
    except BridgeError:
        return False


def _refuse_unless_torch_dist(path: AnyPath) -> None:
    if not (path / FORMAT_FILE).is_file():
        if is_hf_folder(path):
            raise InputError(f"{path}: a Hugging Face checkpoint; pass this folder itself")
        raise InputError(f"{path}: no {FORMAT_FILE}: an incomplete or foreign checkpoint")
    for file in (f for f in path.rglob("*") if f.is_file()):
        refuse_pointer(file)
    if (name := read_format(path)) != "torch_dist":
        raise UnsupportedError(
            f"{path}: a Megatron checkpoint of format {quote(name)}, not torch_dist. "
            f"{_CONVERT_WITH_MEGATRON}"
        )


def _refuse_other_megatron(path: AnyPath) -> None:
    if ranks := [p for p in (path, *glob(path, "*")) if p.name.startswith("mp_rank_")]:
        raise UnsupportedError(
            f"{path}: a Megatron checkpoint of the legacy format ({ranks[0].name}), which has one "
            f"pickle for each parallel rank. {_CONVERT_WITH_MEGATRON}"
        )
    if (path / METADATA).is_file() and not (path / FORMAT_FILE).is_file():
        name = "fsdp_dtensor" if (path / "train_state.pt").exists() else "torch_dcp or fsdp_dtensor"
        raise UnsupportedError(
            f"{path}: a Megatron checkpoint of format {name} ({METADATA} without {FORMAT_FILE}), "
            f"not torch_dist. {_CONVERT_WITH_MEGATRON}"
        )
