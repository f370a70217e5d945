"""Let stock ``dist_checkpointing.load`` read a Hugging Face folder without a conversion.

megatron-core reads the folder's small files before it calls a strategy, so there is a temporary
folder with only these.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
from megatron.core.dist_checkpointing.utils import nested_values

from megatron_olmo_bridge.checkpoints.checkpoint import Checkpoint, OptimizerState
from megatron_olmo_bridge.checkpoints.hf import HFCheckpoint
from megatron_olmo_bridge.checkpoints.megatron_optimizer import STATE
from megatron_olmo_bridge.checkpoints.open import open_checkpoint
from megatron_olmo_bridge.convert.to_megatron import common_state, extra_state_keys
from megatron_olmo_bridge.errors import InputError
from megatron_olmo_bridge.formats.torch_archive import object_archive
from megatron_olmo_bridge.formats.torch_dist import COMMON, FORMAT, FORMAT_FILE
from megatron_olmo_bridge.storage.hub import fetch
from megatron_olmo_bridge.storage.transfer import Transfer

from .load import fill
from .shards import Finder


@contextlib.contextmanager
def hf_as_megatron(
    hf: str | Path, *, revision: str | None = None
) -> Iterator[tuple[str, LoadStrategy]]:
    """Yield a folder and a strategy for stock megatron-core to load a Hugging Face checkpoint::

        with hf_as_megatron("allenai/OLMo-2-0425-1B") as (folder, strategy):
            state = dist_checkpointing.load(sharded_state_dict, folder, sharded_strategy=strategy)

    Args:
        hf: a folder, or a hub id.
        revision: branch, tag or commit on the hub.

    Raises:
        BridgeError: not a Hugging Face checkpoint of a supported family, or damaged.
    """
    source = open_checkpoint(fetch(str(hf), revision)[0])
    if not isinstance(source, HFCheckpoint):
        raise InputError(f"{source.path}: is a {source.kind} checkpoint, not a Hugging Face one")
    with as_megatron(source) as (name, strategy):
        yield name, strategy


@contextlib.contextmanager
def as_megatron(
    source: Checkpoint, state: OptimizerState | None = None, optimizers: int = 1
) -> Iterator[tuple[str, LoadStrategy]]:
    """Yield a folder and a strategy for stock megatron-core to load a checkpoint of any kind.

    Args:
        source: the checkpoint.
        state: its optimizer state, to be loaded too.
        optimizers: number of optimizers that it is loaded into, see :func:`.common_state`.
    """
    with tempfile.TemporaryDirectory(prefix="olmo-bridge-") as name:
        folder = Path(name)
        (folder / FORMAT_FILE).write_text(json.dumps(FORMAT))
        rows, dtype = source.padded_vocab_size, source.dtypes[0]
        common = common_state(source.bridge, rows, dtype, state, optimizers)
        (folder / COMMON).write_bytes(object_archive(common))
        yield name, LoadStrategy(source, state)


class LoadStrategy:
    """Load strategy that reads a checkpoint of any kind, for megatron-core 0.16 to 0.19."""

    can_handle_sharded_objects = True

    def __init__(self, source: Checkpoint, state: OptimizerState | None = None) -> None:
        self._source = source
        self._parts = {"": source}
        if state:
            names = {"param": ("param", "fp32_param")}
            for kind, part in state.tensors.items():
                self._parts |= {f"{STATE}{n}.": part for n in names.get(kind, (kind,))}

    def load(self, sharded_state_dict: Any, checkpoint_dir: Any, *_: Any) -> Any:
        """Fill the tensors of a sharded state dict in place; return it with their data.

        Raises:
            MappingError: a tensor does not belong to the model.
            InputError: an object is requested that no Hugging Face checkpoint has, or the folder
                changed while it was read.
        """
        wanted = [v for v in nested_values(sharded_state_dict) if isinstance(v, ShardedTensor)]
        finder = Finder.of(self._source.bridge, map(self._of_weight, wanted))

        def loaded(value: ShardedTensor | ShardedObject) -> Any:
            if isinstance(value, ShardedObject):
                if "_extra_state" not in value.key:
                    raise InputError(f"a Hugging Face checkpoint has no {value.key}, only weights")
                return None
            if value.data is None:
                value.init_data(torch.cuda.current_device())
            part = self._parts[self._prefix(value.key)]
            fill(finder.shard(self._of_weight(value)), part, transfer)
            return value.data

        with Transfer() as transfer:
            filled = dict_list_map_inplace(loaded, sharded_state_dict)
        self._source.snapshot.check_unchanged()
        return filled

    def _prefix(self, key: str) -> str:
        """Return the longest prefix of a key that is that of a part."""
        return max((p for p in self._parts if key.startswith(p)), key=len)

    def _of_weight(self, tensor: ShardedTensor) -> ShardedTensor:
        """Return a tensor of the optimizer's state with the key of the weight that it is of."""
        return replace(tensor, key=tensor.key.removeprefix(self._prefix(tensor.key)))

    def load_tensors_metadata(self, checkpoint_dir: Any) -> dict[str, ShardedTensor]:
        """Return every tensor that can be loaded, by key and without data."""
        mapping, found = self._source.mapping, {}
        dtype = getattr(torch, self._source.dtypes[0])
        for parameter in mapping.parameters.values():
            axes = len(parameter.index)
            stack = mapping.counts[:axes]
            empty = torch.empty(*stack, *parameter.shape, dtype=dtype, device="meta")
            for prefix in self._parts:
                key = prefix + parameter.key(axes)
                found[key] = ShardedTensor.from_rank_offsets(key, empty).without_data()
        return found

    def load_sharded_metadata(self, checkpoint_dir: Any) -> dict[str, Any]:
        """Return every tensor and object by key."""
        found: dict[str, Any] = dict(self.load_tensors_metadata(checkpoint_dir))
        for key in extra_state_keys(self._source.bridge):
            found[key] = ShardedObject.empty_from_unique_key(key)
        return found

    def check_backend_compatibility(self, loaded_backend: Any) -> None:
        """Accept any backend; megatron-core 0.16 calls this."""

    def check_version_compatibility(self, loaded_version: Any) -> None:
        """Accept any version, as for the backend."""
