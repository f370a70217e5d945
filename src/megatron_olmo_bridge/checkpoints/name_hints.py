"""Explain tensor names that do not fit their config."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager

from megatron_olmo_bridge.errors import MappingError
from megatron_olmo_bridge.models.bridge import ModelBridge
from megatron_olmo_bridge.models.families import bridges
from megatron_olmo_bridge.models.tables import HF_HEAD, HF_SCORE

WRAPPERS = {
    "_orig_mod.": "torch.compile put it there: save model._orig_mod",
    "module.": "a data-parallel wrapper put it there: save model.module",
    "base_model.model.": "PEFT put it there: merge the adapter (merge_and_unload()) and save that",
    "_fsdp_wrapped_module.": "FSDP put it there: save its full state dict",
    "_checkpoint_wrapped_module.": "activation checkpointing put it there: save the model inside",
}
"""Parts of names that training tools add, and how to save a model without them."""


@contextmanager
def explaining_names(names: Collection[str], bridge: ModelBridge) -> Iterator[None]:
    """Append an explanation of the names, if one is known, to a MappingError."""
    try:
        yield
    except MappingError as error:
        if hint := name_hint(names, bridge):
            raise MappingError(f"{error}\n{hint}") from error
        raise


def name_hint(names: Collection[str], bridge: ModelBridge) -> str | None:
    """Return a sentence on why the names are not those of the config's model; None if unknown.

    Args:
        names: Hugging Face or Megatron names of the checkpoint's tensors.
        bridge: bridge of the config.
    """
    if any(".lora_" in name or ".base_layer." in name for name in names):
        return (
            "The names are those of a PEFT adapter in its base model. Merge it "
            "(merge_and_unload()), save_pretrained() the result and convert that."
        )
    for part, remedy in WRAPPERS.items():
        if any(name.startswith(part) or f".{part}" in name for name in names):
            return f"Names have {part!r} in them: {remedy}, by save_pretrained()."
    prefixed = [name for name in names if name.endswith(f".{bridge.hf_embedding}")]
    if prefixed and bridge.hf_embedding not in names:
        prefix = prefixed[0].removesuffix(bridge.hf_embedding)
        return (
            f"Names begin with {prefix!r}, which doesn't belong to the model: save_pretrained() "
            "the model that is inside."
        )
    families = families_with(names)
    if families and bridge.family not in families:
        return (
            f"The names are those of {' or '.join(families)}, the config is of {bridge.family}: is "
            "it another model's config.json?"
        )
    if HF_HEAD not in names and bridge.hf_embedding in names and bridge.num_labels is None:
        return (
            f"A model saved without its head: {HF_HEAD} would be random. Save it from "
            "AutoModelForCausalLM; or import it with --num-labels as a classifier; or, if its "
            "head is the embedding, set tie_word_embeddings to true in config.json."
        )
    return None


def families_with(names: Collection[str]) -> list[str]:
    """Return the families whose layers have tensors of exactly these names.

    Args:
        names: Hugging Face or Megatron names of a checkpoint's tensors. Heads are not compared.
    """
    heads = {HF_HEAD, HF_SCORE, "output_layer.weight"}
    unnumbered = {re.sub(r"\.\d+(?=\.)", "", name) for name in names} - heads
    families = []
    for bridge in bridges():
        mappings = bridge(next(iter(bridge.sizes.values()))).mapping_registry().mappings
        hf = {name for m in mappings for name in m.hf_shapes()}
        megatron = {m.megatron_param for m in mappings}
        if unnumbered in ({n.replace(".*", "") for n in side} - heads for side in (hf, megatron)):
            families.append(bridge.family)
    return families
