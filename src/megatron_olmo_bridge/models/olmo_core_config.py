"""Hugging Face's config of a model that OLMo-core trains.

Source: ``olmo_core/nn/transformer/config.py`` in versions 1.9, 2.x and 3.0 of ``ai2-olmo-core``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import Any

from megatron_olmo_bridge.errors import InputError, UnsupportedError

from .hf_values import MAX_LAYERS, HFValues, is_count, shown
from .olmo3.config import FULL, SLIDING


@dataclass(frozen=True)
class Block:
    """A type of OLMo-core's blocks that a family here has."""

    architecture: str
    model_type: str


BLOCKS = {
    "reordered_norm": Block("Olmo2ForCausalLM", "olmo2"),
    "moe": Block("OlmoeForCausalLM", "olmoe"),
    "moe_reordered_norm": Block("FlexOlmoForCausalLM", "flex_olmo"),
}
"""Model by ``TransformerBlockType``. With windows, ``reordered_norm`` is OLMo-3."""

_NO_EFFECT = {
    "_CLASS_", "type", "dtype", "init_method", "init_seed", "init_std", "embedding_init_std",
    "use_flash", "backend", "loss_implementation", "full_precision", "compile", "dp_config",
    "tp_config", "ac_config", "elementwise_affine", "use_recompute_qkv_prep",
    "mxfp8_save_qkv_for_backward", "capacity_factor", "lb_loss_granularity",
    "scale_loss_by_num_layers", "z_loss_weight",
}  # fmt: skip
"""Keys that only change rounding, speed, initialization or the loss in training."""
FORCED = ("force_full_attention_on_first_layer", "force_full_attention_on_last_layer")
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_OPTIONAL = ("n_kv_heads", "head_dim", "clip_qkv")
_EPS = 1e-5
"""Default eps of OLMo-core's norms: ``olmo_core/nn/layer_norm.py``."""


class Section(HFValues):
    """Section of the config of AI2's trainers, which notes the keys that are read."""

    def __init__(
        self, values: Any, name: str, /, no_effect: Set[str] = _NO_EFFECT, **defaults: Any
    ) -> None:
        if not isinstance(values, dict):
            raise InputError(f"{name} must be an object, not {shown(values)}")
        super().__init__(values, defaults, where=f" in {name}")
        self.name, self.values = name, values
        self._keys_read = set(no_effect)

    def get(self, key: str, default: Any = None) -> Any:
        self._keys_read.add(key)
        return super().get(key, default)

    def section(self, key: str, **defaults: Any) -> Section:
        return Section(self.get(key), f"{self.name}.{key}", **defaults)

    def expect(self, key: str, *accepted: Any) -> Any:
        """Return a value, which must be one of those that are converted."""
        if (value := self.get(key)) not in accepted:
            raise UnsupportedError(
                f"{self.name}.{key} is {shown(value)}, which can't be converted; supported: "
                f"{', '.join(map(shown, accepted))}"
            )
        return value

    def refuse_others(self, **harmless: Any) -> None:
        """Raise UnsupportedError for a key that is set but was not read.

        Args:
            harmless: by key, a value without effect. Null and false never have one.
        """
        for key, value in self.values.items():
            if key not in self._keys_read and value not in (None, False, harmless.get(key)):
                raise UnsupportedError(f"{self.name}.{key} is {shown(value)}: not converted")


def hf_config(config: Mapping[str, Any], sequence_length: int | None = None) -> dict[str, Any]:
    """Return ``config.json`` of the Hugging Face model that OLMo-core's config describes.

    Args:
        config: the ``config.json`` of an OLMo-core checkpoint. Its ``model`` is the config of the
            model, ``dataset.tokenizer`` has the ids of the special tokens, and
            ``train_module.max_sequence_length`` or ``dataset.sequence_length`` is the length that
            the model was trained with.
        sequence_length: the value of ``max_position_embeddings``, instead of that length.

    Raises:
        InputError: a value is absent or not of its type.
        UnsupportedError: a setting has no counterpart in the families of this package.
    """
    model = Section(config.get("model"), "model", name="default", tie_word_embeddings=False)
    layers = model.count("n_layers", MAX_LAYERS)
    block = model.section("block")
    kind = BLOCKS[block.expect("name", *BLOCKS)]
    # The section is called attention before version 3.0.
    key = "attention" if "attention" in block.values else "sequence_mixer"
    attention = block.section(key, name="default", **dict.fromkeys(_OPTIONAL))
    head = model.section("lm_head", name="default")
    windows = _windows(attention, layers)
    if windows and kind is not BLOCKS["reordered_norm"]:
        raise UnsupportedError(f"{attention.name}.sliding_window: {kind.model_type} has no windows")
    values = {
        "architectures": ["Olmo3ForCausalLM" if windows else kind.architecture],
        "model_type": "olmo3" if windows else kind.model_type,
        "vocab_size": model.count("vocab_size"),
        "hidden_size": model.count("d_model"),
        "num_hidden_layers": layers,
        "hidden_act": "silu",
        "attention_bias": False,
        "rms_norm_eps": _eps(
            block.section("layer_norm"), attention.section("qk_norm"), head.section("layer_norm")
        ),
        "max_position_embeddings": sequence_length or _sequence_length(config),
        "tie_word_embeddings": model.expect("tie_word_embeddings", False),
        **_heads(attention),
        **windows,
        **_rope(model, attention, windows.get("layer_types", [FULL] * layers)),
        **(_gated_mlp(block) if block.get("feed_forward_moe") is None else _experts(block)),
        **_special_tokens(config),
    }
    _refuse_other_settings(model, block, attention, head)
    return values


def is_dropless(config: Mapping[str, Any]) -> bool:
    """Return whether the model that :func:`hf_config` accepts is a mixture that drops no tokens."""
    moe = config["model"]["block"].get("feed_forward_moe") or {}
    return bool(moe.get("name") == "dropless")


def _refuse_other_settings(*sections: Section) -> None:
    """Refuse the settings of model, block, attention and head that were not read."""
    model, block, attention, head = sections
    model.expect("name", "default", "moe")
    model.refuse_others(embed_scale=1.0)
    block.refuse_others(dropout=0.0, attention_residual_alpha=1.0, feed_forward_residual_alpha=1.0)
    attention.expect("name", "default")
    attention.refuse_others(dropout=0.0)
    head.expect("name", "default")
    head.refuse_others()


def _eps(*norms: Section) -> float:
    """Return eps of these norms, which must be the same."""
    all_eps = set()
    for norm in norms:
        norm.expect("name", "rms", "fused_rms")
        all_eps.add(_EPS if norm.get("eps") is None else norm.number("eps"))
        norm.refuse_others()
    if len(all_eps) > 1:
        raise UnsupportedError(f"the norms of the model have different eps: {sorted(all_eps)}")
    return all_eps.pop()


def _heads(attention: Section) -> dict[str, Any]:
    heads = attention.count("n_heads")
    values: dict[str, Any] = {
        "num_attention_heads": heads,
        "num_key_value_heads": attention.optional_count("n_kv_heads") or heads,
        "head_dim": attention.optional_count("head_dim"),
        "clip_qkv": attention.optional_number("clip_qkv"),
    }
    return {key: value for key, value in values.items() if value is not None}


def _windows(attention: Section, layers: int) -> dict[str, Any]:
    """Return window and layer types, as ``SlidingWindowAttentionConfig`` decides for each layer."""
    if attention.get("sliding_window") is None:
        return {}
    section = attention.section("sliding_window", **dict.fromkeys(FORCED, True))
    first_is_full, last_is_full = map(section.flag, FORCED)
    pattern = section.get("pattern")
    section.refuse_others()
    if not (isinstance(pattern, list) and pattern and all(n == -1 or is_count(n) for n in pattern)):
        raise InputError(
            f"{section.name}.pattern must be a list of windows, -1 for none, not {shown(pattern)}"
        )
    sizes = [pattern[(layer - first_is_full) % len(pattern)] for layer in range(layers)]
    if first_is_full:
        sizes[0] = -1
    if last_is_full:
        sizes[-1] = -1
    windows = sorted({*sizes} - {-1})
    if len(windows) > 1:
        raise UnsupportedError(f"{section.name} has windows of several sizes: {windows}")
    if not windows:
        return {}
    types = [FULL if size == -1 else SLIDING for size in sizes]
    return {"sliding_window": windows[0], "layer_types": types}


def _rope(model: Section, attention: Section, layer_types: list[str]) -> dict[str, Any]:
    """Return theta, and YaRN of the layers without a window.

    A layer's block in ``block_overrides`` may differ from the other layers' only in this.
    """
    rope = attention.section("rope", name="default", theta=500_000)
    rope.expect("name", "default")
    values: dict[str, Any] = {"rope_theta": rope.number("theta")}
    scalings: dict[str, list[Any]] = {FULL: [], SLIDING: []}
    overrides, key = model.table("block_overrides"), attention.name.rpartition(".")[2]
    block = model.section("block")
    for layer, kind in enumerate(layer_types):
        own = block
        if str(layer) in overrides:
            own = Section(overrides[str(layer)], f"model.block_overrides.{layer}")
        own_rope = own.section(key).section("rope")
        if _without_scaling(own, key) != _without_scaling(block, key):
            raise UnsupportedError(f"{own.name} differs from model.block not only in rope.scaling")
        if own_rope.get("scaling") not in scalings[kind]:
            scalings[kind].append(own_rope.get("scaling"))
    if any(scalings[SLIDING]):
        raise UnsupportedError("model has YaRN in layers with a window; OLMo-3 has none there")
    if len(scalings[FULL]) > 1:
        raise UnsupportedError("model has different rope.scaling in layers of one kind")
    if any(scalings[FULL]):
        values["rope_scaling"] = _yarn(Section(scalings[FULL][0], f"{rope.name}.scaling"))
    rope.get("scaling")
    rope.refuse_others(partial_rotary_factor=1.0)
    return values


def _without_scaling(block: Section, attention_key: str) -> dict[str, Any]:
    attention = block.values[attention_key]
    rope = {**attention["rope"], "scaling": None}
    return {**block.values, attention_key: {**attention, "rope": rope}}


def _yarn(section: Section) -> dict[str, Any]:
    if not str(section.get("_CLASS_")).endswith(".YaRNRoPEScalingConfig"):
        raise UnsupportedError(
            f"{section.name} is {shown(section.get('_CLASS_'))}, which can't be converted; "
            "supported: YaRN"
        )
    factor = section.number("factor")
    values = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": section.count("old_context_len"),
        "beta_fast": section.number("beta_fast"),
        "beta_slow": section.number("beta_slow"),
        "attention_factor": attention_factor(factor),
    }
    section.refuse_others()
    return values


def _gated_mlp(block: Section) -> dict[str, Any]:
    mlp = block.section("feed_forward", name="default", activation="silu")
    mlp.expect("name", "default")
    mlp.expect("activation", "silu")
    values = {"intermediate_size": mlp.count("hidden_size")}
    mlp.refuse_others()
    return values


def _experts(block: Section) -> dict[str, Any]:
    moe = block.section("feed_forward_moe", name="default", lb_loss_weight=None)
    moe.expect("name", "default", "dropless")
    router = moe.section("router", name="default", top_k=1, gating_function="softmax")
    router.expect("name", "default")
    router.expect("gating_function", "softmax")
    values = {
        "intermediate_size": moe.count("hidden_size"),
        "num_experts": moe.count("num_experts"),
        "num_experts_per_tok": router.count("top_k"),
        "norm_topk_prob": router.expect("normalize_expert_weights", None, 1.0) is not None,
        "router_aux_loss_coef": moe.optional_number("lb_loss_weight") or 0.0,
    }
    router.refuse_others()
    moe.refuse_others()
    return values


def _sequence_length(config: Mapping[str, Any]) -> int:
    for name, key in (("train_module", "max_sequence_length"), ("dataset", "sequence_length")):
        section = config.get(name)
        if isinstance(section, dict) and section.get(key) is not None:
            return Section(section, name).count(key)
    raise InputError(
        "says neither train_module.max_sequence_length nor dataset.sequence_length, the length of "
        "the model's sequences: pass --hf-config with a folder that has the model's config.json"
    )


def _special_tokens(config: Mapping[str, Any]) -> dict[str, Any]:
    dataset = config.get("dataset")
    tokenizer = dataset.get("tokenizer") if isinstance(dataset, dict) else None
    defaults: dict[str, Any] = dict.fromkeys(TOKEN_IDS)
    section = Section(tokenizer or {}, "dataset.tokenizer", **defaults)
    return {key: section.optional_whole(key) for key in TOKEN_IDS}


def attention_factor(factor: float) -> float:
    """Return ``YaRNRoPEScalingConfig.get_attention_rescale_factor``."""
    return 0.1 * math.log(factor) + 1.0
