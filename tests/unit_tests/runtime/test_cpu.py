"""The CPU runtime: each patch is needed, real random states, and nothing stays behind."""

from __future__ import annotations

import contextlib
import os
import pkgutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import ProcessRaisedException

pytest.importorskip("megatron.core")
if torch.cuda.is_available():
    pytest.skip("cpu_runtime() is for machines without CUDA", allow_module_level=True)

from megatron.core import dist_checkpointing, package_info, parallel_state, tensor_parallel
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import random as megatron_random
from slow import slow_but

from megatron_olmo_bridge.models.olmo2.config import Olmo2Config
from megatron_olmo_bridge.models.olmo2.provider import Olmo2ModelProvider
from megatron_olmo_bridge.runtime import cpu
from megatron_olmo_bridge.runtime.cpu import PATCHES, Patch, cpu_runtime, ensure_cpu_runtime

VERSION = tuple(int(part) for part in package_info.__version__.split(".")[:2])
TINY = Olmo2Config(
    num_layers=1,
    hidden_size=16,
    ffn_hidden_size=32,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=4,
    vocab_size=32,
    max_position_embeddings=16,
    layernorm_epsilon=1e-6,
    rotary_base=500000.0,
)


@contextlib.contextmanager
def one_process() -> Iterator[None]:
    """The runtime with the process groups of a single process."""
    try:
        with cpu_runtime():
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
            parallel_state.initialize_model_parallel()
            yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def current(patch: Patch) -> Any:
    return vars(pkgutil.resolve_name(patch.owner)).get(patch.name, "absent")


def train_save_and_load(folder: Path) -> None:
    """What the runtime is for, with one process: build, train a step, save, load."""
    with one_process():
        tensor_parallel.model_parallel_cuda_manual_seed(1)
        provider = Olmo2ModelProvider(**asdict(TINY), hidden_dropout=0.1)
        model = provider.provide()
        check_random_states()

        provider.finalize_model_grads_func = finalize_model_grads
        wrapped = DistributedDataParallel(
            provider, DistributedDataParallelConfig(use_distributed_optimizer=True), model
        )
        optimizer = get_megatron_optimizer(
            OptimizerConfig(lr=1e-2, min_lr=0.0, clip_grad=1.0, use_distributed_optimizer=True),
            [wrapped],
        )
        tokens = torch.arange(8)[None]

        def step(_: Any, chunk: Any) -> Any:
            losses = chunk(tokens, tokens, None, labels=tokens)
            return losses, lambda x: (x.mean(), {"loss": x.detach().mean()})

        get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=iter(()),
            model=[wrapped],
            num_microbatches=1,
            seq_length=8,
            micro_batch_size=1,
            forward_only=False,
        )
        assert optimizer.step()[0]

        dist_checkpointing.save({"model": model.sharded_state_dict()}, str(folder))
        saved = {name: value.clone() for name, value in model.named_parameters()}
        for parameter in model.parameters():
            torch.nn.init.constant_(parameter, float("nan"))
        found = dist_checkpointing.load({"model": model.sharded_state_dict()}, str(folder))
        model.load_state_dict(found["model"])
        assert all(torch.equal(saved[name], value) for name, value in model.named_parameters())
    assert megatron_random._CUDA_RNG_STATE_TRACKER is None
    assert not megatron_random._CUDA_RNG_STATE_TRACKER_INITIALIZED


def check_random_states() -> None:
    """The tracker forks seeded states, and leaves the default one alone."""
    tracker = tensor_parallel.get_cuda_rng_tracker()

    def draw() -> list[list[float]]:
        with tracker.fork():
            return [torch.rand(2).tolist(), torch.rand(2).tolist()]

    tensor_parallel.model_parallel_cuda_manual_seed(5)
    first = [draw(), torch.rand(2).tolist(), draw()]
    tensor_parallel.model_parallel_cuda_manual_seed(5)
    default = torch.rand(2).tolist()
    assert [draw(), default, draw()] == first, "drawing in a fork and outside influence each other"
    assert first[0] != first[2], "the forked state must go on, not begin anew"
    tensor_parallel.model_parallel_cuda_manual_seed(6)
    assert draw() != first[0]

    states = tracker.get_states()
    following = draw()
    tracker.set_states(states)
    assert draw() == following, "a saved state must bring the same numbers again"


def test_stock_megatron_trains_saves_and_loads(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train_save_and_load(tmp_path)
    assert "CPU RNG state changed" not in caplog.text


@pytest.mark.parametrize(
    "patch", [p for p in PATCHES if p.name != "cuda"], ids=lambda p: f"{p.owner}.{p.name}"
)
def test_patch_is_still_needed(
    patch: Patch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if patch.name == "current_stream" and VERSION < (0, 19):
        pytest.skip("megatron-core before 0.19 doesn't ask for the current stream")
    monkeypatch.setattr(cpu, "PATCHES", tuple(p for p in PATCHES if p is not patch))
    monkeypatch.setattr(megatron_random, "_CUDA_RNG_STATE_TRACKER", None)
    monkeypatch.setattr(megatron_random, "_CUDA_RNG_STATE_TRACKER_INITIALIZED", False)
    with pytest.raises((AssertionError, AttributeError, RuntimeError, TypeError)):
        train_save_and_load(tmp_path)


def tied_embeddings_over_two_stages(rank: int, store: str, without: str | None) -> None:
    cpu.PATCHES = tuple(patch for patch in PATCHES if patch.name != without)
    with cpu_runtime():
        dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2)
        parallel_state.initialize_model_parallel(pipeline_model_parallel_size=2)
        tensor_parallel.model_parallel_cuda_manual_seed(1)
        config = replace(TINY, num_layers=2, share_embeddings_and_output_weights=True)
        model = Olmo2ModelProvider(**asdict(config), pipeline_model_parallel_size=2).provide()
        assert model.shared_embedding_or_output_weight().abs().sum() > 0
        dist.barrier()  # a rank that leaves early would end the other's connection
        dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("without", [None, "cuda"])
def test_tied_embeddings_need_tensor_cuda(tmp_path: Path, without: str | None) -> None:
    expected = (
        contextlib.nullcontext() if without is None else pytest.raises(ProcessRaisedException)
    )
    with expected:
        torch.multiprocessing.spawn(
            tied_embeddings_over_two_stages, (str(tmp_path / "store"), without), nprocs=2
        )


def test_device_mode_is_still_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_CudaToCpu", contextlib.nullcontext)
    with pytest.raises((AssertionError, RuntimeError)):
        train_save_and_load(tmp_path)


def test_log_filter_is_still_needed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cpu, "_no_fork_warning", contextlib.nullcontext)
    with one_process():
        tensor_parallel.model_parallel_cuda_manual_seed(1)
        check_random_states()
    assert "CPU RNG state changed" in caplog.text


@pytest.mark.parametrize("nested", [False, True])
def test_everything_is_restored(nested: bool) -> None:
    before = [current(patch) for patch in PATCHES]
    with contextlib.ExitStack() as stack, pytest.raises(KeyError):
        for _ in range(1 + nested):
            stack.enter_context(cpu_runtime())
        assert torch.zeros(1, device="cuda").device.type == "cpu"
        assert torch.zeros(1).type() == "torch.cuda.FloatTensor"
        assert torch.zeros(1, dtype=torch.bfloat16).type() == "torch.cuda.BFloat16Tensor"
        raise KeyError
    assert [current(patch) for patch in PATCHES] == before
    assert torch.zeros(1).type() == "torch.FloatTensor"
    with pytest.raises((AssertionError, RuntimeError)):
        torch.zeros(1, device="cuda")


def test_converting_by_type_still_works() -> None:
    with cpu_runtime():
        assert torch.zeros(1).type(torch.float64).dtype is torch.float64


def test_refuses_where_cuda_is_available(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(RuntimeError, match="CUDA is available"), cpu_runtime():
        pass


FOR_GOOD = """
import torch
from megatron_olmo_bridge.runtime.cpu import cpu_runtime, ensure_cpu_runtime

ensure_cpu_runtime()
assert torch.zeros(1, device="cuda").device.type == "cpu"
ensure_cpu_runtime()
with cpu_runtime():
    pass
assert torch.cuda.current_device() == torch.device("cpu"), "the inner one ended the outer one"
assert torch.zeros(1).type() == "torch.cuda.FloatTensor"
"""


@pytest.mark.parametrize(("rank", "said"), slow_but([(None, 1)], [(None, 1), ("1", 0)]))
def test_ensured_for_good_and_said_once_by_the_first_process(rank: str | None, said: int) -> None:
    env = {name: value for name, value in os.environ.items() if name != "RANK"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FOR_GOOD],
        capture_output=True,
        text=True,
        env=env if rank is None else env | {"RANK": rank},
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("no CUDA here: megatron-core runs on the CPU, on gloo") == said


def test_ensuring_does_nothing_within_the_runtime() -> None:
    before = [current(patch) for patch in PATCHES]
    with cpu_runtime():
        ensure_cpu_runtime()
    assert [current(patch) for patch in PATCHES] == before


def test_ensuring_does_nothing_where_there_is_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    before = [current(patch) for patch in PATCHES]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    ensure_cpu_runtime()
    assert [current(patch) for patch in PATCHES] == before
