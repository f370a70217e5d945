"""Process groups: what srun says, what torchrun is to be told, and one process by itself."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("megatron.core")
if torch.cuda.is_available():
    pytest.skip("written for the CPU runtime", allow_module_level=True)

import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from megatron_olmo_bridge.errors import BridgeError, InputError
from megatron_olmo_bridge.runtime.cpu import cpu_runtime
from megatron_olmo_bridge.runtime.process_groups import (
    SEED,
    TIMEOUT_MINUTES,
    add_slurm,
    destroy_process_groups,
    ensure_process_groups,
    first_host,
    on_first,
    torchrun_command,
    wait_for_all,
)

# ------------------------------------------------------------------------------ what srun says

SRUN = {
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NODELIST": "gpu[003-004]",
    "SLURM_JOB_ID": "31007",
}
"""Variables of the last of four tasks on two nodes."""


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [
        ("localhost", "localhost"),
        ("gpu003", "gpu003"),
        ("gpu003,gpu007", "gpu003"),
        ("gpu[003-005,7],login", "gpu003"),
        ("gpu[003,007]", "gpu003"),
        ("gpu[9-11]", "gpu9"),
        ("login,gpu[003-005]", "login"),
        ("gpu-a-[01-02]", "gpu-a-01"),
        ("gpu[01-02]-ib", "gpu01-ib"),
        ("gpu[01-02].cluster.example,login", "gpu01.cluster.example"),
        ("node1.cluster.example", "node1.cluster.example"),
    ],
)
def test_the_first_host_of_a_node_list(nodelist: str, host: str) -> None:
    assert first_host(nodelist) == host


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [("rack[1-2]node[3-4]", "rack1node3"), ("rack[0-63]_blade[0-41]-x,login", "rack0_blade0-x")],
)
def test_the_first_host_of_a_list_in_two_dimensions(nodelist: str, host: str) -> None:
    assert first_host(nodelist) == host


@pytest.mark.parametrize("nodelist", ["gpu[", "gpu[]", "gpu[003"])
def test_a_node_list_that_is_cut_off_is_refused(nodelist: str) -> None:
    with pytest.raises(InputError, match="is not a list of Slurm nodes"):
        first_host(nodelist)


@pytest.mark.parametrize("nodelist", ["", "[003-005]", ",gpu003", "]"])
def test_what_is_no_node_list_is_refused(nodelist: str) -> None:
    with pytest.raises(InputError) as caught:
        first_host(nodelist)
    assert str(caught.value) == f"{nodelist!r} is not a list of Slurm nodes"


def test_sruns_variables_become_torchruns() -> None:
    env = dict(SRUN)
    add_slurm(env)
    assert {name: env[name] for name in env.keys() - SRUN.keys()} == {
        "RANK": "3",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "gpu003",
        "MASTER_PORT": "16007",  # 15000 and the job's number modulo 15000
    }


def test_all_tasks_of_a_job_meet_at_one_place_and_other_jobs_elsewhere() -> None:
    def meeting_place(**changes: str) -> str:
        env = SRUN | changes
        add_slurm(env)
        return f"{env['MASTER_ADDR']}:{env['MASTER_PORT']}"

    assert meeting_place(SLURM_PROCID="0", SLURM_LOCALID="0") == meeting_place()
    assert meeting_place(SLURM_JOB_ID="31008") != meeting_place()
    for job in ("1", "14999", "15000", "99999999"):
        assert 1024 < int(meeting_place(SLURM_JOB_ID=job).rpartition(":")[2]) < 32768


def test_a_meeting_place_that_is_given_is_kept() -> None:
    env = SRUN | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "4711"}
    add_slurm(env)
    assert (env["MASTER_ADDR"], env["MASTER_PORT"]) == ("10.0.0.1", "4711")


def test_of_one_task_there_is_nothing_to_say() -> None:
    env = {"SLURM_STEP_NUM_TASKS": "1"}
    add_slurm(env)
    assert env == {"SLURM_STEP_NUM_TASKS": "1"}


@pytest.mark.parametrize("name", SRUN)
def test_a_variable_that_is_missing_is_named(name: str) -> None:
    env = {key: value for key, value in SRUN.items() if key != name}
    with pytest.raises(InputError, match=f"task of srun, but {name} is not set"):
        add_slurm(env)


# --------------------------------------------------------------------- what torchrun is to be told


@pytest.mark.parametrize(
    ("argv", "command"),
    [
        (["train.py"], "torchrun --nproc_per_node 4 train.py"),
        (["a b/train.py", "--out", "my run"],
         "torchrun --nproc_per_node 4 'a b/train.py' --out 'my run'"),
        # Not started as a script: there is no name to say.
        (["-c"], "torchrun --nproc_per_node 4 YOUR_SCRIPT.py"),
        (["/usr/bin/ipython", "--quick"], "torchrun --nproc_per_node 4 YOUR_SCRIPT.py"),
        ([], "torchrun --nproc_per_node 4 YOUR_SCRIPT.py"),
    ],
)  # fmt: skip
def test_the_torchrun_command_starts_the_running_script(
    argv: list[str], command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", argv)
    assert torchrun_command(4) == command


# ---------------------------------------------------------------------------------- one process


def layout(tp: int = 1, pp: int = 1, vpp: int | None = None) -> SimpleNamespace:
    return SimpleNamespace(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=vpp,
        expert_model_parallel_size=1,
        expert_tensor_parallel_size=None,
    )


@pytest.fixture
def by_itself(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Neither torchrun nor srun started this process; what is set up is torn down."""
    for name in ("RANK", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    with cpu_runtime():
        yield
        destroy_process_groups()


@pytest.mark.usefixtures("by_itself")
def test_one_process_needs_nobody_to_start_it() -> None:
    ensure_process_groups(layout())
    assert (dist.get_world_size(), dist.get_backend()) == (1, "gloo")
    assert parallel_state.get_tensor_model_parallel_world_size() == 1
    assert parallel_state.get_pipeline_model_parallel_world_size() == 1
    assert tensor_parallel.get_cuda_rng_tracker().is_initialized()


@pytest.mark.usefixtures("by_itself")
@pytest.mark.parametrize("minutes", [TIMEOUT_MINUTES, 7])
def test_all_groups_wait_as_long_as_they_are_told(minutes: int) -> None:
    ensure_process_groups(layout(), timeout_minutes=minutes)
    for group in (dist.group.WORLD, parallel_state.get_tensor_model_parallel_group()):
        backend = group._get_backend(torch.device("cpu"))
        assert backend.options._timeout == timedelta(minutes=minutes)


@pytest.mark.usefixtures("by_itself")
def test_under_nccl_the_others_wait_on_gloo(monkeypatch: pytest.MonkeyPatch) -> None:
    """In one group, made once; and anew after the groups are destroyed."""
    ensure_process_groups(layout(), timeout_minutes=7)
    original, waited = dist.broadcast_object_list, []
    monkeypatch.setattr(dist, "get_backend", lambda *_: "nccl")
    monkeypatch.setattr(
        dist,
        "broadcast_object_list",
        lambda objects, source, group: waited.append(group) or original(objects, source, group),
    )
    assert on_first(lambda: 1) == on_first(lambda: 1)
    wait_for_all()
    assert waited[0] is waited[1] is not dist.group.WORLD
    backend = waited[0]._get_backend(torch.device("cpu"))
    assert (backend.name(), backend.options._timeout) == ("gloo", timedelta(minutes=7))

    destroy_process_groups()
    ensure_process_groups(layout())
    on_first(lambda: 1)
    assert waited[2] is not waited[0]


@pytest.mark.usefixtures("by_itself")
def test_the_seed_fixes_the_random_numbers() -> None:
    def drawn(**seed: int) -> list[float]:
        ensure_process_groups(layout(), **seed)
        tracker = tensor_parallel.get_cuda_rng_tracker()
        with tracker.fork():
            numbers = torch.rand(4).tolist()
        tracker.reset()
        return numbers

    assert drawn(seed=7) == drawn(seed=7) != drawn(seed=8)
    assert drawn() == drawn(seed=SEED)


@pytest.mark.usefixtures("by_itself")
def test_what_the_users_own_code_set_up_is_left_alone() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(99)
    states = tensor_parallel.get_cuda_rng_tracker().get_states()
    group = parallel_state.get_tensor_model_parallel_group()
    ensure_process_groups(layout(), seed=1)
    assert parallel_state.get_tensor_model_parallel_group() is group
    kept = tensor_parallel.get_cuda_rng_tracker().get_states()
    assert all(torch.equal(kept[name], states[name]) for name in states)


@pytest.mark.usefixtures("by_itself")
def test_a_second_call_for_the_same_layout_changes_nothing() -> None:
    ensure_process_groups(layout())
    group = parallel_state.get_tensor_model_parallel_group()
    ensure_process_groups(layout())
    assert parallel_state.get_tensor_model_parallel_group() is group


@pytest.mark.usefixtures("by_itself")
def test_another_layout_is_refused_until_the_groups_are_destroyed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ensure_process_groups(layout())
    # One process cannot have two stages; say that it does, to come to the comparison.
    monkeypatch.setattr(dist, "get_world_size", lambda *_: 2)
    with pytest.raises(InputError) as caught:
        ensure_process_groups(layout(pp=2, vpp=2))
    assert str(caught.value) == (
        "this process has groups for tensor, pipeline, virtual pipeline and expert sizes "
        "(1, 1, None, 1), the model asks for (1, 2, 2, 1). Call destroy_process_groups() before "
        "another layout."
    )
    monkeypatch.undo()
    destroy_process_groups()
    assert not dist.is_initialized()
    assert not parallel_state.model_parallel_is_initialized()
    ensure_process_groups(layout())


@pytest.mark.usefixtures("by_itself")
@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2), (2, 3)])
def test_too_few_processes_are_refused_with_the_command_to_use(
    tp: int, pp: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", "--steps", "5"])
    with pytest.raises(InputError) as caught:
        ensure_process_groups(layout(tp, pp))
    assert str(caught.value) == (
        f"tensor_model_parallel_size {tp} x pipeline_model_parallel_size {pp} takes {tp * pp} "
        "processes or a multiple of it, here is 1. Start it as:\n"
        f"  torchrun --nproc_per_node {tp * pp} train.py --steps 5"
    )
    assert not parallel_state.model_parallel_is_initialized()


@pytest.mark.usefixtures("by_itself")
def test_after_destroying_another_seed_can_be_set() -> None:
    states = []
    for seed in (1, 2):
        ensure_process_groups(layout(), seed=seed)
        states.append(tensor_parallel.get_cuda_rng_tracker().get_states())
        destroy_process_groups()
    assert states[0].keys() == states[1].keys()
    assert not any(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_destroying_what_was_never_set_up_is_no_error() -> None:
    destroy_process_groups()
    assert not dist.is_initialized()


# ------------------------------------------------------------------------------ the first process


@pytest.mark.usefixtures("by_itself")
def test_the_first_process_gets_the_result() -> None:
    ensure_process_groups(layout())
    assert on_first(lambda: 42) == 42


@pytest.mark.usefixtures("by_itself")
def test_the_others_wait_and_get_none(monkeypatch: pytest.MonkeyPatch) -> None:
    ensure_process_groups(layout())
    waited = []
    monkeypatch.setattr(dist, "get_rank", lambda *_: 1)
    monkeypatch.setattr(dist, "broadcast_object_list", lambda *_: waited.append(True))
    assert on_first(lambda: pytest.fail("not the first process")) is None
    assert waited


@pytest.mark.usefixtures("by_itself")
def test_an_error_of_the_first_process_is_everybodys(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise InputError("no such folder")

    ensure_process_groups(layout())
    with pytest.raises(InputError, match="no such folder"):
        on_first(refuse)

    def receive(errors: list[BridgeError | None], *_: object) -> None:
        errors[0] = InputError("said by the first")

    monkeypatch.setattr(dist, "get_rank", lambda *_: 1)
    monkeypatch.setattr(dist, "broadcast_object_list", receive)
    with pytest.raises(InputError, match="said by the first"):
        on_first(refuse)


# --------------------------------------------------------------------------- for the whole process

WITHOUT_TORCHRUN = """
import atexit, logging, sys
from types import SimpleNamespace
import torch
import torch.distributed as dist
from megatron_olmo_bridge.runtime.process_groups import (
    destroy_process_groups, ensure_process_groups)

atexit.register(lambda: print("at exit:", dist.is_initialized()))  # runs after what comes later
layout = SimpleNamespace(tensor_model_parallel_size=1, pipeline_model_parallel_size=1,
                         virtual_pipeline_model_parallel_size=None,
                         expert_model_parallel_size=1, expert_tensor_parallel_size=None)
for _ in range(2):
    ensure_process_groups(layout)
    assert dist.get_world_size() == 1
    assert torch.zeros(1, device="cuda").device.type == "cpu"
    destroy_process_groups()
assert not dist.is_initialized()
ensure_process_groups(layout)
"""


def test_without_cuda_the_cpu_stands_in_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("RANK", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", WITHOUT_TORCHRUN], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("no CUDA here: megatron-core runs on the CPU, on gloo") == 1
    assert done.stdout == "at exit: False\n", "gloo's threads abort one process in thirty"
