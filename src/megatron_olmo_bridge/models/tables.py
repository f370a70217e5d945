"""Rows of the mapping tables that several families share."""

from __future__ import annotations

from megatron_olmo_bridge.mapping.mappings import (
    DirectMapping,
    GatedMLPMapping,
    Mapping,
    QKVMapping,
)

from .config import DecoderConfig, MoEConfig

EMBEDDING = "embedding.word_embeddings.weight"
HF_HEAD, HF_SCORE = "lm_head.weight", "score.weight"


def embedding(c: DecoderConfig, padded_vocab_size: int | None) -> Mapping:
    """Map the embedding; rows beyond the vocabulary are zero padding."""
    return DirectMapping(
        megatron_param=EMBEDDING,
        hf_param="model.embed_tokens.weight",
        hf_shape=(c.vocab_size, c.hidden_size),
        padded_rows=padded_vocab_size,
    )


def attention(c: DecoderConfig, *, qk_norm: bool) -> list[Mapping]:
    """Map ``linear_qkv`` and ``linear_proj``, and the QK norm over the full projection width."""
    q_width, k_width = (n * c.kv_channels for n in (c.num_attention_heads, c.num_query_groups))
    norms: list[Mapping] = [
        DirectMapping(megatron_param="decoder.layers.*.self_attention.q_layernorm.weight",
                      hf_param="model.layers.*.self_attn.q_norm.weight", hf_shape=(q_width,)),
        DirectMapping(megatron_param="decoder.layers.*.self_attention.k_layernorm.weight",
                      hf_param="model.layers.*.self_attn.k_norm.weight", hf_shape=(k_width,)),
    ]  # fmt: skip
    return [
        QKVMapping(megatron_param="decoder.layers.*.self_attention.linear_qkv.weight",
                   q="model.layers.*.self_attn.q_proj.weight",
                   k="model.layers.*.self_attn.k_proj.weight",
                   v="model.layers.*.self_attn.v_proj.weight",
                   num_attention_heads=c.num_attention_heads, num_query_groups=c.num_query_groups,
                   kv_channels=c.kv_channels, hidden_size=c.hidden_size),
        *(norms if qk_norm else []),
        DirectMapping(megatron_param="decoder.layers.*.self_attention.linear_proj.weight",
                      hf_param="model.layers.*.self_attn.o_proj.weight",
                      hf_shape=(c.hidden_size, q_width)),
    ]  # fmt: skip


def gated_mlp(c: DecoderConfig) -> list[Mapping]:
    """Map a layer's gated MLP; ``linear_fc1`` stacks gate above up."""
    ffn, hidden = c.ffn_hidden_size, c.hidden_size
    return [
        GatedMLPMapping(megatron_param="decoder.layers.*.mlp.linear_fc1.weight",
                        gate="model.layers.*.mlp.gate_proj.weight",
                        up="model.layers.*.mlp.up_proj.weight",
                        ffn_hidden_size=ffn, hidden_size=hidden),
        DirectMapping(megatron_param="decoder.layers.*.mlp.linear_fc2.weight",
                      hf_param="model.layers.*.mlp.down_proj.weight", hf_shape=(hidden, ffn)),
    ]  # fmt: skip


def experts(c: MoEConfig) -> list[Mapping]:
    """Map the router and each expert's gated MLP."""
    ffn, hidden = c.ffn_hidden_size, c.hidden_size
    return [
        DirectMapping(megatron_param="decoder.layers.*.mlp.router.weight",
                      hf_param="model.layers.*.mlp.gate.weight",
                      hf_shape=(c.num_moe_experts, hidden)),
        GatedMLPMapping(megatron_param="decoder.layers.*.mlp.experts.experts.*.linear_fc1.weight",
                        gate="model.layers.*.mlp.experts.*.gate_proj.weight",
                        up="model.layers.*.mlp.experts.*.up_proj.weight",
                        ffn_hidden_size=ffn, hidden_size=hidden),
        DirectMapping(megatron_param="decoder.layers.*.mlp.experts.experts.*.linear_fc2.weight",
                      hf_param="model.layers.*.mlp.experts.*.down_proj.weight",
                      hf_shape=(hidden, ffn)),
    ]  # fmt: skip


def norm(c: DecoderConfig, *, megatron_param: str, hf_param: str) -> Mapping:
    """Map a norm's gain [hidden_size]."""
    return DirectMapping(
        megatron_param=megatron_param, hf_param=hf_param, hf_shape=(c.hidden_size,)
    )


def final_norm(c: DecoderConfig) -> Mapping:
    """Map the gain of the norm after the last layer."""
    return norm(c, megatron_param="decoder.final_layernorm.weight", hf_param="model.norm.weight")
