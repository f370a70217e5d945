"""Convert an OLMo-2 config to stock Megatron-LM's ``args`` and flags, and back.

``--use-checkpoint-args`` restores most of a model from the ``args`` in the checkpoint, but not all
of it, and older versions restore less. So every value goes into :func:`checkpoint_args`, and those
that some version doesn't restore into :func:`megatron_lm_flags` as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import gcd
from typing import Any

from megatron_olmo_bridge.errors import InputError, UnsupportedError, quote
from megatron_olmo_bridge.models.hf_values import MAX_HEADS, MAX_LAYERS, HFValues
from megatron_olmo_bridge.models.megatron_record import MegatronRecord
from megatron_olmo_bridge.models.olmo2.config import Olmo2Config
from megatron_olmo_bridge.models.record_check import DECODER_SETTINGS, differing

SPEC = ("megatron_olmo_bridge.models.olmo2.layer_specs", "OLMO2_LAYER_SPEC")
"""Module and name of the layer spec, as Megatron-LM's ``--spec`` takes them."""

WITHOUT_APEX = ("--no-gradient-accumulation-fusion", "--no-masked-softmax-fusion")
"""Flags that stock Megatron-LM also needs, for any model, where Apex isn't installed."""

WITHOUT_TRANSFORMER_ENGINE = ("--no-rope-fusion", "--no-persist-layer-norm")
"""Flags that stock Megatron-LM also needs where Transformer Engine isn't installed."""

_DTYPE_FLAGS = {"float32": [], "bfloat16": ["--bf16"], "float16": ["--fp16"]}


class Olmo2MegatronRecord(MegatronRecord):
    """Record of an OLMo-2 model, which stock Megatron-LM can build.

    It can't build a classifier: for that the config values are recorded, as for other families.
    """

    def args(self, padded_vocab_size: int, dtype: str) -> dict[str, Any]:
        if self.bridge.num_labels:
            return super().args(padded_vocab_size, dtype)
        config = self.bridge.config
        return checkpoint_args(config, padded_vocab_size=padded_vocab_size, dtype=dtype)

    def flags(self, padded_vocab_size: int, dtype: str) -> list[str]:
        if self.bridge.num_labels:
            return []
        config = self.bridge.config
        return megatron_lm_flags(config, padded_vocab_size=padded_vocab_size, dtype=dtype)

    @classmethod
    def hf_config(cls, record: Mapping[str, Any], vocab_size: int | None) -> dict[str, Any]:
        return config_from_args(record, vocab_size=vocab_size)


def checkpoint_args(config: Olmo2Config, *, padded_vocab_size: int, dtype: str) -> dict[str, Any]:
    """Return the values of a checkpoint's ``args`` Namespace.

    Args:
        padded_vocab_size: rows of the embedding in the checkpoint.
        dtype: of the checkpoint's weights, ``float32``, ``bfloat16`` or ``float16``.
    """
    _dtype_flags(dtype)
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
        # One name before and one after Megatron-LM took its flags from TransformerConfig.
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
        # There is neither an optimizer state nor a state of random numbers to load.
        "no_save_optim": True,
        "no_save_rng": True,
        # As saved without parallelism; the format loads into any layout.
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "consumed_train_samples": 0,
        "consumed_valid_samples": 0,
    }


def megatron_lm_flags(
    config: Olmo2Config,
    *,
    padded_vocab_size: int,
    dtype: str,
    tokenizer_model: str | None = None,
) -> list[str]:
    """Return the flags that stock Megatron-LM needs besides ``--load`` and the parallel layout.

    Args:
        padded_vocab_size: rows of the embedding in the checkpoint.
        dtype: to compute in, ``float32``, ``bfloat16`` or ``float16``.
        tokenizer_model: folder of a Hugging Face tokenizer. Without one, ``NullTokenizer``, which
            is enough for data that is tokenized already.
    """
    if padded_vocab_size < config.vocab_size:
        raise InputError(
            f"a padded vocabulary of {padded_vocab_size} rows cannot hold the model's "
            f"{config.vocab_size}"
        )
    flags = ["--use-checkpoint-args", "--ckpt-format", "torch_dist"]
    # No optimizer state to load: begin at iteration 0.
    flags += ["--finetune"]
    flags += ["--transformer-impl", "local", "--spec", *SPEC]
    # Not restored from args by any version.
    flags += ["--qk-layernorm", "--norm-epsilon", repr(config.layernorm_epsilon)]
    flags += ["--attention-softmax-in-fp32"]
    # Not restored from args by older versions, whose defaults are 10000 and 0.1.
    if config.rotary_base.is_integer():  # the flag takes whole numbers only
        flags += ["--rotary-base", str(int(config.rotary_base))]
    flags += ["--attention-dropout", "0.0", "--hidden-dropout", "0.0"]
    # Megatron-LM would save the padded size alone, and the way back needs the real one.
    flags += ["--vocab-size", str(config.vocab_size)]
    if tokenizer_model is None:
        flags += ["--tokenizer-type", "NullTokenizer"]
    else:
        flags += ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", tokenizer_model]
    return flags + _dtype_flags(dtype)


def config_from_args(args: Mapping[str, Any], *, vocab_size: int | None) -> dict[str, Any]:
    """Return a Hugging Face ``config.json`` for OLMo-2 from a checkpoint's model settings.

    Token ids aren't recorded in Megatron, so they are null: absent ones would get the defaults of
    transformers, which are another tokenizer's.

    Args:
        args: ``vars()`` of Megatron-LM's ``args``, or the ``model`` section of Megatron-Bridge's
            ``run_config.yaml``.
        vocab_size: rows of the Hugging Face embedding, where ``args`` don't say or are to be
            overruled.

    Raises:
        InputError: a value that the config needs is in ``args`` under none of its names.
        UnsupportedError: ``args`` are of a model that isn't OLMo-2.
    """
    _refuse_other_models(args)
    values = HFValues(args, {})
    hidden = values.count(_name(args, "hidden_size"))
    heads = values.count(_name(args, "num_attention_heads"), MAX_HEADS)
    head_dim = values.optional_count("kv_channels")
    tying = _name(
        args, "untie_embeddings_and_output_weights", "share_embeddings_and_output_weights"
    )
    tied = values.flag(tying) != tying.startswith("untie")
    config = {
        "architectures": ["Olmo2ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": None,
        "eos_token_id": None,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initializer_range": 0.02,
        "intermediate_size": values.count(_name(args, "ffn_hidden_size")),
        "max_position_embeddings": values.count(
            _name(args, "max_position_embeddings", "seq_length")
        ),
        "model_type": "olmo2",
        "num_attention_heads": heads,
        "num_hidden_layers": values.count(_name(args, "num_layers"), MAX_LAYERS),
        "num_key_value_heads": _query_groups(args) or heads,
        "pad_token_id": None,
        "rms_norm_eps": values.number(_name(args, "layernorm_epsilon", "norm_epsilon")),
        "rope_scaling": None,
        # This spelling is read by transformers 4 and 5; rope_parameters by 5 alone.
        "rope_theta": values.number(_name(args, "rotary_base")),
        "tie_word_embeddings": tied,
        "use_cache": True,
        "vocab_size": _vocab_size(args, vocab_size),
    }
    if head_dim and head_dim * heads != hidden:
        config["head_dim"] = head_dim
    if dtype := _dtype(args):
        config["torch_dtype"] = dtype
    Olmo2Config.from_hf(config)  # raises where the numbers don't fit together
    return config


def _dtype_flags(dtype: str) -> list[str]:
    if dtype not in _DTYPE_FLAGS:
        raise InputError(f"dtype {dtype!r}: expected one of {', '.join(_DTYPE_FLAGS)}")
    return _DTYPE_FLAGS[dtype]


def _name(args: Mapping[str, Any], *names: str) -> str:
    """Return the first of these names that is set."""
    for name in names:
        if args.get(name) is not None:
            return name
    raise InputError(f"the checkpoint's model settings lack {' or '.join(names)}")


def _query_groups(args: Mapping[str, Any]) -> int | None:
    """Return the number of key/value heads; None, as in TransformerConfig, means all heads."""
    # Megatron-LM records 1 group, its default, where grouped queries are off.
    if args.get("group_query_attention") is False:
        return None
    if args.get("group_query_attention"):
        _name(args, "num_query_groups")
    return HFValues(args, {}).optional_count("num_query_groups")


def _vocab_size(args: Mapping[str, Any], override: int | None) -> int:
    values = HFValues(args, {})
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
    """Return the dtype of the weights, or None: ``args`` may not state float32."""
    if args.get("bf16"):
        return "bfloat16"
    if args.get("fp16"):
        return "float16"
    return "float32" if "bf16" in args and "fp16" in args else None


_SETTINGS = (
    DECODER_SETTINGS
    | {"qk_layernorm": True}
    | dict.fromkeys(
        (
            "add_bias_linear",
            "add_qkv_bias",
            "attention_output_gate",
            "multi_latent_attention",
            "hybrid_layer_pattern",
            "hybrid_override_pattern",
            "mtp_num_layers",
        )
    )
)
"""Required values of settings that are recorded; None: must be absent, false, zero or null."""


def _refuse_other_models(args: Mapping[str, Any]) -> None:
    wrong = differing(args, _SETTINGS)
    # A function, or in YAML a reference to one.
    if args.get("activation_func") is not None and "silu" not in quote(args["activation_func"]):
        wrong["activation_func"] = args["activation_func"]
    if wrong:
        settings = ", ".join(f"{name}={quote(value)}" for name, value in wrong.items())
        raise UnsupportedError(f"the checkpoint's model settings are not OLMo-2's: {settings}")
