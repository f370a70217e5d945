"""Stock Megatron-LM's args and flags from OLMo-2's numbers, and a config.json from args."""

import sys
from argparse import Namespace
from dataclasses import replace
from typing import Any

import pytest

from megatron_olmo_bridge.errors import InputError, UnsupportedError
from megatron_olmo_bridge.models.olmo2 import megatron_lm
from megatron_olmo_bridge.models.olmo2.config import Olmo2Config
from megatron_olmo_bridge.models.olmo2.megatron_lm import (
    checkpoint_args,
    hf_config,
    megatron_lm_flags,
)

CONFIG = Olmo2Config(
    num_layers=3,
    hidden_size=64,
    ffn_hidden_size=160,
    num_attention_heads=8,
    num_query_groups=4,
    kv_channels=8,
    vocab_size=250,
    max_position_embeddings=4096,
    layernorm_epsilon=1e-6,
    rotary_base=500000.0,
)
MULTI_HEAD = replace(CONFIG, num_query_groups=8)
TIED = replace(CONFIG, share_embeddings_and_output_weights=True)
WIDE_HEADS = replace(CONFIG, kv_channels=16)

# The model section of a run_config.yaml, in TransformerConfig's words.
PROVIDER: dict[str, Any] = {
    "_target_": "megatron_olmo_bridge.models.olmo2.provider.Olmo2ModelProvider",
    "num_layers": 3,
    "hidden_size": 64,
    "ffn_hidden_size": 160,
    "num_attention_heads": 8,
    "num_query_groups": 4,
    "kv_channels": None,
    "vocab_size": 250,
    "seq_length": 4096,
    "layernorm_epsilon": 1e-6,
    "rotary_base": 500000,
    "share_embeddings_and_output_weights": False,
    "normalization": "RMSNorm",
    "gated_linear_unit": True,
    "activation_func": {"_target_": "torch.nn.functional.silu", "_call_": False},
    "window_size": None,
    "rope_scaling": False,
}


def args_of(config: Olmo2Config = CONFIG, dtype: str = "bfloat16") -> dict[str, Any]:
    return checkpoint_args(config, 256, dtype)


def flags_of(config: Olmo2Config = CONFIG, dtype: str = "bfloat16") -> list[str]:
    return megatron_lm_flags(config, dtype)


@pytest.mark.parametrize("config", [CONFIG, MULTI_HEAD, TIED, WIDE_HEADS])
def test_args_are_read_back_as_the_same_config(config: Olmo2Config) -> None:
    hf = hf_config(args_of(config))

    assert Olmo2Config.from_hf(hf) == config


def test_args_are_plain_values() -> None:
    def plain(value: Any) -> bool:
        if isinstance(value, list):
            return all(plain(item) for item in value)
        return value is None or type(value) in (str, int, float, bool)

    assert [name for name, value in args_of().items() if not plain(value)] == []


def test_the_layer_spec_is_where_args_say() -> None:
    pytest.importorskip("megatron.core")
    from megatron.core.transformer.spec_utils import ModuleSpec, import_module

    spec = import_module(tuple(args_of()["spec"]))

    assert isinstance(spec, ModuleSpec)


def test_args_state_that_there_are_only_weights() -> None:
    args = args_of()

    assert args["no_save_optim"] is True
    assert args["no_save_rng"] is True


def test_rotary_base_is_a_whole_number_if_possible() -> None:
    assert repr(args_of()["rotary_base"]) == "500000"
    odd = replace(CONFIG, rotary_base=10000.5)
    assert args_of(odd)["rotary_base"] == 10000.5
    assert "--rotary-base" not in flags_of(odd)


def test_refuses_an_unknown_dtype() -> None:
    with pytest.raises(InputError, match="'int8'"):
        args_of(dtype="int8")


def test_flags_have_what_no_version_restores() -> None:
    flags = flags_of()

    assert "--qk-layernorm" in flags
    assert flags[flags.index("--norm-epsilon") + 1] == "1e-06"
    assert flags[flags.index("--vocab-size") + 1] == "250"


@pytest.mark.parametrize(
    ("dtype", "flag"), [("float32", None), ("bfloat16", "--bf16"), ("float16", "--fp16")]
)
def test_flags_have_the_dtype(dtype: str, flag: str | None) -> None:
    assert {"--bf16", "--fp16"} & set(flags_of(dtype=dtype)) == ({flag} if flag else set())


def test_flags_leave_the_layout_to_the_user() -> None:
    assert not [flag for flag in flags_of() if "parallel" in flag]


def test_stock_megatron_lm_knows_every_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = pytest.importorskip("megatron.training.arguments")
    without_apex = ["--no-gradient-accumulation-fusion", "--no-masked-softmax-fusion"]
    without_te = ["--no-rope-fusion", "--no-persist-layer-norm"]
    monkeypatch.setattr(sys, "argv", ["pretrain_gpt.py", *flags_of(), *without_apex, *without_te])

    args = arguments.parse_args()

    assert args.use_checkpoint_args and args.finetune and args.bf16 and args.qk_layernorm
    assert args.layernorm_epsilon == 1e-6
    assert args.spec == list(megatron_lm.SPEC)
    assert args.rotary_base == 500000
    assert args.attention_dropout == args.hidden_dropout == 0.0
    assert not args.gradient_accumulation_fusion and not args.masked_softmax_fusion
    assert not args.apply_rope_fusion and args.no_persist_layer_norm


def test_back_from_what_stock_megatron_lm_would_save(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = pytest.importorskip("megatron.training.arguments")
    monkeypatch.setattr(sys, "argv", ["pretrain_gpt.py", *flags_of()])
    saved = vars(arguments.parse_args())
    saved.update({name: args_of()[name] for name in args_of() if name in saved})

    assert Olmo2Config.from_hf(hf_config(saved)) == CONFIG


def test_config_json_of_a_checkpoint() -> None:
    assert hf_config(args_of()) == {
        "architectures": ["Olmo2ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": None,
        "eos_token_id": None,
        "hidden_act": "silu",
        "hidden_size": 64,
        "initializer_range": 0.02,
        "intermediate_size": 160,
        "max_position_embeddings": 4096,
        "model_type": "olmo2",
        "num_attention_heads": 8,
        "num_hidden_layers": 3,
        "num_key_value_heads": 4,
        "pad_token_id": None,
        "rms_norm_eps": 1e-6,
        "rope_scaling": None,
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": 250,
    }


def test_back_from_a_run_config() -> None:
    hf = hf_config(PROVIDER)

    assert Olmo2Config.from_hf(hf) == CONFIG
    assert "torch_dtype" not in hf  # it says nothing of the dtype


def test_transformers_reads_the_config() -> None:
    transformers = pytest.importorskip("transformers")
    hf = hf_config(args_of(WIDE_HEADS, "float32"))

    read = transformers.Olmo2Config.from_dict(hf)

    rope = getattr(read, "rope_parameters", None) or {"rope_theta": read.rope_theta}
    assert rope["rope_theta"] == 500000.0
    assert read.head_dim == 16
    assert read.pad_token_id is None and read.eos_token_id is None


def test_one_group_is_ignored_without_grouped_queries() -> None:
    args = args_of() | {"group_query_attention": False, "num_query_groups": 1}
    assert hf_config(args)["num_key_value_heads"] == 8
    args = args_of() | {"group_query_attention": True, "num_query_groups": 1}
    assert hf_config(args)["num_key_value_heads"] == 1


@pytest.mark.parametrize("name", ["norm_epsilon", "layernorm_epsilon"])
def test_epsilon_is_read_by_either_name(name: str) -> None:
    both = {"norm_epsilon", "layernorm_epsilon"}
    args = {key: value for key, value in args_of().items() if key not in both - {name}}

    assert hf_config(args)["rms_norm_eps"] == 1e-6


def test_vocab_size_is_not_guessed_from_the_padded_one() -> None:
    args = args_of() | {"vocab_size": None}
    with pytest.raises(InputError, match=r"256 rows .*pass --vocab-size N"):
        hf_config(args)
    assert hf_config(args, vocab_size=250)["vocab_size"] == 250
    with pytest.raises(InputError, match="257 is larger than the checkpoint's 256"):
        hf_config(args, vocab_size=257)


def test_a_stated_vocab_size_takes_precedence() -> None:
    assert hf_config(args_of(), vocab_size=240)["vocab_size"] == 240


@pytest.mark.parametrize(
    ("absent", "words"),
    [
        (["num_layers"], "num_layers"),
        (["hidden_size"], "hidden_size"),
        (["ffn_hidden_size"], "ffn_hidden_size"),
        (["num_attention_heads"], "num_attention_heads"),
        (["num_query_groups"], "num_query_groups"),
        (["max_position_embeddings", "seq_length"], "max_position_embeddings or seq_length"),
        (["norm_epsilon", "layernorm_epsilon"], "layernorm_epsilon or norm_epsilon"),
        (["rotary_base"], "rotary_base"),
        (["untie_embeddings_and_output_weights"],
         "untie_embeddings_and_output_weights or share_embeddings_and_output_weights"),
    ],
)  # fmt: skip
def test_a_missing_setting_is_named(absent: list[str], words: str) -> None:
    args = {name: value for name, value in args_of().items() if name not in absent}
    with pytest.raises(InputError, match=f"lack {words}$"):
        hf_config(args)


COUNTS = [0, -1, True, 8.0, "8", 10**15, float("nan"), [8]]
NUMBERS = [0, 0.0, -1e-6, True, "1e-6", float("nan"), float("inf"), 10**400, [1]]


@pytest.mark.parametrize("source", [PROVIDER, None], ids=["run_config", "args"])
@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("num_layers", [*COUNTS, 100_001]),
        ("hidden_size", COUNTS),
        ("ffn_hidden_size", COUNTS),
        ("num_attention_heads", [*COUNTS, 4097]),
        ("num_query_groups", COUNTS),
        ("kv_channels", COUNTS),
        ("vocab_size", COUNTS),
        ("max_position_embeddings", COUNTS),
        ("layernorm_epsilon", NUMBERS),
        ("rotary_base", NUMBERS),
    ],
)
def test_a_number_of_another_type_or_range_is_never_replaced(
    source: dict[str, Any] | None, name: str, values: list[Any]
) -> None:
    args = args_of() | {"group_query_attention": True} if source is None else source
    for value in values:
        with pytest.raises(InputError, match=f"{name} must be "):
            hf_config(args | {name: value})


@pytest.mark.parametrize(
    "name", ["untie_embeddings_and_output_weights", "share_embeddings_and_output_weights"]
)
@pytest.mark.parametrize("value", ["false", 0, 1.0])
def test_a_flag_of_another_type_is_refused(name: str, value: Any) -> None:
    args = {n: v for n, v in args_of().items() if not n.endswith("embeddings_and_output_weights")}
    with pytest.raises(InputError, match=f"{name} must be true or false"):
        hf_config(args | {name: value})


def test_refuses_numbers_that_do_not_fit_together() -> None:
    with pytest.raises(InputError, match="3 key/value heads"):
        hf_config(args_of() | {"num_query_groups": 3})


@pytest.mark.parametrize(
    "change",
    [
        {"normalization": "LayerNorm"},
        {"add_bias_linear": True},
        {"add_qkv_bias": True},
        {"swiglu": False},
        {"gated_linear_unit": False},
        {"qk_layernorm": False},
        {"position_embedding_type": "learned_absolute"},
        {"rotary_percent": 0.5},
        {"rotary_interleaved": True},
        {"use_rope_scaling": True},
        {"rotary_seq_len_interpolation_factor": 2},
        {"num_experts": 8},
        {"window_size": [4095, 0]},
        {"apply_layernorm_1p": True},
        {"activation_func": {"_target_": "torch.nn.functional.gelu", "_call_": False}},
        {"multi_latent_attention": True},
    ],
)
def test_settings_of_other_models_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedError, match=next(iter(change))):
        hf_config(args_of() | change)


def test_args_survive_a_namespace() -> None:
    assert vars(Namespace(**args_of())) == args_of()


def test_args_may_hold_values_that_contain_themselves() -> None:
    """A pickle of a few hundred bytes makes them; written out, they would never end."""
    pairs: Any = None
    for _ in range(60):
        pairs = (pairs, pairs)
    with pytest.raises(InputError, match="num_layers must be a positive whole number") as caught:
        hf_config({**args_of(), "num_layers": pairs})
    assert len(str(caught.value)) < 500
    with pytest.raises(UnsupportedError, match="activation_func=") as refused:
        hf_config({**args_of(), "activation_func": pairs})
    assert len(str(refused.value)) < 500
