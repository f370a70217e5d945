"""Compare the model settings that Megatron recorded with a config.json.

A record is Megatron-LM's ``args`` or the ``model`` section of a run_config.yaml. It is seldom
complete, and some values are defaults that were never used: these are not compared.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Protocol

from megatron_olmo_bridge.errors import quote


class RecordedModel(Protocol):
    """Model that a record is compared with; every :class:`ModelBridge` is one."""

    family: ClassVar[str]
    provider_class: ClassVar[str]
    settings: ClassVar[dict[str, Any]]
    config: Any
    num_labels: int | None

    @property
    def config_values(self) -> dict[str, Any]: ...

    @property
    def vocab_size(self) -> int: ...


NEVER = dict.fromkeys(
    (
        "layernorm_zero_centered_gamma",
        "apply_residual_connection_post_layernorm",
        "rotary_interleaved",
        "use_rope_scaling",
        "rope_scaling",
        "seq_len_interpolation_factor",
        "no_rope_freq",
        "window_size",
        "softmax_scale",
        "qk_l2_norm",
        "squared_relu",
        "quick_geglu",
        "num_moe_experts",
        "moe_router_topk_scaling_factor",
    )
)
"""Settings that must be absent, false, zero or null, unless they are the family's config values."""
DECODER_SETTINGS: dict[str, Any] = NEVER | {
    "normalization": "RMSNorm",
    "position_embedding_type": "rope",
    "rotary_percent": 1.0,
    "gated_linear_unit": True,
    "moe_router_score_function": "softmax",
}
"""Settings that all models of the OLMo families share, and that no tensor shows."""

_SPELLINGS = {
    "layernorm_epsilon": ("layernorm_epsilon", "norm_epsilon"),
    "layernorm_zero_centered_gamma": ("layernorm_zero_centered_gamma", "apply_layernorm_1p"),
    "seq_len_interpolation_factor":
        ("seq_len_interpolation_factor", "rotary_seq_len_interpolation_factor"),
    "gated_linear_unit": ("gated_linear_unit", "swiglu"),
    "num_moe_experts": ("num_moe_experts", "num_experts"),
}  # fmt: skip
"""Names of one setting: TransformerConfig's, and that of some version of Megatron-LM's args."""
_EITHER = ("layernorm_epsilon",)
"""Settings for which one matching spelling is enough: the other may be an unused default."""
_SIZES = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "num_moe_experts",
)
_NOT_COMPARED = frozenset({"max_position_embeddings", "moe_aux_loss_coeff", "vocab_size"})
"""Values that don't change what the weights compute, or that are compared separately."""
_OWN = frozenset({"clip_qkv", "full_attention_rope"})
"""Names that only this package records, so that null means none; the same goes for windows."""
_FAMILY = re.compile(r"megatron_olmo_bridge[.]models[.](\w+)[.]")
_POSITIONS = "embedding.position_embeddings.weight"


def differing(record: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the recorded values that differ from the settings, by their recorded names.

    Args:
        record: Megatron-LM's args, or a run_config's model section.
        settings: expected values by TransformerConfig's names; None for those that must be absent,
            false, zero or null.
    """
    different: dict[str, Any] = {}
    for setting, expected in settings.items():
        names = _SPELLINGS.get(setting, (setting,))
        recorded = {name: record[name] for name in names if _is_plain(record.get(name))}
        if expected is None:
            different |= {name: value for name, value in recorded.items() if value}
        elif not (setting in _EITHER and expected in recorded.values()):
            different |= {name: value for name, value in recorded.items() if value != expected}
    return different


def contradictions(
    bridge: RecordedModel, record: Mapping[str, Any], tensors: Mapping[str, Any]
) -> list[str]:
    """Return one line of message for each setting in which a record and a config differ.

    Args:
        bridge: bridge of the config.
        record: Megatron-LM's args, or a run_config's model section.
        tensors: tensors of the checkpoint, by name.
    """
    expected = bridge.settings | _compared_numbers(bridge)
    record = _normalized(record, expected)
    if bridge.settings["position_embedding_type"] == "rope" and (
        record.get("position_embedding_type") == "learned_absolute" and _POSITIONS not in tensors
    ):
        # Not what built this model: defaults, beside the sizes without which Megatron-LM won't run.
        expected = {name: expected[name] for name in _SIZES if name in expected}
    if all(record.get(name) is None for name in _SPELLINGS["num_moe_experts"]):
        expected = {n: v for n, v in expected.items() if not n.startswith("moe_")}
    lines = [
        f"{name} is {quote(value)} in the checkpoint, {_said(expected, name)} in the config"
        for name, value in differing(record, expected).items()
    ]
    lines += [
        f"{name} is null in the checkpoint, {quote(value)} in the config"
        for name, value in expected.items()
        if name in _null_means_none(record) and value is not None and record[name] is None
    ]
    return [*_families(bridge, record), *lines, *_vocabularies(bridge, record)]


def _compared_numbers(bridge: RecordedModel) -> dict[str, Any]:
    numbers = {n: v for n, v in bridge.config_values.items() if n not in _NOT_COMPARED}
    if bridge.num_labels:  # a classifier has no output layer
        del numbers["share_embeddings_and_output_weights"]
    return numbers


def _normalized(record: Mapping[str, Any], expected: Mapping[str, Any]) -> dict[str, Any]:
    """Return the record with the names and forms of the config's values."""
    values = dict(record)
    heads, grouped = values.get("num_attention_heads"), values.get("group_query_attention")
    if grouped is False or (grouped is None and values.get("num_query_groups", 0) is None):
        values["num_query_groups"] = heads  # Megatron-LM keeps its default, 1, where it is off
    if expected.get("num_moe_experts") and values.get("moe_ffn_hidden_size") is not None:
        values["ffn_hidden_size"] = values["moe_ffn_hidden_size"]
    untied = values.get("untie_embeddings_and_output_weights")
    if untied is not None and values.get("share_embeddings_and_output_weights") is None:
        values["share_embeddings_and_output_weights"] = not untied
    window, pattern = values.get("window_size"), values.get("window_attn_skip_freq")
    if isinstance(window, list | tuple):  # YAML has no tuples; -1 is an infinite window
        values["window_size"] = tuple(window) if any(size != -1 for size in window) else None
    if type(expected.get("window_attn_skip_freq")) is int and isinstance(pattern, list):
        every = expected["window_attn_skip_freq"]
        if [bool(w) for w in pattern] == [i % every != 0 for i in range(1, len(pattern) + 1)]:
            values["window_attn_skip_freq"] = every
    return values


def _null_means_none(record: Mapping[str, Any]) -> frozenset[str]:
    windows = {"window_size", "window_attn_skip_freq"} if "full_attention_rope" in record else set()
    return frozenset((_OWN | windows) & record.keys())


def _said(expected: Mapping[str, Any], name: str) -> str:
    setting = next((s for s, names in _SPELLINGS.items() if name in names), name)
    return "not set" if expected[setting] is None else quote(expected[setting])


def _families(bridge: RecordedModel, record: Mapping[str, Any]) -> Iterator[str]:
    """Yield a line if the recorded spec or provider of this package is of another family."""
    expected = _FAMILY.match(bridge.provider_class.replace(":", "."))
    for name in ("_target_", "spec"):
        value = record.get(name)
        module = value[0] if isinstance(value, list | tuple) and value else value
        recorded = _FAMILY.match(f"{module}.") if isinstance(module, str) else None
        if recorded and expected and recorded[1] != expected[1]:
            yield f"{name} is {module} in the checkpoint, the config is of {bridge.family}"


def _vocabularies(bridge: RecordedModel, record: Mapping[str, Any]) -> Iterator[str]:
    """Yield a line if tokens of the recorded vocabulary would be cut off as padding."""
    size = record.get("vocab_size")
    # Without padding by Megatron, the size may be one that was padded before.
    if (
        type(size) is int
        and size > bridge.vocab_size
        and record.get("should_pad_vocab") is not False
    ):
        yield f"vocab_size is {size} in the checkpoint, {bridge.vocab_size} in the config"


def _is_plain(value: Any) -> bool:
    return isinstance(value, bool | int | float | str | list | tuple | dict)
