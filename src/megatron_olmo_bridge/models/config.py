"""Config of a decoder by megatron-core's names, read from a Hugging Face config."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Self

from megatron_olmo_bridge.errors import InputError, UnsupportedError, quote

from .hf_values import MAX_EXPERTS, MAX_HEADS, MAX_LAYERS, HFValues

Rope = dict[str, Any]
"""``rope_theta``, ``rope_type`` and the type's own parameters, as transformers 5 spells them."""

DECODER_SETTINGS: dict[str, Any] = {
    "layernorm_zero_centered_gamma": None,
    "apply_residual_connection_post_layernorm": None,
    "rotary_interleaved": None,
    "use_rope_scaling": None,
    "rope_scaling": None,
    "seq_len_interpolation_factor": None,
    "no_rope_freq": None,
    "window_size": None,
    "softmax_scale": None,
    "qk_l2_norm": None,
    "squared_relu": None,
    "quick_geglu": None,
    "num_moe_experts": None,
    "moe_router_topk_scaling_factor": None,
    "normalization": "RMSNorm",
    "position_embedding_type": "rope",
    "rotary_percent": 1.0,
    "gated_linear_unit": True,
    "moe_router_score_function": "softmax",
}
"""Settings that all models of the OLMo families share, and that no tensor shows. None: the setting
must be absent, false, zero or null, unless the family's config has it."""


@dataclass(frozen=True)
class DecoderConfig:
    """Values that fix shapes and arithmetic of an OLMo-family model, by megatron-core's names."""

    label: ClassVar[str]
    """The family's name in messages."""
    hf_defaults: ClassVar[dict[str, Any]] = {
        "num_hidden_layers": 32,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_attention_heads": 32,
        "num_key_value_heads": None,
        "head_dim": None,
        "vocab_size": 50304,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "hidden_act": "silu",
    }
    """Keys read from ``config.json``, with the defaults of transformers' config class."""
    hf_aliases: ClassVar[dict[str, str]] = {}
    """Other names of keys: ``attribute_map`` of transformers' config class."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    """Rows of gate_proj, and of up_proj."""
    num_attention_heads: int
    num_query_groups: int
    """Number of key/value heads; equal to ``num_attention_heads`` without grouped queries."""
    kv_channels: int
    """Width of one head."""
    vocab_size: int
    """Rows of the embedding in the Hugging Face model, before any padding."""
    max_position_embeddings: int
    layernorm_epsilon: float
    rotary_base: float
    share_embeddings_and_output_weights: bool = False

    def __post_init__(self) -> None:
        if self.num_attention_heads % self.num_query_groups:
            raise InputError(
                f"{self.num_attention_heads} attention heads cannot be divided evenly over "
                f"{self.num_query_groups} key/value heads"
            )

    @classmethod
    def from_hf(cls, hf: dict[str, Any]) -> Self:
        """Read a ``config.json``; absent values get the defaults of transformers' config class.

        Raises:
            InputError: a value is not of its type or range, or the head counts don't divide.
            UnsupportedError: the config asks for arithmetic that the family does not have.
        """
        return cls(**cls.read(HFValues(hf, cls.hf_defaults, cls.hf_aliases)))

    @classmethod
    def read(cls, hf: HFValues) -> dict[str, Any]:
        """Return the values of the fields; a family with more fields extends this."""
        if hf.flag("attention_bias"):
            raise UnsupportedError(
                f"the config sets attention_bias; published {cls.label} models have none"
            )
        if (activation := hf.text("hidden_act")) != "silu":
            raise UnsupportedError(
                f"the config sets hidden_act={quote(activation)}; {cls.label} uses silu"
            )
        hidden, heads = hf.count("hidden_size"), hf.count("num_attention_heads", MAX_HEADS)
        head_dim = hf.optional_count("head_dim")
        if head_dim is None and hidden % heads:
            raise InputError(f"hidden_size {hidden} cannot be divided by {heads} attention heads")
        return {
            "num_layers": hf.count("num_hidden_layers", MAX_LAYERS),
            "hidden_size": hidden,
            "ffn_hidden_size": hf.count("intermediate_size"),
            "num_attention_heads": heads,
            "num_query_groups": hf.optional_count("num_key_value_heads") or heads,
            "kv_channels": head_dim or hidden // heads,
            "vocab_size": hf.count("vocab_size"),
            "max_position_embeddings": hf.count("max_position_embeddings"),
            "layernorm_epsilon": hf.number("rms_norm_eps"),
            "rotary_base": cls.read_theta(hf),
            "share_embeddings_and_output_weights": hf.flag("tie_word_embeddings"),
        }

    @classmethod
    def read_theta(cls, hf: HFValues) -> float:
        """Return theta of a model with a single plain rope."""
        by_layer_type = ropes(hf)
        rope = next(iter(by_layer_type.values()))
        if any(other != rope for other in by_layer_type.values()):
            raise UnsupportedError(
                f"the config asks for another rope in each of {', '.join(by_layer_type)}; "
                f"{cls.label} has one"
            )
        if rope["rope_type"] != "default":
            raise UnsupportedError(
                f"the config asks for rope of type {quote(rope['rope_type'])}; {cls.label} uses "
                "plain rope"
            )
        return float(rope["rope_theta"])


@dataclass(frozen=True)
class MoEConfig(DecoderConfig):
    """Config of a decoder with experts; ``ffn_hidden_size`` is that of one expert."""

    hf_defaults: ClassVar[dict[str, Any]] = DecoderConfig.hf_defaults | {
        "max_position_embeddings": 4096,
        "norm_topk_prob": False,
        "router_aux_loss_coef": 0.01,
    }
    hf_aliases: ClassVar[dict[str, str]] = {"num_local_experts": "num_experts"}

    num_moe_experts: int = 0
    moe_router_topk: int = 0
    """Number of experts that each token is routed to."""
    moe_router_pre_softmax: bool = True
    """Take routing weights from the softmax over all experts; if False, they sum to one."""
    moe_aux_loss_coeff: float = 0.01
    """Weight of the load-balancing loss in training."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.moe_router_topk > self.num_moe_experts:
            raise InputError(
                f"a token can't be sent to {self.moe_router_topk} of {self.num_moe_experts} experts"
            )

    @classmethod
    def read(cls, hf: HFValues) -> dict[str, Any]:
        return super().read(hf) | {
            "num_moe_experts": hf.count("num_experts", MAX_EXPERTS),
            "moe_router_topk": hf.count("num_experts_per_tok"),
            "moe_router_pre_softmax": not hf.flag("norm_topk_prob"),
            "moe_aux_loss_coeff": hf.number("router_aux_loss_coef", least=0.0),
        }


def published(
    architecture: str,
    layers: int,
    hidden: int,
    heads: int,
    kv_heads: int,
    ffn: int,
    *,
    vocab: int,
    eos: int,
    pad: int,
    **own: Any,
) -> dict[str, Any]:
    """Return a ``config.json`` like the released ones; ``own`` holds the family's own keys."""
    return {
        "architectures": [architecture],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": None,
        "eos_token_id": eos if eos < vocab else None,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initializer_range": 0.02,
        "intermediate_size": ffn,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads,
        "pad_token_id": pad if pad < vocab else None,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": vocab,
        **own,
    }


def ropes(hf: HFValues) -> dict[str, Rope]:
    """Return the rope of each layer type, or a single rope under the key ``""``.

    Three spellings are read: ``rope_theta`` with ``rope_scaling``, ``rope_parameters``, and
    ``rope_parameters`` nested by layer type. A rope always has ``rope_type`` and ``rope_theta``.

    Raises:
        InputError: a value is not of its type, or two spellings contradict each other.
        UnsupportedError: only a part of each head would be rotated.
    """
    parameters, scaling = hf.table("rope_parameters"), hf.table("rope_scaling")
    if parameters and scaling and parameters != scaling:
        raise InputError("rope_parameters and rope_scaling contradict each other: remove one")
    if parameters and all(isinstance(value, dict) for value in parameters.values()):
        return {
            kind: _rope(value, hf, f" in rope_parameters.{kind}")
            for kind, value in parameters.items()
        }
    if any(isinstance(value, dict) for value in parameters.values()):
        raise InputError(
            "rope_parameters must be an object for each layer type, or the values of one rope; it "
            "has some of both"
        )
    where = " in rope_parameters" if parameters else " in rope_scaling" if scaling else ""
    return {"": _rope(parameters or scaling, hf, where)}


def _rope(values: Rope, hf: HFValues, where: str) -> Rope:
    rope = HFValues(values, {"rope_type": values.get("type", "default")}, where=where)
    if any(source.get("partial_rotary_factor", 1.0) != 1.0 for source in (rope, hf)):
        raise UnsupportedError("the config sets partial_rotary_factor; OLMo rotates whole heads")
    theta = (rope if "rope_theta" in values else hf).number("rope_theta")
    return {**values, "rope_type": rope.text("rope_type"), "rope_theta": theta}
