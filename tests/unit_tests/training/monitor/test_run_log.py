"""What one sees of a run, and what is written down of it."""

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_olmo_bridge.errors import FormatError, InputError, OutputError
from megatron_olmo_bridge.training.config import LoggingConfig
from megatron_olmo_bridge.training.monitor.history import RunHistory
from megatron_olmo_bridge.training.monitor.records import RunFacts, StepRecord
from megatron_olmo_bridge.training.monitor.run_log import RunLog

H100 = "NVIDIA H100 80GB HBM3"


def facts(steps: int = 40, device: str = "CPU", processes: int = 1, **config: Any) -> RunFacts:
    return RunFacts(
        name="a run",
        steps=steps,
        tokens_per_step=1000,
        parameters=3_000_000,
        flops_per_token=2e9,
        processes=processes,
        device=device,
        config=config,
        versions={"torch": "2.13.0"},
    )


def record(step: int, **changes: Any) -> StepRecord:
    values = {"loss": 2.0, "z_loss": 0.0, "lr": 3e-4, "grad_norm": 1.0, "seconds": 0.5}
    return StepRecord(step=step, tokens=1000 * step, **(values | changes))


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def start(said: list[str]) -> Callable[..., RunLog]:
    def start(
        folder: Path | None = None,
        about: RunFacts | None = None,
        *,
        interval: int = 10,
        resumed_at: int | None = None,
        **settings: Any,
    ) -> RunLog:
        return RunLog(
            about or facts(),
            LoggingConfig(interval=interval, **settings),
            folder,
            resumed_at=resumed_at,
            say=said.append,
        )

    return start


Start = Callable[..., RunLog]


def lines(folder: Path, event: str | None = None) -> list[dict[str, Any]]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    text = (folder / "log.jsonl").read_text()
    every = [json.loads(line, parse_constant=refuse) for line in text.splitlines()]
    return [line for line in every if event in (None, line["event"])]


def cells(text: str) -> list[str]:
    """Split a line on the console into columns, which are at least two spaces apart."""
    return [cell.strip() for cell in text.split("  ") if cell.strip()]


# --------------------------------------------------------------------------------------- the lines


def test_lines_come_after_the_first_step_each_interval_and_the_last(
    start: Start, tmp_path: Path
) -> None:
    log = start(tmp_path, facts(steps=25))
    for step in range(1, 26):
        log.step(record(step))
    assert [line["step"] for line in lines(tmp_path, "step")] == [1, 10, 20, 25]


def test_a_line_has_means_since_the_line_before(start: Start, tmp_path: Path) -> None:
    log = start(tmp_path, interval=3)
    for step in range(1, 7):
        log.step(
            record(
                step,
                loss=float(step),
                z_loss=step / 100,
                grad_norm=step**2,
                lr=step / 8,
                seconds=step / 10,
            )
        )
    first, second, third = lines(tmp_path, "step")
    assert (first["loss"], first["seconds"]) == (1.0, 0.1)
    assert second["loss"] == 2.5  # of steps 2 and 3
    assert third["loss"] == 5.0  # of steps 4, 5 and 6
    assert third["z_loss"] == pytest.approx(0.05)
    assert third["grad_norm"] == pytest.approx((16 + 25 + 36) / 3)
    assert (third["lr"], third["tokens"]) == (6 / 8, 6000)  # the last step's own
    assert third["seconds"] == pytest.approx(0.4 + 0.5 + 0.6)
    assert third["tokens_per_second"] == pytest.approx(3000 / 1.5)
    assert third["flops_per_second"] == pytest.approx(3000 / 1.5 * 2e9)
    assert third["utilisation"] is None  # of a CPU, nobody knows


@pytest.mark.parametrize(
    ("device", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA A100 80GB PCIe", 312e12), (H100, 989e12),
        ("NVIDIA H100 PCIe", 756e12), ("NVIDIA H100 NVL", 835e12), ("NVIDIA H200", 989e12),
        ("NVIDIA B200", 2250e12), ("NVIDIA GB200", 2500e12), ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12), ("NVIDIA A10G", 70e12), ("NVIDIA A10", 125e12),
    ],
)  # fmt: skip
def test_utilisation_is_of_the_peak_of_all_gpus(
    start: Start, tmp_path: Path, device: str, peak: float
) -> None:
    log = start(tmp_path, facts(device=device, processes=4))
    log.step(record(1, seconds=1e-2))  # 1e5 tokens/s of 2e9 FLOP
    (line,) = lines(tmp_path, "step")
    assert line["utilisation"] == pytest.approx(1e5 * 2e9 / (4 * peak))


@pytest.mark.parametrize(
    "about",
    [
        facts(device="NVIDIA H100 64GB"),
        facts(device="NVIDIA A100-SXM4-40GB MIG 1g.5gb"),
        facts(device="AMD Instinct MI300X"),
        facts(device=H100, train={"precision": "float32"}),
    ],
)
def test_no_utilisation_where_the_peak_is_not_known(
    start: Start, tmp_path: Path, said: list[str], about: RunFacts
) -> None:
    start(tmp_path, about).step(record(1))
    assert lines(tmp_path, "step")[0]["utilisation"] is None
    assert "util" not in said[0]


def test_what_is_not_a_number_is_null(start: Start, tmp_path: Path) -> None:
    log = start(tmp_path, facts(optimizer={"eps": math.inf}))
    log.step(record(1, loss=math.nan, grad_norm=math.inf))
    log.evaluation(1, math.nan)
    (line,) = lines(tmp_path, "step")
    assert (line["loss"], line["grad_norm"]) == (None, None)
    assert lines(tmp_path, "evaluation")[0]["loss"] is None
    assert lines(tmp_path, "begin")[0]["config"] == {"optimizer": {"eps": None}}


def test_the_log_is_complete_after_each_call(start: Start, tmp_path: Path) -> None:
    log = start(tmp_path)
    (begin,) = lines(tmp_path)
    assert begin["name"] == "a run"
    assert (begin["event"], begin["parameters"]) == ("begin", 3_000_000)
    log.evaluation(0, 2.5)
    log.event("checkpoint", 10, path="iter_0000010")
    assert [line["event"] for line in lines(tmp_path)] == ["begin", "evaluation", "checkpoint"]
    assert all(line["time"] > 1.7e9 for line in lines(tmp_path))


def test_a_skipped_step_is_noted_at_once(start: Start, tmp_path: Path, said: list[str]) -> None:
    start(tmp_path).step(record(7, loss=9.5, grad_norm=40.0, skipped=True))
    assert said == [">> skipped at step 7: not taken (loss 9.5000, gradient norm 40)"]
    assert lines(tmp_path, "skipped")[0]["step"] == 7


# -------------------------------------------------------------------------------------- the console


def test_the_console(start: Start, said: list[str]) -> None:
    log = start(None, facts(steps=40, device=H100, processes=8))
    for step in range(1, 11):
        log.step(record(step, loss=2.0, seconds=1e-3))
    header, first, second = said
    assert cells(header) == [
        "step",
        "tokens",
        "loss",
        "ppl",
        "lr",
        "grad norm",
        "tokens/s",
        "FLOP/s",
        "util",
        "time left",
    ]
    assert cells(first)[0] == "1/40"
    assert cells(second) == [
        "10/40",
        "10.0K",
        "2.0000",
        "7.39",
        "3.00e-04",
        "1.000",
        "1.00M",
        "2.00P",
        "25.3%",
        "0.0s",
    ]


def test_time_left_is_of_the_usual_step(start: Start, said: list[str]) -> None:
    log = start(None, facts(steps=1010), interval=10)
    for step in range(1, 11):
        log.step(record(step, seconds=120.0 if step == 1 else 7.5))
    assert cells(said[-1])[-1] == "2h 05m"  # 1000 steps of 7.5 s; the first one compiled


def test_columns_are_aligned_within_100(start: Start, said: list[str]) -> None:
    log = start(None, facts(steps=1_907_359, device=H100), interval=1)
    for step, loss, seconds in ((1, 11.9, 40.0), (999_999, math.nan, 4e-3), (1_907_359, 80.0, 1.0)):
        log.step(record(step, loss=loss, seconds=seconds, grad_norm=loss * 1e4))
    assert len(said) == 4
    assert {len(text) for text in said} == {len(said[0])}
    assert len(said[0]) <= 100


def test_the_header_comes_again(start: Start, said: list[str]) -> None:
    log = start(None, facts(steps=100), interval=1)
    for step in range(1, 42):
        log.step(record(step))
    headers = [number for number, text in enumerate(said) if "grad norm" in text]
    assert headers == [0, 21, 42]


def test_evaluations_and_events_stand_out(start: Start, said: list[str]) -> None:
    log = start()
    log.evaluation(20, math.log(20.0))
    log.event("checkpoint", 20, path=Path("run/iter_0000020"))
    log.event("stopped", 20, message="the loss is not a number")
    log.event("done", 20)
    assert said == [
        ">> evaluation at step 20: loss 2.9957, perplexity 20.00",
        ">> checkpoint at step 20: run/iter_0000020",
        ">> stopped at step 20: the loss is not a number",
        ">> done at step 20",
    ]


def test_a_loss_too_large_for_a_perplexity(start: Start, said: list[str]) -> None:
    start().step(record(1, loss=1e5))
    assert cells(said[-1])[2:4] == ["100000.0000", "inf"]


# ----------------------------------------------------------------------------------------- resuming


def killed_at_35(start: Start, folder: Path) -> None:
    """A run with a checkpoint at 20, and a line that was being written when it died."""
    log = start(folder)
    log.evaluation(0, 9.0)
    for step in range(1, 36):
        log.step(record(step, loss=100.0 + step))
        if step % 20 == 0:
            log.event("checkpoint", step)
        if step == 25:
            log.evaluation(step, 5.0)
    with (folder / "log.jsonl").open("a") as file:
        file.write('{"event": "step", "step": 40, "lo')


def test_a_resumed_run_has_each_step_once(start: Start, tmp_path: Path, said: list[str]) -> None:
    killed_at_35(start, tmp_path)
    log = start(tmp_path, resumed_at=20)
    assert said[-1] == ">> resumed at step 20"
    for step in range(21, 41):
        log.step(record(step, loss=float(step)))
    log.evaluation(40, 4.0)
    steps = lines(tmp_path, "step")
    assert [line["step"] for line in steps] == [1, 10, 20, 30, 40]
    assert [line["loss"] for line in steps[3:]] == [25.5, 35.5]  # nothing of what was dropped
    assert [line["step"] for line in lines(tmp_path, "evaluation")] == [0, 40]
    assert [line["step"] for line in lines(tmp_path, "checkpoint")] == [20]
    assert [line["step"] for line in lines(tmp_path, "resumed")] == [20]
    assert [path.name for path in tmp_path.iterdir()] == ["log.jsonl"]


@pytest.mark.parametrize("event", ["stopped", "done", "extended"])
def test_what_became_of_the_run_stays_in_the_log(start: Start, tmp_path: Path, event: str) -> None:
    """Also where it goes back to an earlier step."""
    start(tmp_path).event(event, 35, message="a spike")
    start(tmp_path, resumed_at=20)
    assert [line["event"] for line in lines(tmp_path)] == ["begin", event, "resumed"]


def test_a_run_that_begins_again_keeps_what_happened(start: Start, tmp_path: Path) -> None:
    """Killed before its first checkpoint, for example. It takes all its steps again."""
    log = start(tmp_path)
    log.evaluation(0, 9.0)
    log.step(record(1))
    log.event("stopped", 1, message="a spike")
    start(tmp_path).evaluation(0, 9.0)
    assert [line["event"] for line in lines(tmp_path)] == [
        "begin",
        "stopped",
        "begin",
        "evaluation",
    ]


TORN = {
    "cut short": lambda line: line[:-20],
    "without its end, and the next one after it": lambda line: line[:30] + line,
    "zeros": lambda line: "\0" * len(line),
    "not UTF-8": lambda line: "\udcff" + line,
    "empty": lambda line: "",
    "no object": lambda line: f"[{line}]",
    "no event": lambda line: line.replace('"event"', '"evert"'),
    "no step": lambda line: line.replace('"step":', '"stop":'),
    "no numbers": lambda line: line.replace('"lr": 0.0003', '"lr": "0.0003"'),
    "deep": lambda line: "[" * 100_000,
}


@pytest.mark.parametrize("damage", TORN.values(), ids=list(TORN))
def test_damaged_lines_are_told_of_and_left_out(
    start: Start, tmp_path: Path, said: list[str], damage: Callable[[str], str]
) -> None:
    """Skipped by the resumed run, which writes the other lines again, and by the report."""
    killed_at_35(start, tmp_path)
    path = tmp_path / "log.jsonl"
    every = path.read_text().splitlines()
    third, last = every[2], len(every)
    assert '"step": 1,' in third
    every[2] = damage(third)
    path.write_bytes("\n".join(every).encode(errors="surrogateescape"))

    history = RunHistory.read(tmp_path)
    assert history.sentence.endswith(f" Damaged in log.jsonl, and left out: lines 3, {last}.")
    assert [line["step"] for line in history.steps] == [10, 20, 30]
    start(tmp_path, resumed_at=20)
    assert said[-2] == f">> {path}: left out what is damaged, lines 3, {last}"
    assert [line["step"] for line in lines(tmp_path, "step")] == [10, 20]


def test_of_many_damaged_lines_the_first_are_named(start: Start, tmp_path: Path) -> None:
    start(tmp_path)
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write("torn\n" * 20)
    assert "lines 2, 3, 4, 5, 6, 7, 8, 9 and 12 more." in RunHistory.read(tmp_path).sentence


def test_a_log_that_is_none_is_left_as_it_is(start: Start, tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text("step loss\n1 10.2\n")
    with pytest.raises(FormatError, match=r"log.jsonl: no line is an event in JSON. Move the file"):
        start(tmp_path, resumed_at=20)
    assert path.read_text() == "step loss\n1 10.2\n"


def test_a_log_on_a_full_disk(start: Start, tmp_path: Path) -> None:
    """Where the disk fills up while the run goes on: a sentence that names the file."""
    log = start(tmp_path)
    assert log._file is not None
    log._file._file = Path("/dev/full").open("a")  # noqa: SIM115
    with pytest.raises(OutputError, match=r"log.jsonl: can't be written: No space left on device"):
        log.step(record(1))
    log._file.close()


# ----------------------------------------------------------------------------------------- trackers


def test_tensorboard(start: Start, tmp_path: Path) -> None:
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")

    def scalars(tag: str) -> list[tuple[int, float]]:
        loaded = accumulators.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
        return [(event.step, event.value) for event in loaded.Scalars(tag)]

    log = start(tmp_path, tensorboard=True)
    for step in range(1, 31):
        log.step(record(step, loss=float(step)))
    log.evaluation(30, 3.5)
    log.close()
    assert scalars("train/loss") == [(1, 1.0), (10, 6.0), (20, 15.5), (30, 25.5)]
    assert scalars("evaluation/loss") == [(30, 3.5)]
    log = start(tmp_path, tensorboard=True, resumed_at=20)
    for step in range(21, 31):
        log.step(record(step, loss=0.0))
    log.close()
    assert scalars("train/loss") == [(1, 1.0), (10, 6.0), (20, 15.5), (30, 0.0)]


def test_tensorboard_needs_a_folder(start: Start) -> None:
    with pytest.raises(InputError, match=r"set checkpoint\.save"):
        start(None, tensorboard=True)


def test_wandb_is_asked_for_only_when_wanted(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    start(tmp_path / "a").step(record(1))
    with pytest.raises(InputError, match="pip install wandb"):
        start(tmp_path / "b", wandb_project="olmo")


def test_a_resumed_run_goes_on_in_the_same_wandb_run(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    log = start(tmp_path, wandb_project="olmo")
    log.step(record(1))
    log.close()
    identity = (tmp_path / "wandb_id.txt").read_text()
    start(tmp_path, wandb_project="olmo", resumed_at=1).close()
    assert (tmp_path / "wandb_id.txt").read_text() == identity
    runs = list((tmp_path / "wandb").glob("offline-run-*"))
    assert len(runs) == 2
    assert all(run.name.endswith(identity.strip()) for run in runs)
