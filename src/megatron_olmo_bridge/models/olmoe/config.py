"""Config of an OLMoE model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from megatron_olmo_bridge.errors import InputError
from megatron_olmo_bridge.models.config import DecoderConfig
from megatron_olmo_bridge.models.hf_values import MAX_EXPERTS, HFValues, check_count


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
        check_count("num_moe_experts", self.num_moe_experts)
        check_count("moe_router_topk", self.moe_router_topk)
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


@dataclass(frozen=True)
class OlmoeConfig(MoEConfig):
    """Config of OLMoE: experts, and clamped queries, keys and values."""

    label = "OLMoE"
    hf_defaults: ClassVar[dict[str, Any]] = MoEConfig.hf_defaults | {
        "num_hidden_layers": 16,
        "hidden_size": 2048,
        "intermediate_size": 2048,
        "num_attention_heads": 16,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "clip_qkv": None,
    }

    clip_qkv: float | None = None
    """Queries, keys and values are clamped to this, after the QK norm."""

    @classmethod
    def read(cls, hf: HFValues) -> dict[str, Any]:
        return super().read(hf) | {"clip_qkv": hf.optional_number("clip_qkv")}
