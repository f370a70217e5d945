"""megatron-core's self attention with OLMo's changes to queries, keys and values."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.common.embeddings import YarnRotaryEmbedding
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.utils import is_layer_window_attention


class ClippedSelfAttention(SelfAttention):  # type: ignore[misc]
    """Self attention that clamps queries, keys and values to ``config.clip_qkv``, after any QK norm
    and before rope. Source: ``OlmoAttention`` and ``OlmoeAttention`` of transformers."""

    def get_query_key_value_tensors(self, *args: Any, **kwargs: Any) -> Any:
        qkv = super().get_query_key_value_tensors(*args, **kwargs)
        limit = self.config.clip_qkv
        return qkv if limit is None else tuple(x.clamp(-limit, limit) for x in qkv)


class RopePerLayerTypeSelfAttention(SelfAttention):  # type: ignore[misc]
    """Self attention of OLMo-3: layers without a window have a rope of their own.

    ``config.full_attention_rope`` has the YaRN parameters of that rope; None uses
    the model's rope in every layer. YaRN's attention factor, which transformers applies to sines
    and cosines, is applied to queries and keys: rotations are linear.
    """

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self.rope: YarnRotaryEmbedding | None = None
        if config.full_attention_rope is not None and not is_layer_window_attention(
            config.window_size, config.window_attn_skip_freq, self.layer_number
        ):
            rope = dict(config.full_attention_rope)
            self.attention_factor: float = rope.pop("attention_factor")
            self.rope = YarnRotaryEmbedding(
                config.kv_channels, **rope, use_cpu_initialization=config.use_cpu_initialization
            )

    def forward(self, *args: Any, rotary_pos_emb: torch.Tensor | None = None, **kwargs: Any) -> Any:
        """Run SelfAttention with this layer's angles instead of the model's, [s, 1, 1, width]."""
        if self.rope is not None and rotary_pos_emb is not None:
            rotary_pos_emb = self.rope.get_emb(rotary_pos_emb.shape[0])[0]
        return super().forward(*args, rotary_pos_emb=rotary_pos_emb, **kwargs)

    def get_query_key_value_tensors(self, *args: Any, **kwargs: Any) -> Any:
        query, key, *rest = super().get_query_key_value_tensors(*args, **kwargs)
        if self.rope is not None:
            query, key = query * self.attention_factor, key * self.attention_factor
        return query, key, *rest
