"""Which parameters are decayed: OLMo's choice, in megatron-core's terms."""

from __future__ import annotations

from megatron.core.optimizer.optimizer_config import ParamKey
from megatron.core.optimizer_param_scheduler import ParamGroupOverride


def olmo_weight_decay() -> dict[ParamKey, ParamGroupOverride]:
    """``config_overrides`` of ``get_megatron_optimizer``: decay everything but the embeddings.

    megatron-core's own choice is the other way round: it decays the embeddings and spares every
    vector, the norms' gains that is. Source: OLMo-core, ``src/scripts/official/OLMo2``, where
    AdamW has ``weight_decay=0.1`` and one ``OptimGroupOverride`` with ``weight_decay=0.0`` for
    ``embeddings.weight``.

    megatron-core applies the multiplier in ``OptimizerParamScheduler``: without one it has no
    effect, and everything is decayed.
    """
    # Tied to an output layer on another pipeline stage, that layer's copy is an embedding too.
    embeddings = ParamKey(name="*embedding.word_embeddings.weight", attr="shared_embedding")
    return {embeddings: ParamGroupOverride(wd_mult=0.0)}
