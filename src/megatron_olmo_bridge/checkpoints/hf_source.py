"""A Hugging Face folder with its model: its tensors by the names that the model's table uses."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

from megatron_olmo_bridge.errors import (
    FormatError,
    InputError,
    MappingError,
    UnsupportedError,
)
from megatron_olmo_bridge.formats.hf_folder import CONFIG, HFFolder
from megatron_olmo_bridge.formats.tensors import StoredArray, TensorView
from megatron_olmo_bridge.models.bridge import ModelBridge
from megatron_olmo_bridge.models.families import as_classifier, bridge_for, is_buffer, may_be_tied
from megatron_olmo_bridge.models.tables import HF_HEAD, HF_SCORE
from megatron_olmo_bridge.storage.transfer import Transfer


@dataclass(frozen=True)
class HFModel:
    """A Hugging Face checkpoint and the model that transformers builds from it."""

    folder: HFFolder
    """Config and arrays; the config says what transformers computes with."""
    bridge: ModelBridge
    new: frozenset[str] = frozenset()
    """Tensors that no file has, and that begin as zeros: a new classification head."""
    notes: tuple[str, ...] = ()
    """What was read otherwise than the folder's config.json says."""


def read_hf_model(path: Path, num_labels: int | None) -> HFModel:
    """Read a folder's headers, and bytes only where two tensors must be told apart.

    Args:
        path: the folder.
        num_labels: give a language model a new classification head of so many classes, of zeros,
            instead of its own.

    Raises:
        InputError, FormatError, UnsupportedError: the folder is not a checkpoint of a known model.
    """
    hf = HFFolder.read(path, is_buffer, may_be_tied)
    bridge = bridge_for(hf.config, path / CONFIG)
    hf = replace(hf, arrays=_split_experts(_by_table_names(hf, bridge), bridge, path))
    if num_labels is not None:
        return _with_new_head(hf, bridge, num_labels)
    if has_untied_head(bridge, hf.arrays):
        config = {**hf.config, "tie_word_embeddings": False}
        note = (
            f"config.json says that embeddings are tied, but {HF_HEAD} differs from "
            f"{bridge.hf_embedding}: kept as a head of its own, as transformers 5 does"
        )
        return HFModel(replace(hf, config=config), bridge_for(config, path / CONFIG), notes=(note,))
    if bridge.num_labels is not None and HF_HEAD in hf.arrays:
        note = f"{HF_HEAD} was left out: a classifier doesn't use a language model's head"
        return HFModel(hf, bridge, notes=(note,))
    return HFModel(hf, bridge)


def _by_table_names(hf: HFFolder, bridge: ModelBridge) -> dict[str, StoredArray]:
    """Return the arrays by the table's names.

    Raises:
        FormatError: a tensor is there by two names.
    """
    names, arrays = bridge.hf_names(hf.arrays), {}
    for name, array in hf.arrays.items():
        known_as = names.get(name, name)
        if known_as in arrays or (known_as != name and known_as in hf.arrays):
            raise FormatError(f"{hf.path}: has both {known_as} and {name}, which mean the same")
        arrays[known_as] = array
    return arrays


def _split_experts(
    arrays: dict[str, StoredArray], bridge: ModelBridge, path: Path
) -> dict[str, StoredArray]:
    """Return the arrays with the experts of a layer, where they are stored as one, each apart.

    transformers 5 holds them so in memory, and saves them so with ``save_original_format=False``:
    ``gate_up_proj`` is [experts, gate over up, hidden], ``down_proj`` is [experts, hidden, ffn].

    Raises:
        MappingError: such a tensor has another shape.
    """
    if bridge.num_experts is None:
        return arrays
    c, out = bridge.config, {}
    parts = {
        "gate_up_proj": (("gate_proj", "up_proj"), (c.ffn_hidden_size, c.hidden_size)),
        "down_proj": (("down_proj",), (c.hidden_size, c.ffn_hidden_size)),
    }
    for name, array in arrays.items():
        module, _, last = name.rpartition(".")
        if not module.endswith(".experts") or last not in parts:
            out[name] = array
            continue
        projections, shape = parts[last]
        expected = (bridge.num_experts, len(projections) * shape[0], shape[1])
        if array.shape != expected:
            raise MappingError(
                f"{path}: {name} has shape {list(array.shape)}, the config asks for "
                f"{list(expected)}"
            )
        for i, (expert, projection) in enumerate(product(range(expected[0]), projections)):
            part = replace(array, shape=shape)
            part = replace(part, offset=array.offset + i * part.nbytes)
            out[f"{module}.{expert}.{projection}.weight"] = part
    return out


def has_untied_head(bridge: ModelBridge, arrays: dict[str, StoredArray]) -> bool:
    """Return whether a checkpoint whose config ties embeddings stores another head all the same.

    transformers 5 then keeps both (``PreTrainedModel.tie_weights``): it ties only what is missing
    or equal.
    """
    head, embedding = arrays.get(HF_HEAD), arrays.get(bridge.hf_embedding)
    if not bridge.is_tied or head is None or embedding is None:
        return False
    if (head.shape, head.dtype) != (embedding.shape, embedding.dtype):
        return True
    views = [TensorView.of_array("", array) for array in (head, embedding)]
    with Transfer() as left, Transfer() as right:
        blocks = zip(left.blocks(views[0]), right.blocks(views[1]), strict=True)
        # A bytearray compares as memory, a memoryview item by item.
        return any(bytearray(a) != b for (_, _, a), (_, _, b) in blocks)


def _with_new_head(hf: HFFolder, bridge: ModelBridge, num_labels: int) -> HFModel:
    if bridge.num_labels is not None:
        raise InputError(f"{hf.path}: has a classification head of {bridge.num_labels} classes")
    try:
        config = as_classifier(hf.config, num_labels)
    except UnsupportedError as error:
        raise UnsupportedError(f"{hf.path / CONFIG}: {error}") from error
    kept = {name: array for name, array in hf.arrays.items() if name != HF_HEAD}
    hf = replace(hf, config=config, arrays=kept)
    return HFModel(hf, bridge_for(config, hf.path / CONFIG), frozenset((HF_SCORE,)))
