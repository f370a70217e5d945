"""Base classes of the model families: config values and mapping table."""

from __future__ import annotations

import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator
from collections.abc import Mapping as MappingABC
from dataclasses import asdict
from math import gcd
from typing import TYPE_CHECKING, Any, ClassVar

from megatron_olmo_bridge.errors import UnsupportedError
from megatron_olmo_bridge.mapping.mappings import DirectMapping, Mapping
from megatron_olmo_bridge.mapping.placement import Shape
from megatron_olmo_bridge.mapping.registry import MegatronMappingRegistry

from .config import DECODER_SETTINGS
from .heads import num_labels_of
from .hf_values import HFValues
from .tables import EMBEDDING, HF_HEAD, HF_SCORE

if TYPE_CHECKING:
    from .provider import GPTModelProvider


class ModelBridge(ABC):
    """Config values and mapping of one model; each family subclasses this.

    Creating a bridge reads no weights.
    """

    family: ClassVar[str]
    """Name of the family and of its folder, for example ``olmo2``."""
    architectures: ClassVar[tuple[str, ...]]
    """Values of ``architectures`` and ``model_type`` in ``config.json`` that name the family."""
    sizes: ClassVar[dict[str, dict[str, Any]]]
    """Published sizes: ``config.json`` by name."""
    config_class: ClassVar[Any]
    """Dataclass of the config values; its ``from_hf`` reads them from a ``config.json``."""
    provider_class: ClassVar[str]
    """``module:Class`` of the provider. Only the provider needs megatron-core."""
    layouts: ClassVar[str] = "TP, PP, SP"
    """Parallel layouts at which logits and gradients were compared with transformers."""
    default_pad_token_id: ClassVar[int | None] = None
    """Default of transformers' config class."""
    settings: ClassVar[dict[str, Any]]
    """Settings that all models of the family share, besides :attr:`config_values`."""
    hf_base: ClassVar[str]
    """Name of transformers' class without a head, for example ``Olmo2Model``."""
    hf_embedding: ClassVar[str]
    """Hugging Face name of the embedding tensor."""
    hf_layers: ClassVar[str]
    """Prefix of the Hugging Face names of the layers' tensors."""
    ignored: ClassVar[dict[str, str]]
    """Patterns of Hugging Face names that Megatron doesn't store, each with the reason."""
    vocab_param: ClassVar[str] = EMBEDDING
    """Megatron parameter with one row for each token of the padded vocabulary."""

    def __init__(self, hf_config: dict[str, Any]) -> None:
        self.hf_config = hf_config
        self.config = self.config_class.from_hf(hf_config)
        self.num_labels = num_labels_of(hf_config)
        """Number of classes of the classification head; None for a language model."""
        values = HFValues(hf_config, {"pad_token_id": self.default_pad_token_id})
        self.pad_token_id = values.optional_whole("pad_token_id") if self.num_labels else None
        """Padding token, with which a classifier finds the end of a sequence; None without one."""

    @classmethod
    def with_layers(cls, config: dict[str, Any], layers: int) -> dict[str, Any]:
        """Return the config of the same model with ``layers`` layers."""
        return {**config, "num_hidden_layers": layers}

    @abstractmethod
    def table(self, padded_vocab_size: int | None) -> list[Mapping]:
        """Return the family's mapping table, without the head."""

    @property
    def config_values(self) -> dict[str, Any]:
        """Values that fix shapes and arithmetic, by megatron-core's names."""
        if not self.num_labels:
            return asdict(self.config)
        return asdict(self.config) | {
            "num_labels": self.num_labels,
            "pad_token_id": self.pad_token_id,
            "problem_type": self.hf_config.get("problem_type"),
        }

    @property
    def hf_keys(self) -> frozenset[str]:
        """Keys of ``config.json`` from which :attr:`config_values` is read."""
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

    @property
    def hf_shapes(self) -> dict[str, Shape]:
        """Name and shape of every Hugging Face tensor of this model."""
        return self.mapping_registry().resolve_hf()

    def mapping_registry(self, padded_vocab_size: int | None = None) -> MegatronMappingRegistry:
        """Return the mapping of this model: the family's table and the head."""
        rows, ignored = self.table(padded_vocab_size), dict(self.ignored)
        if self.num_labels:
            shape = (self.num_labels, self.config.hidden_size)
            rows.append(
                DirectMapping(megatron_param="score.weight", hf_param=HF_SCORE, hf_shape=shape)
            )
            ignored[HF_HEAD] = "a language model's head, which a classifier doesn't use"
        elif self.is_tied:
            ignored[HF_HEAD] = f"tied to {self.hf_embedding}"
        else:
            shape = (self.config.vocab_size, self.config.hidden_size)
            rows.append(
                DirectMapping(
                    megatron_param="output_layer.weight",
                    hf_param=HF_HEAD,
                    hf_shape=shape,
                    padded_rows=padded_vocab_size,
                )
            )
        return MegatronMappingRegistry(
            *rows, num_layers=self.num_layers, num_experts=self.num_experts, ignored=ignored
        )

    @property
    def is_tied(self) -> bool:
        """True if the embedding is also the head of the language model."""
        return self.num_labels is None and self.config.share_embeddings_and_output_weights

    @property
    def notes(self) -> list[str]:
        """Notes to show to the user who converts this model."""
        return []

    def hf_names(self, stored: Collection[str]) -> dict[str, str]:
        """Map the stored names that are not the mapping table's to the table's.

        As in transformers, a base model saved without its head has no ``model.`` prefix, and tied
        embeddings may be stored under the name of the head.
        """
        prefix, _, layers = self.hf_layers.partition(".")
        prefix += "."
        names = {}
        if any(prefix + n == self.hf_embedding or n.startswith(layers) for n in stored):
            heads = (HF_HEAD, HF_SCORE)
            names = {n: prefix + n for n in stored if n not in heads and not n.startswith(prefix)}
        in_table = {names.get(name, name) for name in stored}
        has_layers = any(name.startswith(self.hf_layers) for name in in_table)
        has_head_alone = HF_HEAD in in_table and self.hf_embedding not in in_table
        if self.is_tied and has_layers and has_head_alone:
            names[HF_HEAD] = self.hf_embedding
        return names

    def extra_state_patterns(self) -> Iterator[str]:
        """Yield the names of the ``_extra_state`` objects that megatron-core loads, one for each
        linear and norm."""
        for mapping in self.mapping_registry().mappings:
            module, _, last = mapping.megatron_param.rpartition(".")
            if not module.startswith("decoder.") or not last.endswith("weight"):
                continue
            if not module.endswith((".q_layernorm", ".k_layernorm", ".router")):
                yield f"{module}.{last.removesuffix('weight')}_extra_state"

    def megatron_args(self, padded_vocab_size: int, dtype: str) -> dict[str, Any]:
        """Return a checkpoint's ``args``, which Megatron-LM's ``--use-checkpoint-args`` reads.

        Args:
            padded_vocab_size: rows of the embedding in the checkpoint.
            dtype: dtype of the weights, ``float32``, ``bfloat16`` or ``float16``.
        """
        return self.config_values | {
            "padded_vocab_size": padded_vocab_size,
            "bf16": dtype == "bfloat16",
            "fp16": dtype == "float16",
            "no_save_optim": True,
            "no_save_rng": True,
        }

    def megatron_lm_flags(self, dtype: str) -> list[str]:
        """Return the flags that stock Megatron-LM needs besides ``--load`` and the parallel layout,
        to compute in ``dtype``; [] if it can't build the model."""
        return []

    def run_config_model(self, padded_vocab_size: int, dtype: str) -> dict[str, Any]:
        """Return the ``model`` section of ``run_config.yaml``: ``_target_`` and its fields.

        Arguments as for :meth:`megatron_args`.
        """
        # A divisor that pads the vocabulary to exactly padded_vocab_size rows.
        divisor = gcd(padded_vocab_size, 128)
        if padded_vocab_size - self.vocab_size >= divisor:
            divisor = padded_vocab_size
        return {
            "_target_": self.provider_class.replace(":", "."),
            **self.config_values,
            "make_vocab_size_divisible_by": divisor,
            "params_dtype": {"_target_": f"torch.{dtype}", "_call_": False},
            "bf16": dtype == "bfloat16",
            "fp16": dtype == "float16",
        }

    @staticmethod
    def hf_config_of_record(
        record: MappingABC[str, Any], vocab_size: int | None = None
    ) -> dict[str, Any]:
        """Return a ``config.json`` for a checkpoint's ``args`` or a ``model`` section.

        Args:
            record: ``args`` or ``model`` section.
            vocab_size: rows of the Hugging Face embedding; None takes the recorded number.

        Raises:
            InputError: A value that the config needs is missing.
            UnsupportedError: The record is of a model that this family doesn't have.
        """
        raise UnsupportedError(
            "the family can't be told from these settings: pass --hf-config with a folder that has "
            "the model's config.json"
        )

    def provider(self, **fields: Any) -> GPTModelProvider:
        """Return the provider, which builds the model in megatron-core, with ``fields`` set.

        Raises:
            InputError: megatron-core refuses the combination.
        """
        provider: type[GPTModelProvider] = pkgutil.resolve_name(self.provider_class)
        return provider(**{**self.config_values, **fields})

    def size_name(self) -> str | None:
        """Return the name of the published size with this model's shapes, or None."""
        shapes = self.hf_shapes
        published = {name: type(self)(config) for name, config in self.sizes.items()}
        return next((name for name, model in published.items() if model.hf_shapes == shapes), None)


class DecoderBridge(ModelBridge):
    """Base of the OLMo families, with the names of transformers' Llama."""

    settings = DECODER_SETTINGS
    default_pad_token_id = 1
    hf_embedding = "model.embed_tokens.weight"
    hf_layers = "model.layers."
    ignored: ClassVar[dict[str, str]] = {
        "*rotary_emb.inv_freq": "computed from rope_theta, not a weight"
    }
