"""Import a Hugging Face checkpoint, or OLM's, to a Megatron ``torch_dist`` checkpoint."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from megatron_olmo_bridge.checkpoints.checkpoint import Checkpoint, OptimizerState
from megatron_olmo_bridge.checkpoints.hf_files import config_with_dtype
from megatron_olmo_bridge.checkpoints.megatron import MegatronCheckpoint
from megatron_olmo_bridge.checkpoints.megatron_config import HF_SUBFOLDER, RUN_CONFIG
from megatron_olmo_bridge.checkpoints.megatron_optimizer import RECORD, STATE
from megatron_olmo_bridge.checkpoints.open import open_checkpoint
from megatron_olmo_bridge.errors import FormatError, InputError
from megatron_olmo_bridge.formats.dcp_metadata import (
    METADATA,
    Chunk,
    GlobalTensor,
    StoredBytes,
    encode_metadata,
)
from megatron_olmo_bridge.formats.dtypes import parse_dtype
from megatron_olmo_bridge.formats.hf_folder import CONFIG, artifact_files
from megatron_olmo_bridge.formats.inert import built
from megatron_olmo_bridge.formats.iterations import TRACKER
from megatron_olmo_bridge.formats.tensors import MixedView, TensorView
from megatron_olmo_bridge.formats.torch_archive import object_archive, tensor_archive
from megatron_olmo_bridge.formats.torch_dist import COMMON, FORMAT, FORMAT_FILE, stacked_key
from megatron_olmo_bridge.mapping.mappings import WILDCARD
from megatron_olmo_bridge.mapping.placement import Region, Shape
from megatron_olmo_bridge.mapping.registry import Parameter, ResolvedMapping
from megatron_olmo_bridge.models.bridge import ModelBridge
from megatron_olmo_bridge.storage.execute import WriteOptions
from megatron_olmo_bridge.storage.hub import fetch
from megatron_olmo_bridge.storage.plan import CopyPlan, Packer
from megatron_olmo_bridge.storage.progress import Reporter
from megatron_olmo_bridge.storage.provenance import Provenance

from .options import ImportOptions
from .output import write_output

FILE_BYTES = 2 << 30
"""Maximum bytes of a .distcp file, unless one chunk is larger. Files are written in parallel."""
ALIGNMENT = 64


def import_checkpoint(
    source: str | Path,
    destination: str | Path,
    options: ImportOptions | None = None,
    write: WriteOptions | None = None,
    reporter: Reporter | None = None,
) -> CopyPlan:
    """Write a Hugging Face checkpoint as a Megatron checkpoint that loads at any layout.

    Args:
        source: a folder, or a hub id such as ``allenai/OLMo-2-0425-1B``; or OLM's ``step_N.pt``.
        destination: checkpoint root to create, with a folder ``iter_0000000`` or ``release``.
        options: defaults if None.
        write: how to write the output; defaults if None.
        reporter: receives progress.

    Returns:
        The plan that was executed.

    Raises:
        BridgeError: the source is damaged or not supported, or the output can't be written. Nothing
            is left at ``destination`` then.
    """
    plan, provenance = plan_import(source, options)
    write_output(plan, destination, provenance, write, reporter)
    return plan


def plan_import(
    source: str | Path, options: ImportOptions | None = None
) -> tuple[CopyPlan, Provenance]:
    """Return the plan of an import and its provenance record, from headers alone."""
    options = options or ImportOptions()
    dtype, divisor = parse_dtype(options.dtype), options.make_vocab_size_divisible_by
    if divisor < 1:
        raise InputError("--make-vocab-size-divisible-by must be at least 1")
    folder, name, commit = fetch(str(source), options.revision, options.max_connections)
    checkpoint = open_checkpoint(folder, options)
    if isinstance(checkpoint, MegatronCheckpoint):
        raise InputError(f"{name}: is a Megatron checkpoint already; import reads Hugging Face")
    vocab_size = checkpoint.bridge.vocab_size
    padded = vocab_size + -vocab_size % divisor
    state = checkpoint.optimizer_state if options.optimizer else None
    if state and options.release:
        raise InputError("--release names a checkpoint without optimizer state: leave out one")
    plan = _plan(checkpoint, padded, dtype, options.release, state)
    record = {"dtype": dtype, "padded_vocab_size": padded, "release": options.release}
    if options.num_labels is not None:
        record["new_head_of_zeros"] = options.num_labels
    if state:
        record["optimizer"] = True
    return plan, Provenance(name, commit, record)


def _plan(
    source: Checkpoint, padded_vocab: int, dtype: str, release: bool, state: OptimizerState | None
) -> CopyPlan:
    mapping = source.bridge.mapping_registry(padded_vocab).resolve()
    iteration = state.iteration if state else 0
    inside = "release" if release else f"iter_{iteration:07d}"
    packer = Packer("__0_{}.distcp".format, FILE_BYTES, ALIGNMENT)
    tensors = _pack_tensors(mapping, source, dtype, packer)
    model_dtype = tensors[source.bridge.vocab_param].dtype
    if state:
        tensors |= _pack_optimizer(mapping, state, tensors, packer)
    # megatron-core pickles the list of the objects that have the same key, here of one. None is the
    # state of Transformer Engine's modules without FP8.
    no_state = object_archive([None])
    objects = {
        key: StoredBytes(*packer.add(no_state, None, "", b""))
        for key in extra_state_keys(source.bridge)
    }
    common = common_state(source.bridge, padded_vocab, model_dtype, state)
    run_config = {"model": source.bridge.run_config_model(padded_vocab, model_dtype)}
    texts = {
        METADATA: encode_metadata(tensors, objects),
        FORMAT_FILE: json.dumps(FORMAT).encode(),
        COMMON: object_archive(common),
        RUN_CONFIG: yaml.safe_dump(run_config, sort_keys=False).encode(),
    }
    artifacts = artifact_files(source.artifacts_folder) if source.artifacts_folder else {}
    texts |= {f"{HF_SUBFOLDER}/{name}": data for name, data in artifacts.items()}
    config = f"{HF_SUBFOLDER}/{CONFIG}"
    is_from_source = config in texts and source.artifacts_folder == source.path
    if dtype != "keep" or not is_from_source or json.loads(texts[config]) != source.hf_config:
        texts[config] = config_with_dtype(source.hf_config, model_dtype)
    return CopyPlan(
        "import",
        source.path,
        tuple(replace(file, name=f"{inside}/{file.name}") for file in packer.files()),
        {f"{inside}/{name}": data for name, data in texts.items()},
        inside,
        (TRACKER, b"release" if release else str(iteration).encode()),
        notes=tuple(source.notes),
        snapshots=(source.snapshot,),
    )


def _pack_optimizer(
    mapping: ResolvedMapping,
    state: OptimizerState,
    weights: dict[str, GlobalTensor],
    packer: Packer,
) -> dict[str, GlobalTensor]:
    """Pack an optimizer's state under the keys of all of megatron-core's AdamW optimizers.

    The float32 weights have one key for the distributed optimizer and one for the other, and are
    the model's own weights if these are float32.
    """
    tensors: dict[str, GlobalTensor] = {}
    for kind, part in state.tensors.items():
        if kind == "param" and {weight.dtype for weight in weights.values()} == {"float32"}:
            packed = weights
        else:
            packed = _pack_tensors(mapping, part, "float32", packer)
        for name in ("param", "fp32_param") if kind == "param" else (kind,):
            tensors |= {f"{STATE}{name}.{key}": t for key, t in packed.items()}
    return tensors


def _pack_tensors(
    mapping: ResolvedMapping, source: Checkpoint, dtype: str, packer: Packer
) -> dict[str, GlobalTensor]:
    """Pack every chunk as megatron-core saves a model of equal layers: layers are stacked along the
    first axis, with one chunk per layer, or two for a gated MLP."""
    chunks: dict[str, list[Chunk]] = defaultdict(list)
    dtypes: dict[str, str] = {}
    shapes: dict[str, Shape] = {}
    for parameter in mapping.parameters.values():
        view = _view(parameter, source, dtype)
        axes = len(parameter.index)
        key = parameter.key(axes)
        target = view.dtype if dtype == "keep" else dtype
        if dtypes.setdefault(key, target) != target:
            raise FormatError(
                f"{source.path}: {parameter.name} is {target}, the same tensor of other layers "
                f"is {dtypes[key]}; Megatron stores them as one. Pass --dtype."
            )
        stack = (1,) * axes
        shapes[key] = mapping.counts[:axes] + parameter.shape
        for region in parameter.chunks:
            shape = (region.rows, *parameter.shape[1:])
            before, after = tensor_archive(stack + shape, target)
            part = view.region(region, shape)
            stored = StoredBytes(*packer.add(before, part, target, after))
            offset = (region.top, *(0 for _ in parameter.shape[1:]))
            chunks[key].append(Chunk(parameter.index + offset, stack + shape, stored))
    return {key: GlobalTensor(dtypes[key], shapes[key], tuple(chunks[key])) for key in chunks}


def _view(parameter: Parameter, source: Checkpoint, dtype: str) -> TensorView:
    pieces = tuple(source.pieces(parameter, Region.whole(parameter.shape)))
    dtypes = sorted({piece.array.dtype for piece in pieces if piece.array})
    if len(dtypes) < 2:
        view_dtype = source.tensors[parameter.placements[0].hf_name or ""].dtype
        return TensorView.assembled(parameter.name, parameter.shape, pieces, view_dtype)
    if dtype == "keep":
        raise FormatError(
            f"{source.path}: the parts of {parameter.name} are {' and '.join(dtypes)}; Megatron "
            "stores them as one. Pass --dtype."
        )
    return MixedView(parameter.name, parameter.shape, dtype, pieces)


def extra_state_keys(bridge: ModelBridge) -> Iterator[str]:
    """Yield megatron-core's key of every ``_extra_state`` object."""
    counts = (bridge.num_layers, bridge.num_experts or 1)
    for pattern in bridge.extra_state_patterns():
        axes = counts[: pattern.count(WILDCARD)]
        counts_text = ".".join(map(str, axes or (1,)))
        for index in product(*map(range, axes)):
            index_text = ".".join(map(str, index or (0,)))
            yield f"{stacked_key(pattern)}/shard_{index_text}_{counts_text}"


def common_state(
    bridge: ModelBridge,
    padded_vocab: int,
    dtype: str,
    state: OptimizerState | None = None,
    optimizers: int = 1,
) -> dict[str, Any]:
    """Return the content of ``common.pt``, which has all that is not a tensor.

    Args:
        bridge: the model.
        padded_vocab: rows of its embedding.
        dtype: dtype of its weights.
        state: optimizer state.
        optimizers: 2 if experts have an optimizer of their own, as under expert parallelism.
    """
    return {
        "args": built("argparse.Namespace", bridge.megatron_args(padded_vocab, dtype)),
        "checkpoint_version": 3.0,
        "iteration": state.iteration if state else 0,
        "content_metadata": {
            "singleton_local_shards": False,
            "chained_optim_avoid_prefix": True,
            **({"distrib_optim_sharding_type": "fully_reshardable"} if state else {}),
        },
        **(
            {
                "optimizer": _optimizers(state, optimizers),
                RECORD: {"decayed": state.decayed, "trainer": state.trainer},
            }
            if state
            else {}
        ),
    }


def _optimizers(state: OptimizerState, count: int) -> dict[Any, Any]:
    """Return the settings of megatron-core's optimizer; of several, by number."""
    if count == 1:
        return _optimizer_settings(state)
    return {i: _optimizer_settings(state, of_experts=i > 0) for i in range(count)}


def _optimizer_settings(state: OptimizerState, of_experts: bool = False) -> dict[str, Any]:
    """Return the settings of megatron-core's AdamW, where each of its optimizers reads them.

    The float32 optimizer reads the first level, the other two the second. Parameters are in groups
    with and without weight decay; all experts decay.
    """
    settings = {k: v for k, v in state.settings.items() if k != "initial_lr"}
    groups = [
        {
            "wd_mult": decays,
            "lr_mult": 1.0,
            "is_expert_parallel": of_experts,
            "is_decoupled_lr": False,
            "default_config": True,
            "max_lr": state.settings["initial_lr"],
            "min_lr": 0.0,
            **settings,
            "weight_decay": decays * settings["weight_decay"],
            "step": state.step,
        }
        for decays in ((1.0,) if state.decayed == "all" or of_experts else (1.0, 0.0))
    ]
    values = {"state": {"common_step": state.step}, "param_groups": groups}
    return {**values, "optimizer": values, "param_state_sharding_type": "fully_reshardable"}
