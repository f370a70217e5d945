"""The numbers of an OLMoE model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron_olmo_bridge.errors import InputError
from megatron_olmo_bridge.models.config import HF_KEYS, DecoderConfig, check_count

MOE_HF_KEYS = HF_KEYS | {"num_experts", "num_experts_per_tok", "norm_topk_prob",
                         "router_aux_loss_coef"}  # fmt: skip
OLMOE_HF_KEYS = MOE_HF_KEYS | {"clip_qkv"}


@dataclass(frozen=True)
class MoEConfig(DecoderConfig):
    """As every decoder, with experts; ``ffn_hidden_size`` is one expert's."""

    num_moe_experts: int = 0
    moe_router_topk: int = 0
    """Experts that a token is sent to."""
    moe_router_pre_softmax: bool = True
    """Whether the router's weights are of all experts' softmax; else they sum to one."""
    moe_aux_loss_coeff: float = 0.01
    """Weight of the loss that keeps tokens spread over the experts, in training."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("num_moe_experts", self.num_moe_experts)
        check_count("moe_router_topk", self.moe_router_topk)
        if self.moe_router_topk > self.num_moe_experts:
            raise InputError(
                f"a token can't be sent to {self.moe_router_topk} of {self.num_moe_experts} experts"
            )

    @classmethod
    def read(cls, hf: dict[str, Any]) -> dict[str, Any]:
        return super().read(hf) | {
            "num_moe_experts": hf.get("num_experts", 0),
            "moe_router_topk": hf.get("num_experts_per_tok", 0),
            "moe_router_pre_softmax": not hf.get("norm_topk_prob", False),
            "moe_aux_loss_coeff": float(hf.get("router_aux_loss_coef", 0.01)),
        }


@dataclass(frozen=True)
class OlmoeConfig(MoEConfig):
    """OLMoE's."""

    label = "OLMoE"

    clip_qkv: float | None = None
    """Queries, keys and values are clamped to this, after the QK norm."""

    @classmethod
    def read(cls, hf: dict[str, Any]) -> dict[str, Any]:
        return super().read(hf) | {"clip_qkv": hf.get("clip_qkv")}
