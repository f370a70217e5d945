"""Read megatron-core's ``torch_dist`` checkpoints without torch or megatron-core.

A checkpoint is a folder with ``metadata.json`` (its format), ``.metadata`` (a pickle: which bytes
of which ``.distcp`` file are which chunk of which tensor), the ``.distcp`` files (one archive of
``torch.save`` after the other) and the common state (``common.pt``, or since megatron-core 0.19 an
object among the shards). A tensor's key either holds all layers, stacked along its first axis, or
has its layer's number in its name.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from megatron_olmo_bridge.errors import FormatError
from megatron_olmo_bridge.mapping.placement import Region, Shape
from megatron_olmo_bridge.mapping.registry import Parameter, ResolvedMapping, check_tensors

from .dcp_folder import DCPFolder
from .dcp_metadata import GlobalTensor, StoredBytes
from .files import read_json
from .inert import Inert
from .remote_path import AnyPath
from .tensors import Piece, TensorView
from .torch_archive import read_archive

FORMAT_FILE = "metadata.json"
COMMON = "common.pt"
FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
# Keys of optimizer, scheduler, RNG and loop state, which are not the model's.
_NOT_WEIGHTS = re.compile(
    r"(chained_\d+\.)?optimizer\b.*|.*rng_state.*|rerun_state_machine.*|opt_param_scheduler.*"
    r"|common_state.*|.*_extra_state(/.*)?"
)
_ORIGIN = Region(0, 0, 0, 0)
_GATED_SUFFIXES = ("_w", "_v")
"""Endings of two keys for one parameter: its gate and its up half, stored as two tensors."""


@dataclass(frozen=True)
class TorchDistFolder(DCPFolder):
    """A ``torch_dist`` checkpoint of one iteration, by its headers."""

    @cached_property
    def common(self) -> dict[str, Any]:
        """The common state as plain values and placeholders; empty where there is none."""
        if at := self._common_object:
            value = read_archive(self.common_file, at.offset, at.length, any_classes=True)
            value = value[0] if isinstance(value, list) and value else value
        elif self.common_file.exists():
            value = read_archive(self.common_file, any_classes=True)
        else:
            return {}
        if not isinstance(value, dict):
            raise FormatError(f"{self.common_file}: the common state is not a dictionary")
        return value

    @property
    def common_file(self) -> AnyPath:
        """The file that holds the common state."""
        at = self._common_object
        return self.path / (at.file if at else COMMON)

    @property
    def _common_object(self) -> StoredBytes | None:
        """The common state's bytes among the shards, where megatron-core 0.19 saves it."""
        if (self.path / COMMON).exists():
            return None
        return next((o for key, o in self.objects.items() if key.startswith("common_state/")), None)

    @property
    def args(self) -> dict[str, Any] | None:
        """Megatron-LM's ``args``, if a training run saved them."""
        args = self.common.get("args")
        if isinstance(args, Inert):
            args = args.state if isinstance(args.state, dict) else args.items
        return args if isinstance(args, dict) and args else None

    @cached_property
    def weights(self) -> dict[str, GlobalTensor]:
        """The model's tensors, without optimizer and RNG state."""
        return {k: t for k, t in self.tensors.items() if not _NOT_WEIGHTS.fullmatch(k)}

    @cached_property
    def _has_a_key_for_each_layer(self) -> bool:
        return any(re.search(r"\.layers\.\d+\.", key) for key in self.weights)

    def rows(self, parameter: str) -> int | None:
        """Return the rows of a parameter outside the layers, such as the padded embedding."""
        tensor = self.tensors.get(parameter)
        return tensor.shape[0] if tensor else None

    def views(self, mapping: ResolvedMapping) -> dict[str, TensorView]:
        """Return each Megatron parameter of the mapping as a view of the files.

        Raises:
            MappingError: tensors are missing, unexpected or of another shape.
            FormatError: chunks overlap, leave gaps, or an archive is damaged.
        """
        keys = {name: self._keys(p) for name, p in mapping.parameters.items()}
        expected: dict[str, Shape] = {}
        axes: dict[str, int] = {}
        for name, parameter in mapping.parameters.items():
            for key, region, index in keys[name]:
                axes[key], end = len(index), len(parameter.index)
                counts = mapping.counts[end - axes[key] : end]
                expected[key] = (*counts, region.rows, *parameter.shape[1:])
        check_tensors(expected, {k: t.shape for k, t in self.weights.items()}, self.path)
        self.read_ahead(expected)
        stored = {key: self.pieces(key, axes[key]) for key in expected}
        views = {}
        for name, parameter in mapping.parameters.items():
            pieces = [
                Piece(piece.array, piece.array_region, piece.tensor_region.moved(_ORIGIN, region))
                for key, region, index in keys[name]
                for piece in stored[key].get(index, ())
            ]
            views[name] = TensorView.assembled(f"{self.path}: {name}", parameter.shape, pieces)
        return views

    def _keys(self, parameter: Parameter) -> list[tuple[str, Region, tuple[int, ...]]]:
        """Return the keys that hold a parameter.

        Returns:
            for each key: its name, the rows of the parameter that it holds, and those of the
            parameter's indices (layer, expert) that are axes of the stored tensor.
        """
        whole, index = Region.whole(parameter.shape), parameter.index
        stacked = [(parameter.key(len(index) - i), whole, index[i:]) for i in range(len(index) + 1)]
        for found in stacked:
            if found[0] in self.tensors:
                return [found]
        halves = [parameter.name + suffix for suffix in _GATED_SUFFIXES]
        if len(parameter.chunks) == 2 and halves[0] in self.tensors:
            return list(zip(halves, parameter.chunks, ((), ()), strict=True))
        # Absent: return the key that the error should name, by this checkpoint's kind of names.
        return [stacked[-1 if self._has_a_key_for_each_layer else 0]]


def stacked_key(pattern: str) -> str:
    """Return megatron-core's key of all layers, ``decoder.layers.mlp.weight``, for a pattern."""
    return pattern.replace(".*", "")


def read_format(path: AnyPath) -> str:
    """Return the backend that ``metadata.json`` names, ``torch_dist`` or another.

    Raises:
        FormatError: it names none, or see :func:`.read_json`.
    """
    name = read_json(path / FORMAT_FILE).get("sharded_backend")
    if not isinstance(name, str):
        raise FormatError(f"{path / FORMAT_FILE}: does not name a format (sharded_backend)")
    return name
