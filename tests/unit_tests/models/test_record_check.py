"""A config.json against what Megatron recorded of the model: what contradicts, and what doesn't."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import yaml

from megatron_olmo_bridge.models.bridge import ModelBridge
from megatron_olmo_bridge.models.families import bridge_for, published_sizes
from megatron_olmo_bridge.models.record_check import contradictions

TINY = [name for name in published_sizes() if name.endswith("-tiny")]
NO_TENSORS: dict[str, Any] = {}


def bridge(size: str, **changes: Any) -> ModelBridge:
    return bridge_for(published_sizes()[size].sizes[size] | changes, "config.json")


def records(of: ModelBridge) -> dict[str, dict[str, Any]]:
    """What this package records of a model, as it is read again."""
    run_config = yaml.safe_load(yaml.safe_dump(of.run_config_model(1152, "bfloat16")))
    return {"args": of.megatron_args(1152, "bfloat16"), "run_config.yaml": run_config}


def said(of: ModelBridge, record: dict[str, Any]) -> list[str]:
    return contradictions(of, record, NO_TENSORS)


@pytest.mark.parametrize("kind", ["args", "run_config.yaml"])
@pytest.mark.parametrize("size", TINY)
def test_the_record_of_a_model_agrees_with_its_config(size: str, kind: str) -> None:
    assert said(bridge(size), records(bridge(size))[kind]) == []


CHANGES: list[tuple[str, dict[str, Any], str]] = [
    ("olmo2-tiny", {"num_hidden_layers": 5}, "num_layers is 4 in the checkpoint, 5 in the config"),
    ("olmo2-tiny", {"num_attention_heads": 4}, "num_attention_heads is 8 in the checkpoint, 4 in"),
    ("olmo2-tiny", {"num_key_value_heads": 2}, "num_query_groups is 4 in the checkpoint, 2 in"),
    ("olmo2-tiny", {"num_key_value_heads": 8}, "num_query_groups is 4 in the checkpoint, 8 in"),
    ("olmo2-tiny", {"head_dim": 32}, "kv_channels is 16 in the checkpoint, 32 in"),
    ("olmo2-tiny", {"hidden_size": 256}, "hidden_size is 128 in the checkpoint, 256 in"),
    ("olmo2-tiny", {"intermediate_size": 256}, "ffn_hidden_size is 384 in the checkpoint, 256 in"),
    ("olmo2-tiny", {"rope_theta": 10000}, "rotary_base is 500000"),
    ("olmo2-tiny", {"rms_norm_eps": 1e-5}, "layernorm_epsilon is 1e-06 in the checkpoint, 1e-05 "),
    ("olmo2-tiny", {"vocab_size": 1000}, "vocab_size is 1024 in the checkpoint, 1000 in"),
    ("olmo2-tiny", {"tie_word_embeddings": True},
     "share_embeddings_and_output_weights is False in the checkpoint, True in"),
    ("olmo-tiny", {"clip_qkv": 8.0}, "clip_qkv is 0.4 in the checkpoint, 8.0 in"),
    ("olmo-tiny", {"clip_qkv": None}, "clip_qkv is 0.4 in the checkpoint, not set in"),
    ("olmo3-tiny", {"sliding_window": 32}, "window_size is (15, 0) in the checkpoint, (31, 0) in"),
    ("olmo3-tiny", {"layer_types": ["full_attention"] * 4},
     "window_size is (15, 0) in the checkpoint, not set in"),
    ("olmo3-tiny", {"layer_types": ["sliding_attention"] * 3 + ["full_attention"],
                    "rope_scaling": None}, "full_attention_rope is {"),
    ("olmoe-tiny", {"num_experts": 4}, "num_moe_experts is 8 in the checkpoint, 4 in"),
    ("olmoe-tiny", {"num_experts_per_tok": 2}, "moe_router_topk is 3 in the checkpoint, 2 in"),
    ("olmoe-tiny", {"norm_topk_prob": True}, "moe_router_pre_softmax is True in the checkpoint, F"),
    ("flex-olmo-tiny", {"intermediate_size": 48}, "ffn_hidden_size is 96 in the checkpoint, 48 in"),
    ("gpt2-tiny", {"n_head": 4}, "num_attention_heads is 8 in the checkpoint, 4 in"),
    ("gpt2-tiny", {"layer_norm_epsilon": 1e-6}, "layernorm_epsilon is 1e-05 in the checkpoint, 1e"),
    ("gpt2-tiny", {"activation_function": "gelu"}, "activation is 'gelu_new' in the checkpoint, '"),
]  # fmt: skip


@pytest.mark.parametrize("kind", ["args", "run_config.yaml"])
@pytest.mark.parametrize(("size", "change", "line"), CHANGES)
def test_each_config_value_of_another_model_contradicts(
    size: str, change: dict[str, Any], line: str, kind: str
) -> None:
    found = said(bridge(size, **change), records(bridge(size))[kind])
    assert [x for x in found if x.startswith(line)], found


def test_null_means_none_in_names_that_only_this_package_records() -> None:
    unclipped = records(bridge("olmo-tiny", clip_qkv=None))["run_config.yaml"]
    assert said(bridge("olmo-tiny"), unclipped) == [
        "clip_qkv is null in the checkpoint, 0.4 in the config"
    ]


@pytest.mark.parametrize("kind", ["args", "run_config.yaml"])
def test_another_family_contradicts(kind: str) -> None:
    """OLMo-2 and OLMo-3 have the same tensors."""
    (line,) = [
        line
        for line in said(bridge("olmo3-tiny", vocab_size=1024), records(bridge("olmo2-tiny"))[kind])
        if "family" in line or "the config is of" in line
    ]
    assert line.endswith("in the checkpoint, the config is of olmo3")
    assert "megatron_olmo_bridge.models.olmo2." in line


# ------------------------------------------------------------------ what stock Megatron-LM records


def stock_args(**changes: Any) -> dict[str, Any]:
    """Args of olmo2-tiny as Megatron-LM has them after its own checks; others are its defaults."""
    return {
        "num_layers": 4,
        "hidden_size": 128,
        "ffn_hidden_size": 384,
        "num_attention_heads": 8,
        "group_query_attention": True,
        "num_query_groups": 4,
        "kv_channels": 16,
        "max_position_embeddings": 8192,
        "seq_length": 8192,
        "position_embedding_type": "rope",
        "rotary_base": 500000,
        "rotary_percent": 1.0,
        "rotary_interleaved": False,
        "rotary_seq_len_interpolation_factor": None,
        "use_rope_scaling": False,
        "rope_scaling_factor": 8.0,
        "swiglu": True,
        "squared_relu": False,
        "quick_geglu": False,
        "normalization": "RMSNorm",
        "norm_epsilon": 1e-6,
        "apply_layernorm_1p": False,
        "apply_residual_connection_post_layernorm": False,
        "qk_layernorm": True,
        "add_bias_linear": False,
        "add_qkv_bias": False,
        "softmax_scale": None,
        "untie_embeddings_and_output_weights": True,
        "vocab_size": None,
        "padded_vocab_size": 1024,
        "make_vocab_size_divisible_by": 128,
        "num_experts": None,
        "moe_router_topk": 2,
        "moe_router_pre_softmax": False,
        "moe_router_score_function": "softmax",
        "moe_ffn_hidden_size": None,
        "window_size": None,
        "window_attn_skip_freq": None,
        "no_rope_freq": None,
        "mtp_num_layers": None,
        "bf16": True,
        "fp16": False,
    } | changes


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"norm_epsilon": 1e-5, "layernorm_epsilon": 1e-6},  # one of the two was never used
        {"vocab_size": 1000},  # of the tokenizer; the model has the rows up to the padded size
        {"vocab_size": 1152, "should_pad_vocab": False},  # padded before
        {"kv_channels": None, "ffn_hidden_size": None},
        {"window_size": (-1, -1)},
        {"num_layers": Ellipsis},  # stands for a placeholder of what a pickle names
    ],
    ids=str,
)
def test_a_record_of_stock_megatron_lm_agrees(change: dict[str, Any]) -> None:
    assert said(bridge("olmo2-tiny"), stock_args(**change)) == []


def test_without_grouped_queries_the_recorded_number_of_groups_is_ignored() -> None:
    """Megatron-LM leaves 1 group there, TransformerConfig None."""
    multi_head, grouped = bridge("olmo2-tiny", num_key_value_heads=8), bridge("olmo2-tiny")
    for record in (
        stock_args(group_query_attention=False, num_query_groups=1),
        {"num_attention_heads": 8, "num_query_groups": None},
    ):
        assert said(multi_head, record) == []
        assert said(grouped, record) == ["num_query_groups is 8 in the checkpoint, 4 in the config"]
    assert said(grouped, {"num_attention_heads": 8}) == []


def test_a_record_without_a_vocabulary_size_fits_any_size() -> None:
    for rows in (1024, 1152):
        for size in (1000, 1024):
            record = stock_args(vocab_size=None, padded_vocab_size=rows)
            assert said(bridge("olmo2-tiny", vocab_size=size), record) == []


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"num_attention_heads": 4}, "num_attention_heads is 4 in the checkpoint, 8 in the config"),
        ({"normalization": "LayerNorm"}, "normalization is 'LayerNorm' in the checkpoint, 'RMS"),
        ({"norm_epsilon": 1e-5}, "norm_epsilon is 1e-05 in the checkpoint, 1e-06 in the config"),
        ({"rotary_percent": 0.5}, "rotary_percent is 0.5 in the checkpoint, 1.0 in the config"),
        ({"rotary_interleaved": True}, "rotary_interleaved is True in the checkpoint, not set in"),
        ({"use_rope_scaling": True}, "use_rope_scaling is True in the checkpoint, not set in the"),
        ({"rotary_seq_len_interpolation_factor": 4}, "rotary_seq_len_interpolation_factor is 4 in"),
        ({"position_embedding_type": "none"}, "position_embedding_type is 'none' in the "),
        ({"apply_layernorm_1p": True}, "apply_layernorm_1p is True in the checkpoint, not set in"),
        ({"window_size": (127, 0)}, "window_size is (127, 0) in the checkpoint, not set in the"),
        ({"swiglu": False}, "swiglu is False in the checkpoint, True in the config"),
        ({"num_experts": 8}, "num_experts is 8 in the checkpoint, not set in the config"),
        ({"untie_embeddings_and_output_weights": False},
         "share_embeddings_and_output_weights is True in the checkpoint, False in the config"),
        ({"softmax_scale": 0.5}, "softmax_scale is 0.5 in the checkpoint, not set in the config"),
    ],
)  # fmt: skip
def test_a_record_of_stock_megatron_lm_contradicts_another_model(
    change: dict[str, Any], line: str
) -> None:
    found = said(bridge("olmo2-tiny"), stock_args(**change))
    assert len(found) == 1
    assert found[0].startswith(line)


def test_defaults_that_were_never_used_are_not_compared() -> None:
    """If other code built the model, Megatron-LM's args have only the sizes."""
    untouched = stock_args(
        position_embedding_type="learned_absolute",
        rotary_base=10000,
        swiglu=False,
        normalization="LayerNorm",
        norm_epsilon=1e-5,
        untie_embeddings_and_output_weights=False,
        group_query_attention=False,
        num_query_groups=1,
        qk_layernorm=False,
        add_bias_linear=True,
    )
    multi_head = {"num_key_value_heads": 8}
    assert said(bridge("olmo2-tiny", **multi_head), untouched) == []
    wrong = bridge("olmo2-tiny", num_attention_heads=4, num_key_value_heads=4)
    assert [line.partition(" ")[0] for line in said(wrong, untouched)] == [
        "num_attention_heads",
        "num_query_groups",
        "kv_channels",
    ]
    # With an embedding of positions they are what built the model.
    tensors = {"embedding.position_embeddings.weight": None}
    assert len(contradictions(bridge("olmo2-tiny"), untouched, tensors)) > 3


def test_gpt2_has_no_theta() -> None:
    record = stock_args(
        position_embedding_type="learned_absolute",
        rotary_base=10000,
        swiglu=False,
        normalization="LayerNorm",
        norm_epsilon=1e-5,
        untie_embeddings_and_output_weights=False,
        group_query_attention=False,
        num_query_groups=1,
        ffn_hidden_size=512,
        add_bias_linear=True,
    )
    assert said(bridge("gpt2-tiny"), record) == []
    assert said(bridge("gpt2-tiny"), record | {"normalization": "RMSNorm"}) == [
        "normalization is 'RMSNorm' in the checkpoint, 'LayerNorm' in the config"
    ]


def test_experts_width_and_number_by_megatron_lms_names() -> None:
    record = stock_args(
        num_layers=2,
        num_experts=8,
        moe_router_topk=3,
        moe_router_pre_softmax=True,
        moe_ffn_hidden_size=96,
        ffn_hidden_size=512,
        norm_epsilon=1e-5,
        rotary_base=10000,
    )
    assert said(bridge("olmoe-tiny"), record) == []
    assert said(bridge("olmoe-tiny"), record | {"moe_router_score_function": "sigmoid"}) == [
        "moe_router_score_function is 'sigmoid' in the checkpoint, 'softmax' in the config"
    ]


@pytest.mark.parametrize("pattern", [4, [1, 1, 1, 0]])
def test_windows_by_frequency_or_layer_by_layer(pattern: Any) -> None:
    record = stock_args(window_size=[15, 0], window_attn_skip_freq=pattern)
    assert said(bridge("olmo3-tiny"), record) == []
    assert said(bridge("olmo3-tiny"), record | {"window_attn_skip_freq": [1, 0, 1, 0]}) == [
        "window_attn_skip_freq is [1, 0, 1, 0] in the checkpoint, 4 in the config"
    ]


def test_the_defaults_of_the_installed_megatron_lm_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own parser's values, with the flags that this package prints for the model."""
    arguments = pytest.importorskip("megatron.training.arguments")
    model = bridge("olmo2-tiny")
    flags = model.megatron_lm_flags("bfloat16")
    monkeypatch.setattr(sys, "argv", ["pretrain_gpt.py", *flags])
    defaults = vars(arguments.parse_args())
    restored = {n: v for n, v in records(model)["args"].items() if n in defaults}
    assert said(model, defaults | restored) == []


def test_a_classifiers_padding_token() -> None:
    labels = {"architectures": ["Olmo2ForSequenceClassification"], "num_labels": 3}
    model = bridge("olmo2-tiny", **labels, pad_token_id=5)
    for record in records(model).values():
        assert said(model, record) == []
    assert said(bridge("olmo2-tiny", **labels, pad_token_id=7), records(model)["args"]) == [
        "pad_token_id is 5 in the checkpoint, 7 in the config"
    ]
