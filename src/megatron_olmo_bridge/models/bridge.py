"""What every family says of itself, and the table of families by Hugging Face architecture."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping as MappingABC
from typing import TYPE_CHECKING, Any, ClassVar

from megatron_olmo_bridge.errors import BridgeError, FormatError, UnsupportedError
from megatron_olmo_bridge.mapping.registry import MegatronMappingRegistry

if TYPE_CHECKING:
    from .provider import GPTModelProvider

_BRIDGES: dict[str, type[ModelBridge]] = {}


class ModelBridge(ABC):
    """One model family: its numbers, its mapping, and its way to stock Megatron-LM and back.

    A bridge holds numbers only; making one reads no weights.
    """

    family: ClassVar[str]
    """Name of the family, as in ``olmo2``."""
    sizes: ClassVar[dict[str, dict[str, Any]]]
    """Published sizes: name to ``config.json``."""

    def __init__(self, hf_config: dict[str, Any]) -> None:
        self.hf_config = hf_config

    @classmethod
    @abstractmethod
    def hf_config_from_megatron(
        cls, values: MappingABC[str, Any], vocab_size: int | None
    ) -> dict[str, Any]:
        """A ``config.json`` from Megatron-LM's ``args`` or Megatron-Bridge's ``model`` section."""

    hf_keys: ClassVar[frozenset[str]]
    """Keys of ``config.json`` that :attr:`numbers` stands for."""

    @property
    @abstractmethod
    def numbers(self) -> dict[str, Any]:
        """Everything that fixes shapes and arithmetic, by megatron-core's names."""

    @property
    @abstractmethod
    def num_layers(self) -> int: ...

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Rows of the Hugging Face embedding."""

    vocab_param: ClassVar[str]
    """The Megatron parameter with a row for each token: its rows are the padded vocabulary."""

    @abstractmethod
    def mapping_registry(self, padded_vocab_size: int | None = None) -> MegatronMappingRegistry:
        """The family's table, for this model's numbers."""

    @abstractmethod
    def megatron_args(self, padded_vocab_size: int, dtype: str) -> dict[str, Any]:
        """``args`` of the checkpoint, read by Megatron-LM's ``--use-checkpoint-args``."""

    @abstractmethod
    def megatron_flags(self, padded_vocab_size: int, dtype: str) -> list[str]:
        """What stock Megatron-LM must be told on the command line besides."""

    @abstractmethod
    def provider_fields(self, padded_vocab_size: int, dtype: str) -> dict[str, Any]:
        """The ``model`` section of ``run_config.yaml``: ``_target_`` and its fields."""

    @abstractmethod
    def provider(self, **fields: Any) -> GPTModelProvider:
        """Builds the model in megatron-core; ``fields`` are any of the provider's.

        Raises:
            InputError: megatron-core refuses the combination.
        """

    @property
    @abstractmethod
    def extra_state_modules(self) -> list[str]:
        """Modules (``*`` for the layer) for which the local or the Transformer Engine spec asks an
        ``_extra_state`` object."""

    def size_name(self) -> str | None:
        """The published size that this model has, ``olmo2-7b`` for example."""
        shape = self.mapping_registry().resolve().hf_shapes
        for name, config in self.sizes.items():
            known = type(self)(config)
            if known.num_layers == self.num_layers and (
                known.mapping_registry().resolve().hf_shapes == shape
            ):
                return name
        return None


def register_bridge(*architectures: str) -> Any:
    """Class decorator: this bridge handles these ``architectures`` or ``model_type`` values."""

    def register(bridge: type[ModelBridge]) -> type[ModelBridge]:
        _BRIDGES.update(dict.fromkeys(architectures, bridge))
        return bridge

    return register


def known_architectures() -> list[str]:
    """Values of ``architectures`` and ``model_type`` that a bridge handles."""
    return list(_families())


def published_sizes() -> dict[str, type[ModelBridge]]:
    """Every published size by name, with the bridge that handles it."""
    return {name: bridge for bridge in dict.fromkeys(_families().values()) for name in bridge.sizes}


def bridge_for(hf_config: dict[str, Any], where: object) -> ModelBridge:
    """The bridge for a ``config.json``, by ``architectures`` and else by ``model_type``.

    Raises:
        UnsupportedError: no bridge handles it; the message lists those that are known.
        BridgeError: the bridge that handles it can't make sense of its values.
    """
    names = hf_config.get("architectures") or []
    names = names if isinstance(names, list) else [names]
    for name in [*names, *([] if names else [hf_config.get("model_type")])]:
        if bridge := _families().get(str(name)):
            try:
                return bridge(hf_config)
            except BridgeError as error:
                raise type(error)(f"{where}: {error}") from error
            except (TypeError, ValueError, AttributeError) as error:
                raise FormatError(f"{where}: a value is not of its kind: {error}") from error
    asked = ", ".join(map(str, names)) or f"model_type {hf_config.get('model_type')!r}"
    raise UnsupportedError(
        f"{where}: architecture {asked} is not known here. "
        f"Known are: {', '.join(known_architectures())}."
    )


def _families() -> dict[str, type[ModelBridge]]:
    from .olmo2 import bridge  # noqa: F401  (importing registers)

    return _BRIDGES
