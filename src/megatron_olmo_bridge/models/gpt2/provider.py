"""Build GPT-2 in megatron-core."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from megatron.core.transformer import ModuleSpec
from torch.nn.functional import gelu

from megatron_olmo_bridge.models.layer_specs import decoder_layer
from megatron_olmo_bridge.models.provider import GPTModelProvider

gelu_new = partial(gelu, approximate="tanh")


@dataclass
class GPT2ModelProvider(GPTModelProvider):
    """Provider of GPT-2."""

    normalization: str = "LayerNorm"
    layernorm_epsilon: float = 1e-5
    position_embedding_type: str = "learned_absolute"
    share_embeddings_and_output_weights: bool = True
    activation: str = "gelu_new"
    """Activation of the MLP: ``gelu_new`` (by tanh) or ``gelu`` (exact)."""

    def __post_init__(self) -> None:
        self.activation_func = gelu_new if self.activation == "gelu_new" else gelu
        super().__post_init__()

    def layer_spec(self) -> ModuleSpec:
        return decoder_layer(
            self.modules,
            pre_norm=self.modules.layer_norm,
            row_parallel_linear=self.modules.row_parallel_linear,
        )

    def final_norm(self) -> Any:
        return self.modules.layer_norm
