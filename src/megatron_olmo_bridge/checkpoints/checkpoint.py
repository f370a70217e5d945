"""Interface of a checkpoint of any kind: its model, and where its tensors are stored."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from megatron_olmo_bridge.errors import InputError
from megatron_olmo_bridge.formats.hf_folder import CHAT_TEMPLATES, HUB_PATTERNS
from megatron_olmo_bridge.formats.remote_path import AnyPath
from megatron_olmo_bridge.formats.tensors import Piece, TensorView
from megatron_olmo_bridge.mapping.placement import Region
from megatron_olmo_bridge.mapping.registry import Parameter, ResolvedMapping
from megatron_olmo_bridge.models.bridge import ModelBridge
from megatron_olmo_bridge.storage.identity import Snapshot
from megatron_olmo_bridge.storage.remote_files import CONNECTIONS


@dataclass(frozen=True)
class KindOption:
    """Option that only one kind of checkpoint has; the command line offers it too."""

    name: str
    type: type
    help: str
    minimum: int | None = None


@dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """Choices in reading a checkpoint. A kind refuses options that it has no use for."""

    iteration: int | str | None = None
    """Iteration of a Megatron checkpoint: a number, or ``release``. Default: the one that the
    tracker file names."""
    hf_config: str | Path | None = None
    """Folder with config.json and tokenizer, for a checkpoint without them."""
    vocab_size: int | None = None
    """Rows to keep of a padded vocabulary, if the Megatron checkpoint does not record them."""
    num_labels: int | None = None
    """Replace the head by a zero-initialized classification head for this many classes."""
    max_connections: int = CONNECTIONS
    """Requests in flight, for a checkpoint that is somewhere else."""
    kind_options: Mapping[str, Any] = field(default_factory=dict)
    """Options of one kind alone, by :attr:`KindOption.name`: ``{"heads": 12}``."""


@dataclass(frozen=True, kw_only=True)
class OptimizerState:
    """State of AdamW in a training checkpoint, by the names of torch.optim.AdamW."""

    iteration: int
    """Number of optimizer steps that the run has taken."""
    step: float
    """Step count of the bias correction; trainers don't all begin it at the iteration."""
    settings: dict[str, Any]
    """lr, initial_lr (the peak), betas, eps, and weight_decay of the parameters that have one."""
    decayed: str = "matrices"
    """Which parameters decay, as the training option ``optimizer.decayed`` calls them."""
    trainer: dict[str, Any] | None = None
    """State of OLMo-core's trainer and its data loader, if the run reads data in its order."""
    tensors: Mapping[str, Checkpoint]
    """The model with other tensors, all float32: ``param``, the weights that the optimizer updates,
    and their moments ``exp_avg`` and ``exp_avg_sq``."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint(ABC):
    """Checkpoint whose headers are read and checked against its model's mapping."""

    kind: ClassVar[str]
    """Name of the kind in messages: ``Hugging Face``."""
    looks_like: ClassVar[str]
    """What a path of this kind has, in messages: ``config.json and safetensors``."""
    accepted_options: ClassVar[tuple[str, ...]] = ()
    """Fields of :class:`ReadOptions` that this kind has a use for, besides ``kind_options``."""
    own_options: ClassVar[tuple[KindOption, ...]] = ()
    """Options that no other kind has; their values are in :attr:`ReadOptions.kind_options`."""

    path: AnyPath
    """Folder with the weights, or the file, for a kind that is a single file."""
    bridge: ModelBridge
    mapping: ResolvedMapping
    config_from: AnyPath
    """File that the model's config was read from."""
    artifacts_folder: AnyPath | None
    """Folder with config.json, generation config and tokenizer files."""
    megatron: dict[str, TensorView] = field(default_factory=dict)
    """Tensors by Megatron name, for a kind that stores Megatron's parameters."""
    reading_notes: tuple[str, ...] = ()
    """Sentences on what was read differently from what the config says."""
    snapshot: Snapshot = field(default_factory=lambda: Snapshot({}, {}))
    """State of the files before the first of them was read."""

    @classmethod
    @abstractmethod
    def find(cls, path: AnyPath, iteration: int | str | None) -> AnyPath | None:
        """Return the folder or file with the weights; None if the path is of another kind.

        Raises:
            InputError, FormatError: the checkpoint is of this kind, but incomplete.
            UnsupportedError: it is of a variant of this kind that is not converted.
        """

    @classmethod
    @abstractmethod
    def file_patterns(cls, path: AnyPath) -> dict[AnyPath, tuple[str, ...]]:
        """Return the folders that this kind reads, each with patterns of file names."""

    @classmethod
    @abstractmethod
    def open(cls, path: AnyPath, options: ReadOptions, strict: bool) -> Checkpoint:
        """Read the headers of a checkpoint.

        Args:
            path: what :meth:`find` returned.
            options: options, of which only accepted ones are set.
            strict: refuse tensors that are not those of the config.
        """

    @classmethod
    def accepts(cls, option: str) -> bool:
        """Return whether this kind has a use for an option."""
        return option in {*cls.accepted_options, *(own.name for own in cls.own_options)}

    @property
    @abstractmethod
    def tensors(self) -> dict[str, TensorView]:
        """Tensors of the Hugging Face model, in the mapping's order."""

    @property
    @abstractmethod
    def layout(self) -> str:
        """Description of how the tensors are stored."""

    @property
    def iterations(self) -> list[str]:
        """Names of all iterations under the same root."""
        return []

    @property
    def load_flags(self) -> list[str]:
        """Flags with which Megatron-LM loads this checkpoint."""
        return []

    @property
    def optimizer_state(self) -> OptimizerState:
        """Optimizer state, from headers alone except for the settings and counts.

        Raises:
            InputError: the checkpoint has none.
            UnsupportedError: it is not that of AdamW, or not the same for all parameters.
        """
        raise InputError(f"{self.path}: no optimizer state is read from {self.kind} checkpoints")

    def pieces(self, parameter: Parameter, region: Region) -> Iterator[Piece]:
        """Yield the pieces that a region of a Megatron parameter consists of.

        Positions are relative to the region: row 0 is its first row.
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
        return {}

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding in Megatron."""
        return self.mapping.parameters[self.bridge.vocab_param].shape[0]

    @property
    def parameter_count(self) -> int:
        """Number of elements of the Hugging Face model."""
        return sum(map(math.prod, self.mapping.hf_shapes.values()))

    @property
    def dtypes(self) -> list[str]:
        return sorted({view.dtype for view in self.tensors.values()})

    @property
    def notes(self) -> list[str]:
        """Notes to show to the user who converts this checkpoint."""
        return [*self.bridge.notes, *self.reading_notes]

    @property
    def hf_config(self) -> dict[str, Any]:
        return self.bridge.hf_config


def artifact_patterns(folder: AnyPath) -> dict[AnyPath, tuple[str, ...]]:
    """Return the folders that config and tokenizer files are read from, with their patterns."""
    return {folder: HUB_PATTERNS, folder / CHAT_TEMPLATES: ("*",)}
