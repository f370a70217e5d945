"""Which parameters are decayed, in megatron-core's terms."""

from __future__ import annotations

from megatron.core.optimizer.optimizer_config import ParamKey
from megatron.core.optimizer_param_scheduler import ParamGroupOverride

Overrides = dict[ParamKey, ParamGroupOverride]


def olmo_weight_decay() -> Overrides:
    """``config_overrides`` of ``get_megatron_optimizer``: decay everything but the embeddings.

    megatron-core's own choice is the other way round: it decays the embeddings and spares every
    vector, the norms' gains that is. Source: OLMo-core, ``src/scripts/official/OLMo2``, where
    AdamW has ``weight_decay=0.1`` and one ``OptimGroupOverride`` with ``weight_decay=0.0`` for
    ``embeddings.weight``. OLMoE and OLMo 7B 0424 and 0724 decay the embeddings too
    (``decay_embeddings: true`` in allenai/OLMo's ``configs/official``): ``optimizer.decayed=all``.

    megatron-core applies the multiplier in ``OptimizerParamScheduler``: without one it has no
    effect, and everything is decayed.
    """
    # Tied to an output layer on another pipeline stage, that layer's copy is an embedding too.
    names = ("*embedding.word_embeddings.weight", "*embedding.position_embeddings.weight")
    embeddings = ParamKey(name=names, attr="shared_embedding")
    return {embeddings: ParamGroupOverride(wd_mult=0.0)}


def decay_overrides(decayed: str) -> Overrides | None:
    """``config_overrides`` for a value of ``optimizer.decayed``."""
    choices: dict[str, Overrides | None] = {
        "all_but_embeddings": olmo_weight_decay(),
        "matrices": None,  # megatron-core's default: vectors and biases are spared
        "all": {},
    }
    return choices[decayed]
