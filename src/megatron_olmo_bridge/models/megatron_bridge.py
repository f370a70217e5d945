"""Names and keywords of Megatron-Bridge that this package refuses, with what to use instead.

Source: ``AutoBridge`` and ``ModelProviderMixin`` of megatron-bridge 0.3.1. docs/megatron-bridge.md
lists every name.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from megatron_olmo_bridge.errors import UnsupportedError, nearest

NO_ADAPTERS = "adapters (LoRA) are not supported: train and export whole weights"

BRIDGE_NAMES = {
    "export_adapter_weights": NO_ADAPTERS,
    "save_hf_adapter": NO_ADAPTERS,
    "save_hf_weights": "use save_hf_pretrained, which writes config and tokenizer too",
    "save_hf_tokenizer": "use save_hf_pretrained, which writes the tokenizer too",
    "push_to_hub": "write a folder with save_hf_pretrained, then `hf upload OWNER/NAME FOLDER`; or "
    "`olmo-bridge export MEGATRON FOLDER --push-to-hub OWNER/NAME`",
    "get_conversion_tasks": "use AutoBridge.model_bridge.mapping_registry().resolve(), or "
    "`olmo-bridge inspect PATH --mapping`: a mapping here is data",
    "mla_transformer_config": "no OLMo model has multi-latent attention: use transformer_config",
    "hf_pretrained": "use bridge.hf_config for config.json; the weights are never a model of "
    "transformers here",
}
"""Names of ``AutoBridge``."""

PROVIDER_NAMES = {
    "register_post_wrap_hook": "call the function on what provide_distributed_model returns",
    "post_wrap_hook": "call the function on what provide_distributed_model returns",
    "pre_wrap_hook": "the hooks are in the list pre_wrap_hooks",
    "seq_length": "declare it in a subclass, for Megatron-Bridge's own training: see "
    "docs/megatron-bridge.md",
    "meta_model": "AutoBridge.model_bridge.mapping_registry().resolve() has every name and shape",
    "from_hf_pretrained": "use AutoBridge.from_hf_pretrained(PATH).to_megatron_provider()",
    "save_hf_pretrained": "use AutoBridge.save_hf_pretrained(model, PATH)",
}
"""Names of providers."""

LOADING = {
    "device_map": "weights are read straight into the live model, on its device",
    "attn_implementation": "set provider.backend",
    "allowed_mismatched_params": "every parameter must be in the checkpoint: nothing is skipped",
    "source_path": "the source's files are kept as they are, and no family has code of its own",
    "conversion_tasks": "tensors are streamed in the order of the checkpoint's files",
}
"""Keywords of ``AutoBridge``."""

BUILDING = {
    "use_megatron_fsdp": "FSDP is not supported: the distributed optimizer shards optimizer state",
    "use_torch_fsdp2": "FSDP is not supported: the distributed optimizer shards optimizer state",
    "overlap_param_gather_with_optimizer_step": "it is not supported: set overlap_param_gather of "
    "ddp_config",
    "init_model_with_meta_device": "set provider.initialize to False to skip initialization",
    "pre_wrap_hook": "use provider.register_pre_wrap_hook",
    "post_wrap_hook": "call it on what provide_distributed_model returns",
    "fp16": "set provider.params_dtype to torch.float16",
    "bf16": "set provider.params_dtype to torch.bfloat16",
    "use_cpu_initialization": "set provider.use_cpu_initialization",
}
"""Keywords of ``provide_distributed_model``."""

_IGNORED = frozenset(
    {
        "trust_remote_code",  # no code of a checkpoint is ever run, and no family needs any
        "show_progress",  # progress goes to reporter
        "strict",  # always
        "merge_adapter_weights",  # there are none
        "low_memory_save",  # a save never holds a second copy of the model
        "hf_tokenizer_kwargs",  # files are copied, no tokenizer is made
        "model_type",
        "data_parallel_random_init",  # ranks that hold the same parameters begin with the same
        "mixed_precision_wrapper",
        "pg_collection",
    }
)
"""Keywords that have no effect here: what they ask for is always so."""


def check_keywords(function: str, keywords: Mapping[str, Any], refused: Mapping[str, str]) -> None:
    """Accept keywords that have no effect here; refuse the rest and say what to do instead.

    Raises:
        UnsupportedError: A keyword is refused.
        TypeError: A keyword exists in neither package.
    """
    for name, value in keywords.items():
        if name in _IGNORED or (name in refused and not value):
            continue
        if name in refused:
            raise UnsupportedError(f"{function}: {name} is not taken here; {refused[name]}")
        raise TypeError(
            f"{function}() has no argument {name!r}{nearest(name, [*refused, *_IGNORED])}"
        )


def check_options(
    function: str, options: Collection[str], keywords: Mapping[str, Any], refused: Mapping[str, str]
) -> dict[str, Any]:
    """Return the keywords that are among the options; :func:`check_keywords` checks the others.

    Raises:
        UnsupportedError, TypeError: as :func:`check_keywords`.
    """
    others = {name: value for name, value in keywords.items() if name not in options}
    check_keywords(function, others, refused)
    return {name: value for name, value in keywords.items() if name in options}


class MissingNameError(UnsupportedError, AttributeError):
    """A name of Megatron-Bridge that this package doesn't have; ``hasattr`` is False for it."""


def missing_name(owner: str, name: str, refused: Mapping[str, str]) -> AttributeError:
    """Return the error for an attribute that doesn't exist."""
    if name in refused:
        return MissingNameError(f"{owner}.{name} of Megatron-Bridge is not here; {refused[name]}")
    return AttributeError(f"{owner} has no attribute {name!r}")
