"""OLMo-2's layer, ``x + norm(f(x))`` with no norm before f, made of megatron-core's modules."""

from __future__ import annotations

from megatron.core.transformer import ModuleSpec, TransformerConfig

from megatron_olmo_bridge.errors import InputError
from megatron_olmo_bridge.models.layer_specs import decoder_layer
from megatron_olmo_bridge.nn.backends import AUTO, backend_named


def olmo2_layer_spec(config: TransformerConfig | None = None, backend: str = AUTO) -> ModuleSpec:
    """Return the spec of one layer.

    Args:
        config: config of the model, which must ask for the QK norm; None skips the check.
        backend: ``transformer_engine``, ``local``, or ``auto``: Transformer Engine where it is
            installed and there is CUDA, else local.

    Raises:
        InputError: the backend is unknown, or Transformer Engine isn't there; or the config is not
            one of OLMo-2's.
    """
    if config is not None and not config.qk_layernorm:
        raise InputError("OLMo-2 normalises queries and keys: the config must set qk_layernorm")
    modules = backend_named(backend)
    post_norm = modules.row_parallel_linear_post_norm
    return decoder_layer(modules, row_parallel_linear=post_norm, qk_norm=True)


OLMO2_LAYER_SPEC: ModuleSpec = olmo2_layer_spec()
"""For Megatron-LM's ``--spec``, which looks a name up in the module and doesn't call it."""
