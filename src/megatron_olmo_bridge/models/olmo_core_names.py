"""Names and shapes of OLMo-core's tensors, by those of Hugging Face.

OLMo-core is AI2's trainer, the PyPI package ``ai2-olmo-core``. Source: the state dicts of
``olmo_core/nn/transformer/model.py`` in versions 1.9, 2.x and 3.0, which have the same names.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_olmo_bridge.mapping.mappings import numbered, split_numbers
from megatron_olmo_bridge.mapping.placement import Region, Shape

from .bridge import ModelBridge

EMBEDDING = "embeddings.weight"
COMMON_NAMES = {
    "model.embed_tokens.weight":                EMBEDDING,
    "model.layers.*.self_attn.q_proj.weight":   "blocks.*.attention.w_q.weight",
    "model.layers.*.self_attn.k_proj.weight":   "blocks.*.attention.w_k.weight",
    "model.layers.*.self_attn.v_proj.weight":   "blocks.*.attention.w_v.weight",
    "model.layers.*.self_attn.o_proj.weight":   "blocks.*.attention.w_out.weight",
    "model.layers.*.self_attn.q_norm.weight":   "blocks.*.attention.q_norm.weight",
    "model.layers.*.self_attn.k_norm.weight":   "blocks.*.attention.k_norm.weight",
    "model.layers.*.mlp.gate_proj.weight":      "blocks.*.feed_forward.w1.weight",
    "model.layers.*.mlp.down_proj.weight":      "blocks.*.feed_forward.w2.weight",
    "model.layers.*.mlp.up_proj.weight":        "blocks.*.feed_forward.w3.weight",
    "model.layers.*.mlp.gate.weight":           "blocks.*.feed_forward_moe.router.weight",
    "model.norm.weight":                        "lm_head.norm.weight",
    "lm_head.weight":                           "lm_head.w_out.weight",
}  # fmt: skip
"""Hugging Face name and OLMo-core name of the tensors with the same name in all families."""
ROUTER = "model.layers.*.mlp.gate.weight"
"""The router, which OLMo-core stores with its rows one after the other in one dimension."""
EXPERT_NAMES = {
    "model.layers.*.mlp.experts.*.gate_proj.weight": "blocks.*.feed_forward_moe.experts.mlp.w1",
    "model.layers.*.mlp.experts.*.down_proj.weight": "blocks.*.feed_forward_moe.experts.mlp.w2",
    "model.layers.*.mlp.experts.*.up_proj.weight":   "blocks.*.feed_forward_moe.experts.mlp.w3",
}  # fmt: skip
"""The same of the experts: one tensor per layer, in which each expert's matrix lies below that of
the expert before."""
_TRANSPOSED_IF_DROPLESS = {"model.layers.*.mlp.experts.*.down_proj.weight"}
"""Matrices of experts that are transposed in a mixture that drops no tokens (``DroplessMoEMLP`` in
``olmo_core/nn/moe/mlp.py``). In one that drops tokens (``MoEMLP``) all are."""
PRE_NORM_NAMES = {
    "model.layers.*.input_layernorm.weight":          "blocks.*.attention_norm.weight",
    "model.layers.*.post_attention_layernorm.weight": "blocks.*.feed_forward_norm.weight",
}  # fmt: skip
POST_NORM_NAMES = {
    "model.layers.*.post_attention_layernorm.weight":   "blocks.*.attention_norm.weight",
    "model.layers.*.post_feedforward_layernorm.weight": "blocks.*.feed_forward_norm.weight",
}  # fmt: skip


@dataclass(frozen=True)
class StoredAs:
    """OLMo-core's tensor that holds a Hugging Face tensor."""

    name: str
    shape: Shape
    expert: Region | None = None
    """Region that is the Hugging Face tensor, if the tensor holds all experts."""
    transposed: bool = False
    """Whether the Hugging Face tensor is transposed in it."""


def stored_as(hf_name: str, shape: Shape, bridge: ModelBridge, dropless: bool) -> StoredAs:
    """Return OLMo-core's tensor that holds the Hugging Face tensor of this name and shape.

    Args:
        hf_name: name of the Hugging Face tensor.
        shape: its shape.
        bridge: the model.
        dropless: whether the experts are those of a mixture that drops no tokens.
    """
    pattern, index = split_numbers(hf_name)
    if pattern in EXPERT_NAMES:
        layer, expert = index
        transposed = not dropless or pattern in _TRANSPOSED_IF_DROPLESS
        rows, columns = shape[::-1] if transposed else shape
        region = Region(expert * rows, (expert + 1) * rows, 0, columns)
        whole = ((bridge.num_experts or 1) * rows, columns)
        return StoredAs(numbered(EXPERT_NAMES[pattern], (layer,)), whole, region, transposed)
    norm_names = PRE_NORM_NAMES if bridge.family == "olmoe" else POST_NORM_NAMES
    name = numbered((COMMON_NAMES | norm_names)[pattern], index)
    return StoredAs(name, (math.prod(shape),) if pattern == ROUTER else shape)
