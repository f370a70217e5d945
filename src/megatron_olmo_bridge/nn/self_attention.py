"""megatron-core's self attention, with what OLMo's families do to queries, keys and values."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.common.embeddings import YarnRotaryEmbedding
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.utils import is_layer_window_attention


class ClippedSelfAttention(SelfAttention):  # type: ignore[misc]
    """Queries, keys and values are clamped to ``config.clip_qkv``, after the QK norm if there is
    one, before rope. Source: ``OlmoAttention`` and ``OlmoeAttention`` of transformers."""

    def get_query_key_value_tensors(self, *args: Any, **kwargs: Any) -> Any:
        found = super().get_query_key_value_tensors(*args, **kwargs)
        limit = self.config.clip_qkv
        return found if limit is None else tuple(x.clamp(-limit, limit) for x in found)


class RopePerLayerTypeSelfAttention(SelfAttention):  # type: ignore[misc]
    """Layers with a window have the model's rope, those without one of their own: OLMo-3's.

    ``config.full_attention_rope`` has the numbers of that one, which is YaRN's; None for the
    model's own. YaRN's attention factor, which transformers applies to sines and cosines, is
    applied to queries and keys: rotations are linear.
    """

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self.rope: YarnRotaryEmbedding | None = None
        rope = config.full_attention_rope
        if rope is not None and not is_layer_window_attention(
            config.window_size, config.window_attn_skip_freq, self.layer_number
        ):
            self.attention_factor: float = rope["attention_factor"]
            self.rope = YarnRotaryEmbedding(
                config.kv_channels,
                rotary_base=rope["rotary_base"],
                scaling_factor=rope["scaling_factor"],
                original_max_position_embeddings=rope["original_max_position_embeddings"],
                beta_fast=rope["beta_fast"],
                beta_slow=rope["beta_slow"],
                use_cpu_initialization=config.use_cpu_initialization,
            )

    def forward(self, *args: Any, rotary_pos_emb: torch.Tensor | None = None, **kwargs: Any) -> Any:
        """As SelfAttention's. The angles [s, 1, 1, kv_channels] come from the model."""
        if self.rope is not None and rotary_pos_emb is not None:
            rotary_pos_emb = self.rope.get_emb(rotary_pos_emb.shape[0])[0]
        return super().forward(*args, rotary_pos_emb=rotary_pos_emb, **kwargs)

    def get_query_key_value_tensors(self, *args: Any, **kwargs: Any) -> Any:
        query, key, *rest = super().get_query_key_value_tensors(*args, **kwargs)
        if self.rope is not None:
            query, key = query * self.attention_factor, key * self.attention_factor
        return query, key, *rest
