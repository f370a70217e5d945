"""Convert an OLMo-2 config to stock Megatron-LM's ``args`` and flags, and back.

``--use-checkpoint-args`` restores most values of a model from the ``args`` in the checkpoint; older
versions restore fewer. So :func:`checkpoint_args` has every value, and :func:`megatron_lm_flags`
repeats those that some version doesn't restore.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import gcd
from typing import Any

from megatron_olmo_bridge.errors import InputError, UnsupportedError, quote
from megatron_olmo_bridge.models.config import DECODER_SETTINGS
from megatron_olmo_bridge.models.hf_values import MAX_HEADS, MAX_LAYERS, HFValues
from megatron_olmo_bridge.models.olmo2.config import Olmo2Config
from megatron_olmo_bridge.models.record_check import differing

SPEC = ("megatron_olmo_bridge.models.olmo2.layer_specs", "OLMO2_LAYER_SPEC")
"""Module and name of the layer spec, as Megatron-LM's ``--spec`` takes them."""

_DTYPE_FLAGS = {"float32": [], "bfloat16": ["--bf16"], "float16": ["--fp16"]}


def hf_config(record: Mapping[str, Any], vocab_size: int | None = None) -> dict[str, Any]:
    """Return a ``config.json``, see :meth:`.ModelBridge.hf_config_of_record`."""
    _refuse_other_models(record)
    values = HFValues(record, {})
    hidden = values.count(_name(record, "hidden_size"))
    heads = values.count(_name(record, "num_attention_heads"), MAX_HEADS)
    head_dim = values.optional_count("kv_channels")
    tying = _name(
        record, "untie_embeddings_and_output_weights", "share_embeddings_and_output_weights"
    )
    tied = values.flag(tying) != tying.startswith("untie")
    positions = _name(record, "max_position_embeddings", "seq_length")
    epsilon = _name(record, "layernorm_epsilon", "norm_epsilon")
    config = {
        "architectures": ["Olmo2ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        # Megatron doesn't record token ids. Without null, transformers' defaults would apply,
        # which belong to another tokenizer.
        "bos_token_id": None,
        "eos_token_id": None,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initializer_range": 0.02,
        "intermediate_size": values.count(_name(record, "ffn_hidden_size")),
        "max_position_embeddings": values.count(positions),
        "model_type": "olmo2",
        "num_attention_heads": heads,
        "num_hidden_layers": values.count(_name(record, "num_layers"), MAX_LAYERS),
        "num_key_value_heads": _query_groups(record, values) or heads,
        "pad_token_id": None,
        "rms_norm_eps": values.number(epsilon),
        "rope_scaling": None,
        # transformers 4 and 5 read this spelling; only 5 reads rope_parameters.
        "rope_theta": values.number(_name(record, "rotary_base")),
        "tie_word_embeddings": tied,
        "use_cache": True,
        "vocab_size": _vocab_size(values, vocab_size),
    }
    if head_dim and head_dim * heads != hidden:
        config["head_dim"] = head_dim
    if dtype := _dtype(record):
        config["torch_dtype"] = dtype
    Olmo2Config.from_hf(config)  # raises if the values don't fit together
    return config


def checkpoint_args(config: Olmo2Config, padded_vocab_size: int, dtype: str) -> dict[str, Any]:
    """Return the values of a checkpoint's ``args``, see :meth:`.ModelBridge.megatron_args`.

    Raises:
        InputError: The dtype, of a live model, is not one that is converted.
    """
    if dtype not in _DTYPE_FLAGS:
        raise InputError(f"dtype {dtype!r}: expected one of {', '.join(_DTYPE_FLAGS)}")
    base = config.rotary_base
    return {
        "num_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "ffn_hidden_size": config.ffn_hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "group_query_attention": config.num_query_groups != config.num_attention_heads,
        "num_query_groups": config.num_query_groups,
        "kv_channels": config.kv_channels,
        "seq_length": config.max_position_embeddings,
        "max_position_embeddings": config.max_position_embeddings,
        "position_embedding_type": "rope",
        "add_position_embedding": True,
        "rotary_base": int(base) if base.is_integer() else base,
        "rotary_percent": 1.0,
        "rotary_interleaved": False,
        "swiglu": True,
        "squared_relu": False,
        "normalization": "RMSNorm",
        # Megatron-LM's name before and after it took its flags from TransformerConfig.
        "norm_epsilon": config.layernorm_epsilon,
        "layernorm_epsilon": config.layernorm_epsilon,
        "apply_layernorm_1p": False,
        "qk_layernorm": True,
        "apply_query_key_layer_scaling": False,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "add_bias_linear": False,
        "add_qkv_bias": False,
        "untie_embeddings_and_output_weights": not config.share_embeddings_and_output_weights,
        "vocab_size": config.vocab_size,
        "padded_vocab_size": padded_vocab_size,
        "make_vocab_size_divisible_by": gcd(padded_vocab_size, 128),
        "spec": list(SPEC),
        "bf16": dtype == "bfloat16",
        "fp16": dtype == "float16",
        "ckpt_format": "torch_dist",
        # The checkpoint has neither optimizer nor random number generator state.
        "no_save_optim": True,
        "no_save_rng": True,
        # The format loads into any layout.
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "consumed_train_samples": 0,
        "consumed_valid_samples": 0,
    }


def megatron_lm_flags(config: Olmo2Config, dtype: str) -> list[str]:
    """Return the flags of stock Megatron-LM, see :meth:`.ModelBridge.megatron_lm_flags`."""
    flags = ["--use-checkpoint-args", "--ckpt-format", "torch_dist"]
    # Start at iteration 0, without loading optimizer state.
    flags += ["--finetune"]
    flags += ["--transformer-impl", "local", "--spec", *SPEC]
    # No version restores these from args.
    flags += ["--qk-layernorm", "--norm-epsilon", repr(config.layernorm_epsilon)]
    flags += ["--attention-softmax-in-fp32"]
    # Older versions don't restore these from args; their defaults are 10000 and 0.1.
    if config.rotary_base.is_integer():  # the flag takes whole numbers only
        flags += ["--rotary-base", str(int(config.rotary_base))]
    flags += ["--attention-dropout", "0.0", "--hidden-dropout", "0.0"]
    # Otherwise Megatron-LM saves the padded size only; export needs the real one.
    flags += ["--vocab-size", str(config.vocab_size)]
    # Enough for tokenized data.
    flags += ["--tokenizer-type", "NullTokenizer"]
    return flags + _DTYPE_FLAGS[dtype]


def _name(args: Mapping[str, Any], *names: str) -> str:
    """Return the first of these names that is set."""
    for name in names:
        if args.get(name) is not None:
            return name
    raise InputError(f"the checkpoint's model settings lack {' or '.join(names)}")


def _query_groups(args: Mapping[str, Any], values: HFValues) -> int | None:
    """Return the number of key/value heads; None means one for each attention head."""
    # Without grouped queries, Megatron-LM records its default, 1.
    if args.get("group_query_attention") is False:
        return None
    if args.get("group_query_attention"):
        _name(args, "num_query_groups")
    return values.optional_count("num_query_groups")


def _vocab_size(values: HFValues, override: int | None) -> int:
    size = override if override is not None else values.optional_count("vocab_size")
    padded = values.optional_count("padded_vocab_size")
    if size is None:
        rows = f" of {padded} rows" if padded else ""
        raise InputError(
            f"the checkpoint records a padded vocabulary{rows} but not the model's own; "
            "pass --vocab-size N with the rows of the Hugging Face embedding"
        )
    if padded and size > padded:
        raise InputError(f"a vocabulary of {size} is larger than the checkpoint's {padded} rows")
    return size


def _dtype(args: Mapping[str, Any]) -> str | None:
    """Return the dtype of the weights; None if ``args`` don't state it."""
    if args.get("bf16"):
        return "bfloat16"
    if args.get("fp16"):
        return "float16"
    return "float32" if "bf16" in args and "fp16" in args else None


_SETTINGS = DECODER_SETTINGS | {
    "qk_layernorm": True,
    "add_bias_linear": None,
    "add_qkv_bias": None,
    "attention_output_gate": None,
    "multi_latent_attention": None,
    "hybrid_layer_pattern": None,
    "hybrid_override_pattern": None,
    "mtp_num_layers": None,
}
"""Required values of the settings; None: the setting must be absent, false, zero or null."""


def _refuse_other_models(args: Mapping[str, Any]) -> None:
    wrong = differing(args, _SETTINGS)
    # The value is a function, or in YAML a reference to one.
    if args.get("activation_func") is not None and "silu" not in quote(args["activation_func"]):
        wrong["activation_func"] = args["activation_func"]
    if wrong:
        settings = ", ".join(f"{name}={quote(value)}" for name, value in wrong.items())
        raise UnsupportedError(f"the checkpoint's model settings are not OLMo-2's: {settings}")
