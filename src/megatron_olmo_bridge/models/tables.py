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
    """A row for each token, and zeros below up to the padded size."""
    return DirectMapping(
        EMBEDDING, "model.embed_tokens.weight", (c.vocab_size, c.hidden_size), padded_vocab_size
    )


def attention(c: DecoderConfig, *, qk_norm: bool) -> list[Mapping]:
    """``linear_qkv`` and ``linear_proj``; QK norm over the full width of the projections."""
    q_width, k_width = (n * c.kv_channels for n in (c.num_attention_heads, c.num_query_groups))
    norms: list[Mapping] = [
        DirectMapping(f"{ATTENTION}.q_layernorm.weight", f"{HF_ATTENTION}.q_norm.weight",
                      (q_width,)),
        DirectMapping(f"{ATTENTION}.k_layernorm.weight", f"{HF_ATTENTION}.k_norm.weight",
                      (k_width,)),
    ]  # fmt: skip
    return [
        QKVMapping(
            f"{ATTENTION}.linear_qkv.weight", f"{HF_ATTENTION}.q_proj.weight",
            f"{HF_ATTENTION}.k_proj.weight", f"{HF_ATTENTION}.v_proj.weight",
            c.num_attention_heads, c.num_query_groups, c.kv_channels, c.hidden_size,
        ),
        *(norms if qk_norm else []),
        DirectMapping(f"{ATTENTION}.linear_proj.weight", f"{HF_ATTENTION}.o_proj.weight",
                      (c.hidden_size, q_width)),
    ]  # fmt: skip


def gated_mlp(c: DecoderConfig, megatron: str = MLP, hf: str = HF_MLP) -> list[Mapping]:
    """``linear_fc1`` is gate over up; of the layer's MLP, or of each expert."""
    return [
        GatedMLPMapping(f"{megatron}.linear_fc1.weight", f"{hf}.gate_proj.weight",
                        f"{hf}.up_proj.weight", c.ffn_hidden_size, c.hidden_size),
        DirectMapping(f"{megatron}.linear_fc2.weight", f"{hf}.down_proj.weight",
                      (c.hidden_size, c.ffn_hidden_size)),
    ]  # fmt: skip


def experts(c: DecoderConfig, num_experts: int) -> list[Mapping]:
    """The router, and each expert's gated MLP."""
    shape = (num_experts, c.hidden_size)
    router = DirectMapping(f"{MLP}.router.weight", f"{HF_MLP}.gate.weight", shape)
    return [router, *gated_mlp(c, EXPERTS, HF_EXPERTS)]


def norm(c: DecoderConfig, megatron: str, hf: str) -> Mapping:
    """A norm's gain, [hidden_size]; what is before ``weight`` in the names."""
    return DirectMapping(f"{megatron}weight", f"{hf}weight", (c.hidden_size,))


def post_norm(c: DecoderConfig, megatron: str, hf: str) -> Mapping:
    """The gain of the norm after a row-parallel linear."""
    return norm(c, f"{megatron}.post_layernorm.", f"model.layers.*.{hf}.")
