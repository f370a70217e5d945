"""What every family says of itself, and the table of families by Hugging Face architecture."""

from __future__ import annotations

import pkgutil
import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator
from dataclasses import asdict
from fnmatch import translate
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar

from megatron_olmo_bridge.errors import (
    BridgeError,
    FormatError,
    InputError,
    UnsupportedError,
    quote,
)
from megatron_olmo_bridge.mapping.mappings import DirectMapping, Mapping
from megatron_olmo_bridge.mapping.registry import MegatronMappingRegistry
from megatron_olmo_bridge.nn.problem_types import check_problem_type

from .hf_values import MAX_LABELS, HFValues, is_count
from .megatron_record import MegatronRecord
from .recorded import DECODER_SETTINGS
from .tables import EMBEDDING, HF_HEAD, HF_SCORE

if TYPE_CHECKING:
    from .provider import GPTModelProvider

FAMILIES = ("olmo2", "olmo3", "olmo", "olmoe", "flex_olmo", "gpt2")
"""Folders beside this file; each has a ``bridge.py``, which registers itself."""
_BRIDGES: dict[str, type[ModelBridge]] = {}
_CLASSIFIER = "ForSequenceClassification"
_CONFIG = "config.json"


class ModelBridge(ABC):
    """One model family: its numbers and its mapping.

    A bridge holds numbers only; making one reads no weights. A family says what its table is, and
    names its classes; the rest follows.
    """

    family: ClassVar[str]
    """Name of the family, as in ``olmo2``."""
    sizes: ClassVar[dict[str, dict[str, Any]]]
    """Published sizes: name to ``config.json``."""
    config_class: ClassVar[Any]
    """Dataclass of the numbers that fix shapes and arithmetic, by megatron-core's names; its
    ``from_hf`` reads them from a ``config.json``."""
    provider_class: ClassVar[str]
    """``module:Class`` of the provider, which needs megatron-core."""
    record_class: ClassVar[type[MegatronRecord]] = MegatronRecord
    """What Megatron's own files say of a model of the family."""
    layouts: ClassVar[str] = "TP, PP, SP"
    """Parallel layouts that logits and gradients were compared at with transformers'."""
    default_pad_token_id: ClassVar[int | None] = 1
    """Default of transformers' config class."""
    settings: ClassVar[dict[str, Any]] = DECODER_SETTINGS
    """What Megatron records alike of every model of the family, beside :attr:`numbers`."""
    hf_base: ClassVar[str]
    """Name of transformers' class of the model without a head, for example ``Olmo2Model``."""
    hf_embedding: ClassVar[str] = "model.embed_tokens.weight"
    hf_layers: ClassVar[str] = "model.layers."
    """What the names of the layers' tensors begin with."""
    ignored: ClassVar[dict[str, str]] = {
        "*rotary_emb.inv_freq": "computed from rope_theta, not a weight"
    }
    """Patterns of Hugging Face names that have no place in Megatron, each with its reason."""
    vocab_param: ClassVar[str] = EMBEDDING
    """The Megatron parameter with a row for each token: its rows are the padded vocabulary."""

    def __init__(self, hf_config: dict[str, Any]) -> None:
        self.hf_config = hf_config
        self.config = self.config_class.from_hf(hf_config)
        self.num_labels = _num_labels(hf_config)
        """Classes of a classification head; None for a language model."""
        values = HFValues(hf_config, {"pad_token_id": self.default_pad_token_id})
        self.pad_token_id = values.optional_whole("pad_token_id") if self.num_labels else None
        """A classifier finds the end of a text by it; None where there is none."""

    @classmethod
    def with_layers(cls, config: dict[str, Any], layers: int) -> dict[str, Any]:
        """The config of a model of another depth."""
        return {**config, "num_hidden_layers": layers}

    @abstractmethod
    def table(self, padded_vocab_size: int | None) -> list[Mapping]:
        """The family's table, without the head."""

    @property
    def numbers(self) -> dict[str, Any]:
        """Everything that fixes shapes and arithmetic, by megatron-core's names."""
        if not self.num_labels:
            return asdict(self.config)
        return asdict(self.config) | {
            "num_labels": self.num_labels,
            "pad_token_id": self.pad_token_id,
            "problem_type": self.hf_config.get("problem_type"),
        }

    @property
    def hf_keys(self) -> frozenset[str]:
        """Keys of ``config.json`` that :attr:`numbers` stands for."""
        return frozenset(self.config_class.hf_defaults) | frozenset(self.config_class.hf_aliases)

    @property
    def num_layers(self) -> int:
        return int(self.config.num_layers)

    @property
    def num_experts(self) -> int | None:
        return getattr(self.config, "num_moe_experts", None)

    @property
    def vocab_size(self) -> int:
        """Rows of the Hugging Face embedding."""
        return int(self.config.vocab_size)

    def mapping_registry(self, padded_vocab_size: int | None = None) -> MegatronMappingRegistry:
        """The family's table with the head, for this model's numbers."""
        rows, ignored = self.table(padded_vocab_size), dict(self.ignored)
        if self.num_labels:
            shape = (self.num_labels, self.config.hidden_size)
            rows.append(DirectMapping(HF_SCORE, HF_SCORE, shape))
            ignored[HF_HEAD] = "a language model's head, which a classifier doesn't use"
        elif self.is_tied:
            ignored[HF_HEAD] = f"tied to {self.hf_embedding}"
        else:
            shape = (self.config.vocab_size, self.config.hidden_size)
            rows.append(DirectMapping("output_layer.weight", HF_HEAD, shape, padded_vocab_size))
        return MegatronMappingRegistry(
            *rows, num_layers=self.num_layers, num_experts=self.num_experts, ignored=ignored
        )

    @property
    def is_tied(self) -> bool:
        """Whether the embedding is the head of the language model."""
        return self.num_labels is None and self.config.share_embeddings_and_output_weights

    @property
    def notes(self) -> list[str]:
        """What somebody who converts this model should be told."""
        return []

    def hf_names(self, stored: Collection[str]) -> dict[str, str]:
        """Return the table's names of tensors that are stored by another name.

        As transformers reads them: a base model saved alone has no ``model.`` before its names,
        and where embeddings are tied, either of the two names will do.
        """
        prefix, _, layers = self.hf_layers.partition(".")
        embedding = self.hf_embedding.removeprefix(f"{prefix}.")
        names = {}
        if any(name == embedding or name.startswith(layers) for name in stored):
            heads = (HF_HEAD, HF_SCORE)
            names = {n: f"{prefix}.{n}" for n in stored if n not in heads and
                     not n.startswith(f"{prefix}.")}  # fmt: skip
        known = {names.get(name, name) for name in stored}
        has_layers = any(name.startswith(self.hf_layers) for name in known)
        if self.is_tied and has_layers and HF_HEAD in known and self.hf_embedding not in known:
            names[HF_HEAD] = self.hf_embedding
        return names

    def extra_state_patterns(self) -> Iterator[str]:
        """Names of the ``_extra_state`` objects for which the local or the Transformer Engine spec
        asks: one for each linear and each norm of megatron-core's."""
        for mapping in self.mapping_registry().mappings:
            module, _, last = mapping.megatron_param.rpartition(".")
            if not module.startswith("decoder.") or not last.endswith("weight"):
                continue
            if not module.endswith((".q_layernorm", ".k_layernorm", ".router")):
                yield f"{module}.{last.removesuffix('weight')}_extra_state"

    @property
    def megatron_record(self) -> MegatronRecord:
        """What Megatron's own files say of this model."""
        return self.record_class(self)

    def provider(self, **fields: Any) -> GPTModelProvider:
        """Builds the model in megatron-core; ``fields`` are any of the provider's.

        Raises:
            InputError: megatron-core refuses the combination.
        """
        provider: type[GPTModelProvider] = pkgutil.resolve_name(self.provider_class)
        return provider(**{**self.numbers, **fields})

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
        _buffers.cache_clear()
        _tied.cache_clear()
        return bridge

    return register


def known_architectures() -> list[str]:
    """Values of ``architectures`` and ``model_type`` that a bridge handles."""
    return list(_families())


def architectures_of(bridge: type[ModelBridge]) -> list[str]:
    """The names that a bridge handles."""
    return [name for name, handler in _families().items() if handler is bridge]


def published_sizes() -> dict[str, type[ModelBridge]]:
    """Every published size by name, with the bridge that handles it."""
    return {name: bridge for bridge in dict.fromkeys(_families().values()) for name in bridge.sizes}


def bridge_for(hf_config: dict[str, Any], where: object) -> ModelBridge:
    """Return the bridge for a ``config.json``, by ``architectures`` or else by ``model_type``.

    Raises:
        UnsupportedError: no bridge handles it; the message lists those that are known.
        InputError: ``model_type`` is not that of the family that ``architectures`` names.
        BridgeError: the bridge that handles it can't make sense of its values.
    """
    bridge = _family_of(hf_config, where)
    try:
        return bridge(hf_config)
    except BridgeError as error:
        raise type(error)(f"{where}: {error}") from error
    except (TypeError, ValueError, AttributeError, LookupError, ArithmeticError) as error:
        raise FormatError(f"{where}: a value is not of its kind: {error}") from error


def _family_of(hf_config: dict[str, Any], where: object) -> type[ModelBridge]:
    names = _architectures(hf_config, where)
    model_type = hf_config.get("model_type")
    by_type = _families().get(str(model_type))
    by_name = next((_families()[name] for name in names if name in _families()), None)
    if by_name and model_type is not None and by_name is not by_type:
        raise InputError(
            f"{where}: architectures {', '.join(names)} are of {by_name.family}, but model_type "
            f"{quote(model_type)} is not: correct one of them"
        )
    if by_name:
        return by_name
    if by_type and (not names or any(_is_variant(name, by_type) for name in names)):
        return by_type
    asked = ", ".join(names) or f"model_type {quote(model_type)}"
    raise UnsupportedError(
        f"{where}: architecture {asked} is not known here. "
        f"Known are: {', '.join(known_architectures())}."
    )


def _architectures(hf_config: dict[str, Any], where: object = _CONFIG) -> list[str]:
    names = hf_config.get("architectures")
    names = [] if names is None else [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InputError(f"{where}: architectures must be a list of names, not {quote(names)}")
    return names


def _is_variant(name: str, bridge: type[ModelBridge]) -> bool:
    """Return whether a class is a known one with a prefix, as FSDP's, or the base model's."""
    return name.endswith((*architectures_of(bridge), bridge.hf_base))


def is_buffer(hf_name: str) -> bool:
    """Return whether a tensor of this name is computed, not a weight, in some family."""
    return _buffers().fullmatch(hf_name) is not None


def may_be_tied(hf_name: str) -> bool:
    """Return whether a tensor of this name is one of two that are tied in some model."""
    return hf_name in _tied()


# Both are asked of every tensor of a file.
@cache
def _buffers() -> re.Pattern[str]:
    patterns = {pattern for bridge in _families().values() for pattern in bridge.ignored}
    return re.compile("|".join(map(translate, sorted(patterns))))


@cache
def _tied() -> frozenset[str]:
    return frozenset({HF_HEAD, *(bridge.hf_embedding for bridge in _families().values())})


def _families() -> dict[str, type[ModelBridge]]:
    for family in FAMILIES:
        import_module(f"{__package__}.{family}.bridge")
    # In the table's order, whichever was imported first; those that a user registered come last.
    order = {family: i for i, family in enumerate(FAMILIES)}
    named = sorted(_BRIDGES.items(), key=lambda item: order.get(item[1].family, len(order)))
    return dict(named)


def _num_labels(hf_config: dict[str, Any]) -> int | None:
    """Return the rows of the head if it is a classifier's; transformers' default is 2.

    Raises:
        InputError: ``num_labels``, ``id2label`` and ``problem_type`` contradict each other.
    """
    names = _architectures(hf_config)
    if not names or not names[0].endswith(_CLASSIFIER):
        return None
    values = HFValues(hf_config, {"num_labels": 2})
    labels, stated = len(values.table("id2label")), values.count("num_labels")
    if labels and "num_labels" in hf_config and labels != stated:
        raise InputError(
            f"num_labels is {stated}, but id2label has {labels} labels: correct one of them"
        )
    check_problem_type(hf_config.get("problem_type"), labels or stated)
    return labels or stated


def as_classifier(hf_config: dict[str, Any], num_labels: int) -> dict[str, Any]:
    """The config of the same model with a classification head of so many classes.

    Raises:
        InputError: a number of classes that no head has.
        UnsupportedError: transformers has no such head for the family.
    """
    bridge = _family_of(hf_config, _CONFIG)
    name = next((n for n in architectures_of(bridge) if n.endswith(_CLASSIFIER)), None)
    if name is None:
        names = _architectures(hf_config) or [bridge.family]
        raise UnsupportedError(f"{names[0]} has no classification head here")
    if not is_count(num_labels, MAX_LABELS):
        raise InputError(f"a head can have 1 to {MAX_LABELS:,} classes, not {num_labels}")
    labels = {str(i): f"LABEL_{i}" for i in range(num_labels)}
    return {
        **hf_config,
        "architectures": [name],
        "id2label": labels,
        "label2id": {label: int(i) for i, label in labels.items()},
    }
