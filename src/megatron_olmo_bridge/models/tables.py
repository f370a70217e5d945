"""Rows of the mapping tables that several families share."""

from __future__ import annotations

from megatron_olmo_bridge.mapping.mappings import (
    DirectMapping,
    GatedMLPMapping,
    Mapping,
    QKVMapping,
)

from .config import DecoderConfig

ATTENTION, MLP = "decoder.layers.*.self_attention", "decoder.layers.*.mlp"
EXPERTS = f"{MLP}.experts.experts.*"
HF_ATTENTION, HF_MLP = "model.layers.*.self_attn", "model.layers.*.mlp"
HF_EXPERTS = f"{HF_MLP}.experts.*"
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
        DirectMapping(
            megatron_param=f"{ATTENTION}.q_layernorm.weight",
            hf_param=f"{HF_ATTENTION}.q_norm.weight",
            hf_shape=(q_width,),
        ),
        DirectMapping(
            megatron_param=f"{ATTENTION}.k_layernorm.weight",
            hf_param=f"{HF_ATTENTION}.k_norm.weight",
            hf_shape=(k_width,),
        ),
    ]
    return [
        QKVMapping(
            megatron_param=f"{ATTENTION}.linear_qkv.weight",
            q=f"{HF_ATTENTION}.q_proj.weight",
            k=f"{HF_ATTENTION}.k_proj.weight",
            v=f"{HF_ATTENTION}.v_proj.weight",
            num_attention_heads=c.num_attention_heads,
            num_query_groups=c.num_query_groups,
            kv_channels=c.kv_channels,
            hidden_size=c.hidden_size,
        ),
        *(norms if qk_norm else []),
        DirectMapping(
            megatron_param=f"{ATTENTION}.linear_proj.weight",
            hf_param=f"{HF_ATTENTION}.o_proj.weight",
            hf_shape=(c.hidden_size, q_width),
        ),
    ]


def gated_mlp(c: DecoderConfig, megatron: str = MLP, hf: str = HF_MLP) -> list[Mapping]:
    """Map a gated MLP, of a layer or of each expert; ``linear_fc1`` stacks gate above up."""
    return [
        GatedMLPMapping(
            megatron_param=f"{megatron}.linear_fc1.weight",
            gate=f"{hf}.gate_proj.weight",
            up=f"{hf}.up_proj.weight",
            ffn_hidden_size=c.ffn_hidden_size,
            hidden_size=c.hidden_size,
        ),
        DirectMapping(
            megatron_param=f"{megatron}.linear_fc2.weight",
            hf_param=f"{hf}.down_proj.weight",
            hf_shape=(c.hidden_size, c.ffn_hidden_size),
        ),
    ]


def experts(c: DecoderConfig, num_experts: int) -> list[Mapping]:
    """Map the router and each expert's gated MLP."""
    router = DirectMapping(
        megatron_param=f"{MLP}.router.weight",
        hf_param=f"{HF_MLP}.gate.weight",
        hf_shape=(num_experts, c.hidden_size),
    )
    return [router, *gated_mlp(c, EXPERTS, HF_EXPERTS)]


def norm(c: DecoderConfig, megatron: str, hf: str) -> Mapping:
    """Map a norm's gain [hidden_size]; arguments are the names without ``weight``."""
    return DirectMapping(
        megatron_param=f"{megatron}weight", hf_param=f"{hf}weight", hf_shape=(c.hidden_size,)
    )


def post_norm(c: DecoderConfig, megatron: str, hf: str) -> Mapping:
    """Map the gain of the norm after a row-parallel linear."""
    return norm(c, f"{megatron}.post_layernorm.", f"model.layers.*.{hf}.")
