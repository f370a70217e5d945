"""report.html, and the command that makes it again."""

import base64
import json
import math
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner, Result

from megatron_olmo_bridge.cli import training
from megatron_olmo_bridge.errors import FormatError
from megatron_olmo_bridge.training.config import LoggingConfig
from megatron_olmo_bridge.training.monitor.history import RunHistory
from megatron_olmo_bridge.training.monitor.records import RunFacts, StepRecord
from megatron_olmo_bridge.training.monitor.report import write_report
from megatron_olmo_bridge.training.monitor.run_log import RunLog

PLOTS = ["loss", "learning-rate", "gradient-norm", "throughput"]
VOID = {"meta", "img", "source"}


class Page(HTMLParser):
    """A page taken apart. Each tag must be closed, in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []
        self.links: list[str] = []
        self.figures: dict[str, list[dict[str, str | None]]] = {}
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag not in VOID:
            self.open.append(tag)
        if tag == "figure":
            self.figures[values["id"] or ""] = []
        if tag in ("img", "source"):
            list(self.figures.values())[-1].append(values)
        self.links += [v for k, v in attrs if k in ("href", "src", "srcset") and v]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip() and self.open[-1] != "style":
            self.texts.append(data.strip())

    def after(self, label: str) -> str:
        return self.texts[self.texts.index(label) + 1]


def svg(picture: dict[str, str | None]) -> str:
    data = picture.get("src") or picture.get("srcset") or ""
    kind, _, content = data.partition(",")
    assert kind == "data:image/svg+xml;base64"
    return base64.b64decode(content).decode()


def drawn(picture: dict[str, str | None]) -> list[str]:
    """The texts of a picture: ticks, labels, legend."""
    root = ET.fromstring(svg(picture))
    return ["".join(e.itertext()) for e in root.iter("{http://www.w3.org/2000/svg}text")]


Make = Callable[..., Path]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """A run's folder with a report, by what happened in the run."""

    def make(
        steps: int,
        happened: Callable[[RunLog], object] = lambda _: None,
        *,
        of: int | None = None,
        device: str = "CPU",
        loss: Callable[[int], float] = lambda step: 2 + 8 / step,
        **changes: Any,
    ) -> Path:
        folder = tmp_path_factory.mktemp("run")
        about: dict[str, Any] = {
            "name": "a run",
            "steps": of or steps,
            "tokens_per_step": 1000,
            "processes": 2,
            "parameters": 1_484_916_736,
            "flops_per_token": 1e10,
            "device": device,
            "config": {},
            "versions": {"torch": "2.13.0"},
        }
        log = RunLog(RunFacts(**(about | changes)), LoggingConfig(interval=1), folder, say=str)
        for s in range(1, steps + 1):
            log.step(StepRecord(s, 1000 * s, loss(s), 1e-5, 3e-4, loss(s) / 4, 0.5, s == 42))
        happened(log)
        log.close()
        return folder

    return make


def end(log: RunLog) -> None:
    log.evaluation(50, 2.5)
    log.event("checkpoint", 50, path="/runs/<b>/iter_0000050")
    log.evaluation(100, 2.25)
    log.event("done", 100)


CONFIG = {
    "optimizer": {"lr": 3e-4, "clip_grad": 1.0},
    "data": {"path": ["a<script>alert(1)</script>b"], "cache": None},
    "sources": {"optimizer": "https://example.org/?a=1&b=2", "optimizer.lr": "table 9"},
}


@pytest.fixture(scope="module")
def done(make: Make) -> Path:
    return make(100, end, name="OLMo <1B> & co", config=CONFIG, device="NVIDIA H100 80GB HBM3")


@pytest.fixture(scope="module")
def page(done: Path) -> Page:
    return Page((done / "report.html").read_text())


# ----------------------------------------------------------------------------------------- the page


def test_key_figures(page: Page) -> None:
    shown = {
        "Final loss": "2.0800",
        "Perplexity": "8.00",
        "Evaluation loss": "2.2500",
        "Tokens": "100K",
        "Parameters": "1.48B",
        "Time in steps": "50s",
        "Tokens/s": "2.00K",
        "Utilization": "1.0%",
        "Skipped steps": "1",
    }
    assert {label: page.after(label) for label in shown} == shown
    assert page.after("2.00K") == "20.0 TFLOP/s"
    assert page.after("done") == "All 100 steps are done."


def test_all_text_is_escaped(page: Page, done: Path) -> None:
    text = (done / "report.html").read_text()
    assert "<script" not in text
    assert "<1B>" not in text
    assert page.after("Training report") == "OLMo <1B> & co"
    assert "/runs/<b>/iter_0000050" in page.texts


def test_the_file_needs_no_network(page: Page) -> None:
    others = [link for link in page.links if not link.startswith("data:")]
    assert others == ["https://example.org/?a=1&b=2"]  # a source, to click on


def test_the_whole_config_with_its_sources(page: Page) -> None:
    assert page.after("optimizer") == "https://example.org/?a=1&b=2"
    assert page.texts[page.texts.index("optimizer.lr") :][:3] == [
        "optimizer.lr",
        "0.0003",
        "table 9",
    ]
    assert page.after("data.path") == '["a<script>alert(1)</script>b"]'
    assert page.after("data.cache") == "null"
    assert "torch 2.13.0" in page.texts


@pytest.mark.parametrize("name", PLOTS)
def test_each_plot_in_two_themes_and_two_widths(page: Page, name: str) -> None:
    pictures = page.figures[name]
    assert [picture.get("media") for picture in pictures] == [
        "(max-width: 640px) and (prefers-color-scheme: dark)",
        "(max-width: 640px)",
        "(prefers-color-scheme: dark)",
        None,
    ]
    assert len({svg(picture) for picture in pictures}) == 4
    for picture in pictures:
        assert {"tokens", "steps"} <= set(drawn(picture))
    assert pictures[-1]["alt"]


def test_ticks_are_round_numbers_of_tokens_steps_and_rates(page: Page) -> None:
    ticks = drawn(page.figures["throughput"][-1])
    assert {"0", "20K", "40K", "60K", "80K", "100K"} <= set(ticks)  # tokens
    assert {"20", "40", "60", "80", "100"} <= set(ticks)  # steps
    assert {"500", "1K", "1.5K", "2K"} <= set(ticks)  # tokens/s
    assert {"5T", "10T", "15T", "20T"} <= set(ticks)  # FLOP/s


def test_what_the_plots_show(page: Page) -> None:
    loss = page.figures["loss"][-1]
    assert {"training", "smoothed", "evaluation", "checkpoint", "skipped"} <= set(drawn(loss))
    assert "From 10.000 at step 1 to 2.080 at step 100" in (loss["alt"] or "")
    assert "clipped above" in drawn(page.figures["gradient-norm"][-1])
    assert "Highest 3.00e-04" in (page.figures["learning-rate"][-1]["alt"] or "")
    assert "model FLOP/s" in drawn(page.figures["throughput"][-1])


# ------------------------------------------------------------------------------------ a classifier


def evaluations(log: RunLog) -> None:
    log.evaluation(10, 1.5, accuracy=0.5, macro_f1=0.25)
    log.evaluation(20, 1.25, accuracy=0.9, macro_f1=0.8)
    log.evaluation(30, 1.0, accuracy=0.875, macro_f1=0.75)
    log.event("done", 30)


@pytest.fixture(scope="module")
def classifier(make: Make) -> Path:
    return make(30, evaluations, loss_unit="nats per text")


def test_a_classifier_has_its_measures_and_no_perplexity(classifier: Path) -> None:
    page = Page((classifier / "report.html").read_text())
    assert page.after("Accuracy") == "0.8750"
    assert page.after("Macro-F1") == "0.7500"
    assert page.after("0.7500") == "at step 30"
    assert page.after(page.after("Final loss")) == "nats per text"
    assert "Perplexity" not in page.texts
    quality = page.figures["quality"][-1]
    assert {"accuracy", "macro-F1"} <= set(drawn(quality))
    assert "Accuracy 0.875 at step 30, 0.500 to 0.900 on the way." in (quality["alt"] or "")
    assert "nats per text" in drawn(page.figures["loss"][-1])


def test_figures_of_a_classifier_for_scripts(classifier: Path) -> None:
    said = json.loads(run(classifier, "--json").stdout)["result"]
    assert (said["evaluation_accuracy"], said["evaluation_macro_f1"]) == (0.875, 0.75)
    assert said["perplexity"] is None


def test_the_report_links_the_classifier_s_own_when_it_is_there(classifier: Path) -> None:
    def links() -> list[str]:
        page = Page(write_report(classifier).read_text())
        return [link for link in page.links if not link.startswith("data:")]

    assert links() == []
    (classifier / "classification.html").touch()
    assert links() == ["classification.html"]


def test_a_log_of_before_losses_had_units_is_of_a_language_model(done: Path) -> None:
    path = done / "log.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines[0].pop("loss_unit") == "nats per token"
    assert RunHistory.read(_written(done, lines)).facts.has_perplexity


def _written(folder: Path, lines: list[dict[str, Any]]) -> Path:
    copy = folder / "copy"
    copy.mkdir()
    (copy / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return copy


# --------------------------------------------------------------------------------- how things stand


def test_a_run_that_stopped_at_nan(make: Make) -> None:
    folder = make(
        80,
        lambda log: log.event("stopped", 80, message="the loss is not a number"),
        of=100,
        loss=lambda step: math.nan if step == 80 else 3.0,
    )
    page = Page((folder / "report.html").read_text())
    assert page.after("stopped") == "Stopped at step 80 of 100: the loss is not a number"
    assert page.after("Loss") == "NaN"
    assert page.after("Perplexity") == "-"
    assert "Not a number at step 80." in (page.figures["loss"][-1]["alt"] or "")
    assert "stopped" in drawn(page.figures["loss"][-1])
    assert "Utilization" not in page.texts


def test_a_run_that_was_resumed_and_goes_on(make: Make) -> None:
    folder = make(5, of=100)
    facts = json.loads((folder / "log.jsonl").read_text().splitlines()[0])
    facts = {key: value for key, value in facts.items() if key not in ("event", "time", "step")}
    log = RunLog(RunFacts(**facts), LoggingConfig(interval=1), folder, resumed_at=3, say=str)
    log.step(StepRecord(4, 4000, 3.5, 0, 3e-4, 1.0, 0.5))
    with (folder / "log.jsonl").open("a") as file:
        file.write('{"event": "step", "st')
    page = Page(write_report(folder).read_text())
    assert page.after("running").startswith("Running, or killed: last heard of at step 4 of 100")
    assert page.after("Loss") != "NaN"
    assert {"training", "resumed"} <= set(drawn(page.figures["loss"][-1]))
    assert "smoothed" not in drawn(page.figures["loss"][-1])  # too few


def test_a_run_without_a_step(make: Make) -> None:
    page = Page(re.sub("<figure>", '<figure id="">', (make(0, of=9) / "report.html").read_text()))
    assert page.after("Loss") == "-"
    assert "No steps yet, and so no curves." in page.texts


def test_a_peak_among_many_lines_is_drawn(make: Make) -> None:
    folder = make(2000, loss=lambda step: 9.0 if step == 1234 else 2.0)
    page = Page((folder / "report.html").read_text())
    assert "lowest 2.000" in (page.figures["loss"][-1]["alt"] or "")
    paths = [
        [float(y) for y in re.findall(r"[ML] \S+ (\S+)", path)]
        for path in re.findall(r' d="([^"]+)"', svg(page.figures["loss"][-1]))
    ]
    curves = [path for path in paths if len(path) > 2]  # a grid line has two points
    assert max(max(curve) - min(curve) for curve in curves) > 100


def test_a_log_that_lost_its_beginning(make: Make) -> None:
    folder = make(3)
    path = folder / "log.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[1:]))
    with pytest.raises(FormatError, match="how the run began"):
        write_report(folder)


# -------------------------------------------------------------------------------------- the command


def run(*args: object) -> Result:
    app = typer.Typer()
    training.add_to(app)
    return CliRunner().invoke(app, ["report", *map(str, args)])


def test_the_command_writes_the_same_report_again(done: Path) -> None:
    before = (done / "report.html").read_bytes()
    (done / "report.html").unlink()
    result = run(done)
    assert result.stdout == f"All 100 steps are done.\n{done / 'report.html'}\n"
    assert (done / "report.html").read_bytes() == before


def test_the_last_figures_for_scripts(done: Path) -> None:
    figures = json.loads(run(done, "--json").stdout)["result"]
    assert figures == {
        "name": "OLMo <1B> & co",
        "state": "done",
        "step": 100,
        "steps": 100,
        "tokens": 100_000,
        "parameters": 1_484_916_736,
        "loss": 2.08,
        "perplexity": pytest.approx(math.exp(2.08)),
        "evaluation_loss": 2.25,
        "seconds": 50.0,
        "skipped": 1,
        "tokens_per_second": 2000.0,
        "flops_per_second": 2e13,
        "utilisation": pytest.approx(2e13 / (2 * 989e12)),
        "report": str(done / "report.html"),
    }


def test_a_folder_without_a_log_is_refused(tmp_path: Path) -> None:
    result = run(tmp_path)
    assert result.exit_code == 2
    assert result.stderr == (
        f"olmo-bridge: {tmp_path}: has no log.jsonl, so it is not the folder of a run "
        "(checkpoint.save)\n"
    )
