"""Compare the model settings that Megatron recorded with a config.json.

A record is Megatron-LM's ``args`` or the ``model`` section of a run_config.yaml. Few records are
complete, and some values in them are defaults that were never used; these are not compared.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from megatron_olmo_bridge.errors import quote

from .bridge import ModelBridge

_ALIASES = {
    "norm_epsilon": "layernorm_epsilon",
    "apply_layernorm_1p": "layernorm_zero_centered_gamma",
    "rotary_seq_len_interpolation_factor": "seq_len_interpolation_factor",
    "swiglu": "gated_linear_unit",
    "num_experts": "num_moe_experts",
}
"""Names in Megatron-LM's args, of some version, and TransformerConfig's names for the same."""
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
"""Config values that don't change what the weights compute, or that are compared separately."""
_PLAIN = (bool, int, float, str, list, tuple, dict)
"""Types of recorded values that are compared; null and functions are not."""
_FAMILY = re.compile(r"megatron_olmo_bridge[.]models[.](\w+)[.]")


def differing(record: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the recorded values that differ from the settings, by their recorded names.

    Args:
        record: Megatron-LM's args, or a run_config's model section.
        settings: expected values by TransformerConfig's names; None for those that must be absent,
            false, zero or null.
    """
    different: dict[str, Any] = {}
    for setting, expected in settings.items():
        names = [setting, *(alias for alias, name in _ALIASES.items() if name == setting)]
        recorded = {name: record[name] for name in names if isinstance(record.get(name), _PLAIN)}
        if expected is None:
            different |= {name: value for name, value in recorded.items() if value}
        # Either of layernorm_epsilon and norm_epsilon may be a default that was not used.
        elif not (setting == "layernorm_epsilon" and expected in recorded.values()):
            different |= {name: value for name, value in recorded.items() if value != expected}
    return different


def contradictions(
    bridge: ModelBridge, record: Mapping[str, Any], tensors: Mapping[str, Any]
) -> list[str]:
    """Return a line of a message for each setting in which a record and a config differ.

    Args:
        bridge: bridge of the config.
        record: Megatron-LM's args, or a run_config's model section.
        tensors: tensors of the checkpoint, by name.
    """
    values = {n: v for n, v in bridge.config_values.items() if n not in _NOT_COMPARED}
    if bridge.num_labels:  # a classifier has no output layer
        del values["share_embeddings_and_output_weights"]
    expected = bridge.settings | values
    record = _normalized(record, expected)
    if (
        bridge.settings["position_embedding_type"] == "rope"
        and record.get("position_embedding_type") == "learned_absolute"
        and "embedding.position_embeddings.weight" not in tensors
    ):
        # Another program built this model: the args are Megatron-LM's defaults, but for the sizes,
        # without which Megatron-LM does not start.
        expected = {name: expected[name] for name in _SIZES if name in expected}
    if record.get("num_moe_experts") is None and record.get("num_experts") is None:
        expected = {n: v for n, v in expected.items() if not n.startswith("moe_")}
    lines = []
    for name, value in differing(record, expected).items():
        config_value = expected[_ALIASES.get(name, name)]
        in_config = "not set" if config_value is None else quote(config_value)
        lines.append(f"{name} is {quote(value)} in the checkpoint, {in_config} in the config")
    lines += [
        f"{name} is null in the checkpoint, {quote(expected[name])} in the config"
        for name in expected
        if name in _nullable(record) and expected[name] is not None and record[name] is None
    ]
    return [*_other_families(bridge, record), *lines, *_larger_vocabulary(bridge, record)]


def _normalized(record: Mapping[str, Any], expected: Mapping[str, Any]) -> dict[str, Any]:
    """Return the record with the names and forms of the config's values."""
    values = dict(record)
    grouped = values.get("group_query_attention")
    if grouped is False or (grouped is None and values.get("num_query_groups", 0) is None):
        # Without grouped queries Megatron-LM records its default, 1.
        values["num_query_groups"] = values.get("num_attention_heads")
    if expected.get("num_moe_experts") and values.get("moe_ffn_hidden_size") is not None:
        values["ffn_hidden_size"] = values["moe_ffn_hidden_size"]
    untied = values.get("untie_embeddings_and_output_weights")
    if untied is not None and values.get("share_embeddings_and_output_weights") is None:
        values["share_embeddings_and_output_weights"] = not untied
    window, pattern = values.get("window_size"), values.get("window_attn_skip_freq")
    if isinstance(window, list | tuple):  # YAML has no tuples; -1 is an infinite window
        values["window_size"] = tuple(window) if any(size != -1 for size in window) else None
    every = expected.get("window_attn_skip_freq")
    if type(every) is int and isinstance(pattern, list):
        usual = [i % every != 0 for i in range(1, len(pattern) + 1)]
        values["window_attn_skip_freq"] = every if list(map(bool, pattern)) == usual else pattern
    return values


def _nullable(record: Mapping[str, Any]) -> set[str]:
    """Return the recorded names whose null means none: only this package records them."""
    windows = {"window_size", "window_attn_skip_freq"} if "full_attention_rope" in record else set()
    return ({"clip_qkv", "full_attention_rope"} | windows) & record.keys()


def _other_families(bridge: ModelBridge, record: Mapping[str, Any]) -> Iterator[str]:
    """Yield a line if the recorded spec or provider of this package is of another family."""
    expected = _FAMILY.match(bridge.provider_class.replace(":", "."))
    for name in ("_target_", "spec"):
        value = record.get(name)
        module = value[0] if isinstance(value, list | tuple) and value else value
        recorded = _FAMILY.match(f"{module}.") if isinstance(module, str) else None
        if recorded and expected and recorded[1] != expected[1]:
            yield f"{name} is {module} in the checkpoint, the config is of {bridge.family}"


def _larger_vocabulary(bridge: ModelBridge, record: Mapping[str, Any]) -> Iterator[str]:
    """Yield a line if tokens of the recorded vocabulary would be cut off as padding."""
    size = record.get("vocab_size")
    # If Megatron did not pad the vocabulary, its recorded size may include padding from before.
    without_padding = record.get("should_pad_vocab") is not False
    if type(size) is int and size > bridge.vocab_size and without_padding:
        yield f"vocab_size is {size} in the checkpoint, {bridge.vocab_size} in the config"
