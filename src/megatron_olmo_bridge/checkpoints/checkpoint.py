"""What a checkpoint of any kind is: a model, and where the bytes of its tensors are."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from megatron_olmo_bridge.formats.hf_folder import CHAT_TEMPLATES, HUB_PATTERNS
from megatron_olmo_bridge.formats.tensors import Piece, TensorView
from megatron_olmo_bridge.mapping.placement import Region
from megatron_olmo_bridge.mapping.registry import Parameter, ResolvedMapping
from megatron_olmo_bridge.models.bridge import ModelBridge
from megatron_olmo_bridge.storage.identity import Snapshot


@dataclass(frozen=True)
class KindOption:
    """An option that only one kind of checkpoint has; the command line offers it too."""

    name: str
    type: type
    help: str
    minimum: int | None = None


@dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """What a checkpoint may not say itself. A kind refuses what it has no use for."""

    iteration: int | str | None = None
    """Iteration of a Megatron checkpoint: a number, or ``release``. Default: the one that the
    tracker file names."""
    hf_config: str | Path | None = None
    """Folder with config.json and tokenizer, for a checkpoint without them."""
    vocab_size: int | None = None
    """Rows to keep of a padded vocabulary, if the Megatron checkpoint does not record them."""
    num_labels: int | None = None
    """Replace the head by a zero-initialized classification head for this many classes."""
    kind_options: Mapping[str, Any] = field(default_factory=dict)
    """Options of one kind alone, by :attr:`KindOption.name`: ``{"heads": 12}``."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint(ABC):
    """A checkpoint, opened: its headers are read and checked against its model's mapping."""

    kind: ClassVar[str]
    """For people: ``Hugging Face``."""
    looks_like: ClassVar[str]
    """What a path of this kind has, for people: ``config.json and safetensors``."""
    takes: ClassVar[tuple[str, ...]] = ()
    """Fields of :class:`ReadOptions` that it has a use for, besides ``kind_options``."""
    options: ClassVar[tuple[KindOption, ...]] = ()
    """Options that no other kind has."""

    folder: Path
    """Folder with the weights; a file, for a kind that is one file."""
    bridge: ModelBridge
    mapping: ResolvedMapping
    config_from: Path
    """File that says what model it is."""
    artifacts_folder: Path | None
    """Folder with config.json, generation config and tokenizer files."""
    megatron: dict[str, TensorView] = field(default_factory=dict)
    """Tensors by Megatron names, where they are stored so."""
    read_as: tuple[str, ...] = ()
    """What was read otherwise than the config says, one sentence each."""
    snapshot: Snapshot = field(default_factory=lambda: Snapshot({}, {}))
    """The files, as they were before the first of them was read."""

    @classmethod
    @abstractmethod
    def find(cls, path: Path, iteration: int | str | None) -> Path | None:
        """Return the folder or file with the weights; None if the path is of another kind.

        Raises:
            InputError, FormatError: of this kind, but incomplete.
            UnsupportedError: of a variant of this kind that is not converted.
        """

    @classmethod
    @abstractmethod
    def files_read(cls, folder: Path) -> dict[Path, tuple[str, ...]]:
        """Return the folders that it reads, each with patterns of file names."""

    @classmethod
    @abstractmethod
    def open(cls, folder: Path, options: ReadOptions, strict: bool) -> Checkpoint:
        """Read the headers of what :meth:`find` returned.

        Args:
            folder: with the weights.
            options: only those that the kind knows are set.
            strict: refuse tensors that are not those of the config.
        """

    @classmethod
    def knows(cls, option: str) -> bool:
        """Return whether this kind has a use for an option."""
        return option in cls.takes or option in {own.name for own in cls.options}

    @property
    @abstractmethod
    def tensors(self) -> dict[str, TensorView]:
        """Every tensor of the Hugging Face model, in the mapping's order."""

    @property
    @abstractmethod
    def layout(self) -> str:
        """How the tensors are stored, for people."""

    @property
    def iterations(self) -> list[str]:
        """Names of all iterations under the same root."""
        return []

    @property
    def load_flags(self) -> list[str]:
        """Flags with which Megatron-LM loads this very checkpoint."""
        return []

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
        return {}

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding as Megatron holds it."""
        return self.mapping.parameters[self.bridge.vocab_param].shape[0]

    @property
    def parameters(self) -> int:
        """Number of elements of the Hugging Face model."""
        return sum(math.prod(shape) for shape in self.mapping.hf_shapes.values())

    @property
    def dtypes(self) -> list[str]:
        return sorted({view.dtype for view in self.tensors.values()})

    @property
    def notes(self) -> list[str]:
        """What whoever converts this checkpoint should be told."""
        return [*self.bridge.notes, *self.read_as]

    @property
    def hf_config(self) -> dict[str, Any]:
        return self.bridge.hf_config


def artifact_patterns(folder: Path) -> dict[Path, tuple[str, ...]]:
    """Return the folders that config and tokenizer files are read from, with their patterns."""
    return {folder: HUB_PATTERNS, folder / CHAT_TEMPLATES: ("*",)}
