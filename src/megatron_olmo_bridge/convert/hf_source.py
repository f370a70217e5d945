"""A Hugging Face folder with its model: its tensors by the names that the model's table uses."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from megatron_olmo_bridge.errors import InputError, UnsupportedError
from megatron_olmo_bridge.formats.hf_folder import CONFIG, HFFolder
from megatron_olmo_bridge.formats.tensors import StoredArray, TensorView
from megatron_olmo_bridge.models.bridge import ModelBridge, as_classifier, bridge_for
from megatron_olmo_bridge.models.tables import HF_HEAD

from .transfer import Transfer


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
    hf = HFFolder.read(path)
    bridge = bridge_for(hf.config, path / CONFIG)
    names = bridge.hf_names(hf.arrays)
    hf = replace(hf, arrays={names.get(name, name): a for name, a in hf.arrays.items()})
    if num_labels is not None:
        return _with_new_head(hf, bridge, num_labels)
    if has_untied_head(bridge, hf.arrays):
        config = {**hf.config, "tie_word_embeddings": False}
        note = (
            f"config.json says that embeddings are tied, but {HF_HEAD} differs from "
            f"{bridge.hf_embedding}: kept as a head of its own, as transformers 5 does"
        )
        return HFModel(replace(hf, config=config), bridge_for(config, path / CONFIG), notes=(note,))
    return HFModel(hf, bridge)


def has_untied_head(bridge: ModelBridge, arrays: dict[str, StoredArray]) -> bool:
    """Return whether a checkpoint whose config ties embeddings stores another head all the same.

    transformers 5 then keeps both (``PreTrainedModel.tie_weights``): it ties only what is missing
    or equal.
    """
    head, embedding = arrays.get(HF_HEAD), arrays.get(bridge.hf_embedding)
    tied = bridge.num_labels is None and bridge.config.share_embeddings_and_output_weights
    if not tied or head is None or embedding is None:
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
    return HFModel(hf, bridge_for(config, hf.path / CONFIG), frozenset(("score.weight",)))
