"""Build FlexOlmo in megatron-core."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from megatron.core.transformer import ModuleSpec

from megatron_olmo_bridge.models.layer_specs import decoder_layer, mixture_of_experts
from megatron_olmo_bridge.models.provider import MoEProvider
from megatron_olmo_bridge.nn.post_norm_moe import PostNormMoELayer


@dataclass
class FlexOlmoModelProvider(MoEProvider):
    """Provider of FlexOlmo."""

    layernorm_epsilon: float = 1e-6
    rotary_base: float = 500000.0

    def layer_spec(self) -> ModuleSpec:
        experts = mixture_of_experts(self.modules, self)
        # A ModuleSpec in megatron-core 0.16.1, a partial in 0.19.
        spec = experts.keywords if isinstance(experts, partial) else vars(experts)
        return decoder_layer(
            self.modules,
            row_parallel_linear=self.modules.row_parallel_linear_post_norm,
            qk_norm=True,
            mlp=ModuleSpec(
                module=PostNormMoELayer,
                params={"norm": self.modules.norm},
                submodules=spec["submodules"],
            ),
        )
