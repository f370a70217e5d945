"""Save and load OLMo-2 checkpoints with stock megatron-core: the other side of the conversion.

Uses nothing of the bridge's mapping or file formats, only its layer spec and provider. Start it
with torchrun, or directly for one process. Without CUDA it runs on gloo.

    save   save random weights (the same at any layout) or those of another checkpoint, as a
           Megatron checkpoint and as HF tensors
    load   load a checkpoint into a poisoned model; save the logits of a fixed batch
    keys   save the keys that the model requests from a checkpoint
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pathlib
import random
import signal
import zlib
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.mapping import (
    ShardedObject,
    ShardedTensor,
    apply_factories,
)
from megatron.core.dist_checkpointing.utils import nested_values
from megatron.core.dist_checkpointing.validation import StrictHandling
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.enums import ModelType
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.enums import AttnBackend
from safetensors.torch import save_file
from torch.distributed.checkpoint.metadata import TensorProperties

from megatron_olmo_bridge.models.olmo2.config import Olmo2Config
from megatron_olmo_bridge.models.olmo2.provider import Olmo2ModelProvider
from megatron_olmo_bridge.runtime.cpu import cpu_runtime

ITERATION = 7
Tensors = dict[str, torch.Tensor]


# ------------------------------------------------------------------------------- process groups


@contextlib.contextmanager
def megatron(args: argparse.Namespace) -> Iterator[None]:
    """Set up process groups of the requested layout on CPU or GPU."""
    with contextlib.ExitStack() as stack:
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        if backend == "nccl":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        else:
            stack.enter_context(cpu_runtime())
        if "RANK" in os.environ:
            dist.init_process_group(backend)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        parallel_state.initialize_model_parallel(
            args.tp, args.pp, virtual_pipeline_model_parallel_size=args.vpp
        )
        tensor_parallel.model_parallel_cuda_manual_seed(args.seed)
        try:
            yield
        finally:
            parallel_state.destroy_model_parallel()
            dist.destroy_process_group()


def read_config(args: argparse.Namespace) -> Olmo2Config:
    return Olmo2Config.from_hf(json.loads((args.hf / "config.json").read_text()))


def build(args: argparse.Namespace) -> tuple[Olmo2ModelProvider, list[GPTModel]]:
    """Return the provider and this rank's chunks of the model: one, or --vpp of them."""
    dtype = getattr(torch, args.dtype)
    provider = Olmo2ModelProvider(
        **asdict(read_config(args)),
        tensor_model_parallel_size=args.tp,
        pipeline_model_parallel_size=args.pp,
        virtual_pipeline_model_parallel_size=args.vpp,
        sequence_parallel=args.sp,
        params_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        make_vocab_size_divisible_by=args.vocab_divisible_by,
    )
    stages = [None] if args.vpp is None else list(range(args.vpp))
    device = torch.cuda.current_device()
    chunks = [provider.provide(vp_stage=stage).to(device) for stage in stages]
    for chunk in chunks:  # as Megatron-LM's get_model does
        for parameter in chunk.parameters():
            tensor_parallel.set_defaults_if_not_set_tensor_model_parallel_attributes(parameter)
    return provider, chunks


# --------------------------------------------------------------------- weights, by hand, no bridge


def global_parameters(chunks: list[GPTModel]) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Return this rank's parameters by name, with layers numbered over the whole model."""
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            match name.split("."):
                case ["decoder", "layers", local, *rest]:
                    number = chunk.decoder.layers[int(local)].layer_number - 1
                    yield ".".join(["decoder", "layers", str(number), *rest]), parameter
                case ["output_layer", "weight"] if chunk.share_embeddings_and_output_weights:
                    yield "embedding.word_embeddings.weight", parameter
                case _:
                    yield name, parameter


def split(name: str, whole: torch.Tensor, axis: int | None, ranks: int) -> list[torch.Tensor]:
    """Split a whole parameter into the shards of the tensor-parallel ranks."""
    if axis is None:
        return [whole] * ranks
    if name.endswith("linear_fc1.weight"):  # gate over up, on every rank
        gate, up = whole.chunk(2)
        return [torch.cat(pair) for pair in zip(gate.chunk(ranks), up.chunk(ranks), strict=True)]
    return list(whole.chunk(ranks, axis))


def join(name: str, shards: list[torch.Tensor], axis: int | None) -> torch.Tensor:
    """Join the shards that :func:`split` makes."""
    if axis is None:
        assert all(torch.equal(shards[0], shard) for shard in shards), f"{name} differs over TP"
        return shards[0]
    if name.endswith("linear_fc1.weight"):
        gates, ups = zip(*(shard.chunk(2) for shard in shards), strict=True)
        return torch.cat([*gates, *ups])
    return torch.cat(shards, axis)


def partition_axis(parameter: torch.nn.Parameter) -> int | None:
    return parameter.partition_dim if parameter.tensor_model_parallel else None


def fill(chunks: list[GPTModel], seed: int) -> None:
    """Fill parameters with random weights that depend only on name and whole shape."""
    tp = parallel_state.get_tensor_model_parallel_world_size()
    for name, parameter in global_parameters(chunks):
        axis = partition_axis(parameter)
        shape = list(parameter.shape)
        if axis is not None:
            shape[axis] *= tp
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
        if len(shape) == 1:  # a norm's gain
            whole = torch.rand(shape, generator=generator) + 0.5
        else:
            whole = torch.randn(shape, generator=generator) * 0.1
        rank = parallel_state.get_tensor_model_parallel_rank()
        with torch.no_grad():
            parameter.copy_(split(name, whole, axis, tp)[rank])


def to_hf(name: str, whole: torch.Tensor, config: Olmo2Config) -> Tensors:
    """Convert one whole Megatron parameter to Hugging Face tensors."""
    match name.split("."):
        case ["embedding", "word_embeddings", "weight"]:
            return {"model.embed_tokens.weight": whole[: config.vocab_size]}
        case ["output_layer", "weight"]:
            return {"lm_head.weight": whole[: config.vocab_size]}
        case ["decoder", "final_layernorm", "weight"]:
            return {"model.norm.weight": whole}
        case ["decoder", "layers", number, *rest]:
            layer, what = f"model.layers.{number}.", ".".join(rest)
        case _:
            raise KeyError(name)
    if what == "self_attention.linear_qkv.weight":  # per group: its queries, one key, one value
        groups = whole.view(config.num_query_groups, -1, config.kv_channels, config.hidden_size)
        parts = {"q": groups[:, :-2], "k": groups[:, -2], "v": groups[:, -1]}
        return {
            f"{layer}self_attn.{part}_proj.weight": rows.reshape(-1, config.hidden_size)
            for part, rows in parts.items()
        }
    if what == "mlp.linear_fc1.weight":
        gate, up = whole.chunk(2)
        return {f"{layer}mlp.gate_proj.weight": gate, f"{layer}mlp.up_proj.weight": up}
    direct = {
        "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
        "self_attention.linear_proj.post_layernorm.weight": "post_attention_layernorm.weight",
        "self_attention.q_layernorm.weight": "self_attn.q_norm.weight",
        "self_attention.k_layernorm.weight": "self_attn.k_norm.weight",
        "mlp.linear_fc2.weight": "mlp.down_proj.weight",
        "mlp.linear_fc2.post_layernorm.weight": "post_feedforward_layernorm.weight",
    }
    return {layer + direct[what]: whole}


def gather_hf(chunks: list[GPTModel], config: Olmo2Config) -> Tensors | None:
    """Return the whole model as Hugging Face tensors on rank 0, None elsewhere."""
    group = parallel_state.get_tensor_model_parallel_group()
    mine: Tensors = {}
    for name, parameter in global_parameters(chunks):
        shards = [torch.empty_like(parameter) for _ in range(group.size())]
        dist.all_gather(shards, parameter.detach(), group=group)
        whole = join(name, [shard.cpu() for shard in shards], partition_axis(parameter))
        mine |= {k: v.contiguous().clone() for k, v in to_hf(name, whole, config).items()}
    stages = on_rank_0(mine)
    if stages is None:
        return None
    found: Tensors = {}
    for stage in stages:
        found |= stage
    return found


def on_rank_0(mine: Any) -> list[Any] | None:
    """Return every rank's object on rank 0."""
    everyone = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(mine, everyone)
    return everyone


# ------------------------------------------------------------------------------- training step


def tokens(args: argparse.Namespace, config: Olmo2Config) -> torch.Tensor:
    """Return a fixed batch [b, s] of int64."""
    if getattr(args, "tokens", None):
        return torch.tensor(json.loads(args.tokens))
    return torch.randint(config.vocab_size, (2, 16), generator=torch.Generator().manual_seed(1))


def run_schedule(
    chunks: list[Any], batch: torch.Tensor, provider: Olmo2ModelProvider, train: bool
) -> list[dict[str, torch.Tensor]]:
    """Run Megatron's own pipeline schedule once; return the outputs of the last stage."""

    def step(iterator: Any, chunk: Any) -> Any:
        positions = torch.arange(batch.shape[1], device=batch.device).expand_as(batch)
        labels = batch.roll(-1, dims=1) if train else None
        output = chunk(batch, positions, None, labels=labels)
        if train:
            return output, lambda losses: (losses.mean(), {"loss": losses.detach().mean()})
        return output, lambda logits: (logits.sum(), {"logits": logits})

    return get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=[iter(())] * len(chunks) if len(chunks) > 1 else iter(()),
        model=chunks,
        num_microbatches=provider.pipeline_model_parallel_size,
        seq_length=batch.shape[1],
        micro_batch_size=batch.shape[0],
        forward_only=not train,
    )


def train_one_step(
    args: argparse.Namespace, provider: Olmo2ModelProvider, chunks: list[GPTModel]
) -> tuple[Any, OptimizerParamScheduler]:
    """Take one real step; return the optimizer with its state and a learning rate schedule."""
    distributed = args.optimizer != "adam"
    ddp_config = DistributedDataParallelConfig(use_distributed_optimizer=distributed)
    wrapped = [
        DistributedDataParallel(provider, ddp_config, chunk, disable_bucketing=i > 0)
        for i, chunk in enumerate(chunks)
    ]
    provider.finalize_model_grads_func = finalize_model_grads
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=1e-2,
            min_lr=1e-3,
            weight_decay=0.1,
            clip_grad=1.0,
            bf16=provider.bf16,
            params_dtype=provider.params_dtype,
            use_distributed_optimizer=distributed,
        ),
        wrapped,
    )
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=1e-2,
        min_lr=1e-3,
        lr_warmup_steps=0,
        lr_decay_steps=100,
        lr_decay_style="cosine",
        start_wd=0.1,
        end_wd=0.1,
        wd_incr_steps=100,
        wd_incr_style="constant",
    )
    for chunk in wrapped:
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
    batch = tokens(args, read_config(args)).to(torch.cuda.current_device())
    run_schedule(wrapped, batch, provider, train=True)
    before = {name: p.detach().clone() for name, p in global_parameters(chunks)}
    updated, norm, _ = optimizer.step()
    assert updated and norm > 0
    assert not any(torch.equal(before[name], p) for name, p in global_parameters(chunks))
    scheduler.step(increment=1)
    return optimizer, scheduler


# ----------------------------------------------------------------------------------- commands


def common_args(args: argparse.Namespace, provider: Olmo2ModelProvider) -> argparse.Namespace:
    """Return some of Megatron-LM's args, with every kind of value that occurs among them."""
    return argparse.Namespace(
        num_layers=provider.num_layers,
        hidden_size=provider.hidden_size,
        ffn_hidden_size=provider.ffn_hidden_size,
        num_attention_heads=provider.num_attention_heads,
        group_query_attention=True,
        num_query_groups=provider.num_query_groups,
        kv_channels=provider.kv_channels,
        max_position_embeddings=provider.max_position_embeddings,
        norm_epsilon=provider.layernorm_epsilon,
        normalization="RMSNorm",
        qk_layernorm=True,
        swiglu=True,
        add_bias_linear=False,
        position_embedding_type="rope",
        rotary_base=provider.rotary_base,
        padded_vocab_size=provider.padded_vocab_size,
        make_vocab_size_divisible_by=provider.make_vocab_size_divisible_by,
        untie_embeddings_and_output_weights=not provider.share_embeddings_and_output_weights,
        tensor_model_parallel_size=args.tp,
        pipeline_model_parallel_size=args.pp,
        virtual_pipeline_model_parallel_size=args.vpp,
        params_dtype=provider.params_dtype,
        bf16=provider.bf16,
        spec=["megatron_olmo_bridge.models.olmo2.layer_specs", "OLMO2_LAYER_SPEC"],
        iteration=ITERATION,
        consumed_train_samples=ITERATION,
        attention_backend=AttnBackend.unfused,
        model_type=ModelType.encoder_or_decoder,
        exit_signal=signal.SIGTERM,
        save_path=pathlib.Path("checkpoints"),
        adam_betas=(0.9, 0.95),
        no_save_optim=None if args.optimizer else True,
        no_save_rng=None,
    )


def rng_state() -> ShardedObject:
    """Return the RNG states, one object for each pipeline stage and tensor-parallel rank."""
    states = {
        "random_rng_state": random.getstate(),
        "np_rng_state": np.random.get_state(),
        "torch_rng_state": torch.get_rng_state(),
        "cuda_rng_state": torch.cuda.get_rng_state(),
        "rng_tracker_states": tensor_parallel.get_cuda_rng_tracker().get_states(),
    }
    tp = parallel_state.get_tensor_model_parallel_group()
    pp = parallel_state.get_pipeline_model_parallel_group()
    replica = parallel_state.get_data_parallel_rank(with_context_parallel=True)
    return ShardedObject(
        "rng_state", [states], (pp.size(), tp.size()), (pp.rank(), tp.rank()), replica_id=replica
    )


def model_states(chunks: list[GPTModel], metadata: dict[str, Any]) -> dict[str, Any]:
    """Return the chunks' sharded state dicts by Megatron-LM's names."""
    names = ["model"] if len(chunks) == 1 else [f"model{i}" for i in range(len(chunks))]
    return {
        name: chunk.sharded_state_dict(metadata=dict(metadata))
        for name, chunk in zip(names, chunks, strict=True)
    }


def save(args: argparse.Namespace) -> None:
    provider, chunks = build(args)
    if args.checkpoint:
        read(args, chunks)
    else:
        fill(chunks, args.seed)
    metadata: dict[str, Any] = {
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
    }
    if args.per_layer_keys:
        metadata[args.per_layer_keys] = True
    if args.optimizer not in (None, "adam"):
        metadata["distrib_optim_sharding_type"] = args.optimizer
    content = dict(metadata)
    states: dict[str, Any] = {
        "args": common_args(args, provider),
        "checkpoint_version": 3.0,
        "iteration": ITERATION,
        "num_floating_point_operations_so_far": 1e6,
        "rng_state": rng_state(),
    }
    if args.optimizer:
        optimizer, scheduler = train_one_step(args, provider, chunks)
        states |= model_states(chunks, metadata)
        states["optimizer"] = optimizer.sharded_state_dict(states, metadata=dict(metadata))
        states["opt_param_scheduler"] = scheduler.state_dict()
    else:
        states |= model_states(chunks, metadata)
    target = args.out / f"iter_{ITERATION:07d}"
    if dist.get_rank() == 0:
        target.mkdir(parents=True)
    dist.barrier()
    dist_checkpointing.save(states, str(target), content_metadata=content)
    expected = gather_hf(chunks, read_config(args))
    if expected is not None:
        save_file(expected, args.out / "expected.safetensors", metadata={"format": "pt"})
        (args.out / "latest_checkpointed_iteration.txt").write_text(str(ITERATION))


@contextlib.contextmanager
def no_strides() -> Iterator[None]:
    """Let megatron-core 0.19 check keys with torch 2.15.

    TensorProperties has one more field in that torch, and megatron-core passes all fields to
    torch.empty, which rejects it.
    """
    restore = TensorProperties.__setstate__

    def without(self: TensorProperties, state: Any) -> None:
        restore(self, state)
        vars(self).pop("strides", None)

    TensorProperties.__setstate__ = without  # type: ignore[method-assign]
    try:
        yield
    finally:
        TensorProperties.__setstate__ = restore  # type: ignore[method-assign]


def read(args: argparse.Namespace, chunks: list[GPTModel]) -> None:
    """Load the chunks from ``--checkpoint``; fail if a parameter, NaN before, is not loaded."""
    for chunk in chunks:
        for parameter in chunk.parameters():
            torch.nn.init.constant_(parameter, float("nan"))
    content = dist_checkpointing.load_content_metadata(str(args.checkpoint)) or {}
    names = ("non_homogeneous_layers", "singleton_local_shards")
    metadata = {name: content[name] for name in names if name in content}
    wanted = model_states(chunks, metadata)
    strict = StrictHandling(args.strict)
    with no_strides():
        found = dist_checkpointing.load(dict(wanted), str(args.checkpoint), strict=strict)
    for chunk, name in zip(chunks, wanted, strict=True):
        chunk.load_state_dict(found[name], strict=True)
        for parameter, value in chunk.named_parameters():
            assert not value.isnan().any(), f"{parameter} was not loaded, or not all of it"


def load(args: argparse.Namespace) -> None:
    provider, chunks = build(args)
    read(args, chunks)
    config = read_config(args)
    batch = tokens(args, config).to(torch.cuda.current_device())
    with torch.no_grad():
        outputs = run_schedule(chunks, batch, provider, train=False)
        logits = (
            tensor_parallel.gather_from_tensor_model_parallel_region(outputs[0]["logits"])
            if outputs
            else None
        )
    everyone = on_rank_0(logits.cpu() if logits is not None else None)
    if everyone is not None:
        whole = next(logits for logits in everyone if logits is not None)
        torch.save(whole[..., : config.vocab_size].clone(), args.logits)


def keys(args: argparse.Namespace) -> None:
    _, (model,) = build(args)
    metadata = {args.per_layer_keys: True} if args.per_layer_keys else {}
    states = model_states([model], metadata)
    apply_factories(states)
    values = list(nested_values(states))
    listing = {
        "tensors": {
            value.key: {"shape": list(value.global_shape), "dtype": str(value.dtype)[6:]}
            for value in values
            if isinstance(value, ShardedTensor)
        },
        "objects": sorted(v.unique_key for v in values if isinstance(v, ShardedObject)),
    }
    args.json.write_text(json.dumps(listing, indent=2, sort_keys=True))


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(required=True)
    for run in (save, load, keys):
        command = commands.add_parser(run.__name__)
        command.set_defaults(run=run)
        command.add_argument("--hf", type=pathlib.Path, required=True, help="has config.json")
        command.add_argument("--tp", type=int, default=1)
        command.add_argument("--pp", type=int, default=1)
        command.add_argument("--vpp", type=int, help="chunks a rank, with --pp")
        command.add_argument("--sp", action="store_true", help="sequence parallel")
        command.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
        command.add_argument("--vocab-divisible-by", type=int, default=1)
        command.add_argument("--seed", type=int, default=0)
        if run is not keys:
            command.add_argument("--checkpoint", type=pathlib.Path, required=run is load)
            command.add_argument("--tokens", help="JSON: the batch, a list of lists of ids")
            command.add_argument(
                "--strict", choices=("raise_all", "raise_unexpected"), default="raise_unexpected"
            )
        if run is load:
            command.add_argument("--logits", type=pathlib.Path, required=True)
            continue
        command.add_argument(
            "--per-layer-keys",
            nargs="?",
            const="non_homogeneous_layers",
            choices=("non_homogeneous_layers", "singleton_local_shards"),
            help="keys carry the layer's number; the value says which of Megatron's two ways",
        )
        if run is save:
            command.add_argument("--out", type=pathlib.Path, required=True)
            command.add_argument(
                "--optimizer",
                nargs="?",
                const="dp_reshardable",
                choices=("adam", "dp_reshardable", "fully_reshardable"),
                help="train one step and save its state: plain adam, or a distributed optimizer",
            )
        else:
            command.add_argument("--json", type=pathlib.Path, required=True)
    return parser.parse_args(argv)


def main() -> None:
    args = parse()
    with megatron(args):
        args.run(args)


if __name__ == "__main__":
    main()
