"""Training checkpoints of OLMo-core: converted both ways, and continued under megatron-core.

The checkpoints were written by OLMo-core itself (olmo_core/make_checkpoints.py), which also
recorded its own next steps: batches, losses, and the weights after them.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import run_script
from safetensors.torch import load_file
from training_runs import Place
from typer.testing import CliRunner

from megatron_olmo_bridge import ExportOptions, ImportOptions, export_checkpoint, import_checkpoint
from megatron_olmo_bridge.checkpoints.open import open_checkpoint
from megatron_olmo_bridge.cli.app import app
from megatron_olmo_bridge.formats.dcp_folder import DCPFolder
from megatron_olmo_bridge.storage.transfer import Transfer
from megatron_olmo_bridge.tools.verify import verify

ARCHIVE = Path(__file__).parent / "olmo_core" / "checkpoints.tar.xz"
KINDS = (
    "olmo2", "olmo2-by-2-ranks", "olmo2-by-4-ranks", "olmo2-first-step", "olmo2-compiled",
    "olmo3-adamw", "olmoe", "flex-olmo-dropless", "flex-olmo",
)  # fmt: skip
STEP, LAST = 3, 6
RECIPE = "from megatron_olmo_bridge.training.config import TrainingConfig as config\n"
"""Every setting at its default: the checkpoint's run decides."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a run of each kind, and the token files. Read-only."""
    folder = tmp_path_factory.mktemp("olmo-core")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    (folder / "mix.txt").write_text("# label, file\nweb,part-0.npy\n\nbooks,part-1.npy\n")
    return folder


def olmo_bridge(*arguments: object) -> tuple[int, str]:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return done.exit_code, " ".join(done.output.split())


# ------------------------------------------------------------------------------- conversion


@pytest.mark.parametrize("kind", KINDS)
def test_weights_and_optimizer_state_survive_the_way_to_megatron_and_back(
    runs: Path, tmp_path: Path, kind: str
) -> None:
    import_checkpoint(runs / kind, tmp_path / "m", ImportOptions(optimizer=True))
    assert (tmp_path / "m/latest_checkpointed_iteration.txt").read_text() == str(STEP)
    options = ExportOptions(to="olmo-core", optimizer=True)
    export_checkpoint(tmp_path / "m", tmp_path / "back", options)
    for other in ("m", "back"):
        result = verify(runs / kind, tmp_path / other, optimizer=True)
        assert result.equal, result.differences
        assert result.compared == 4 * len(open_checkpoint(runs / kind).tensors)
    before, after = (
        DCPFolder.read(p / "model_and_optim")
        for p in (runs / kind / f"step{STEP}", tmp_path / "back")
    )
    if kind != "flex-olmo":  # its experts are transposed, those that are written are not
        assert tensors_of(before) == tensors_of(after)
    assert before.objects.keys() <= after.objects.keys()
    for key in before.objects:
        assert before.object(key) == after.object(key)


def tensors_of(folder: DCPFolder) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and dtype of weights and optimizer state. A compiled optimizer's settings are tensors
    too, but are written as those of others are."""
    return {k: (t.shape, t.dtype) for k, t in folder.tensors.items() if "param_groups" not in k}


def test_torch_reads_what_is_written(runs: Path, tmp_path: Path) -> None:
    import torch.distributed.checkpoint as dcp

    export_checkpoint(
        runs / "olmo2-by-2-ranks", tmp_path / "back", ExportOptions(to="olmo-core", optimizer=True)
    )
    folder = DCPFolder.read(runs / "olmo2-by-2-ranks" / f"step{STEP}" / "model_and_optim")
    state = {key: torch.empty(tensor.shape) for key, tensor in folder.tensors.items()}
    dcp.load(state, checkpoint_id=tmp_path / "back/model_and_optim", no_dist=True)
    for key, tensor in state.items():
        if tensor.shape:
            with Transfer() as transfer:
                stored = bytearray().join(data for *_, data in transfer.blocks(folder.view(key)))
            assert torch.equal(torch.frombuffer(stored, dtype=torch.float32), tensor.flatten()), key
        else:
            assert tensor == folder.number(key) == STEP + 1


def test_the_exported_model_is_that_of_olmo_core(runs: Path, tmp_path: Path) -> None:
    """OLMo-core's loss of the next batch, recorded before the step that it leads to."""
    from transformers import AutoModelForCausalLM

    for kind in ("olmo2", "olmo3-adamw", "olmoe", "flex-olmo-dropless"):
        export_checkpoint(runs / kind, tmp_path / kind)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / kind, attn_implementation="eager")
        step = recorded(runs / kind)[STEP + 1]
        tokens = torch.tensor(step["tokens"])
        loss = model(input_ids=tokens, labels=tokens).loss.item()
        assert loss == pytest.approx(step["train/CE loss"], abs=1e-6), kind


def test_experts_are_those_of_olmo_cores_own_converter(runs: Path, tmp_path: Path) -> None:
    export_checkpoint(runs / "flex-olmo", tmp_path / "hf")
    expected = load_file(runs / "flex-olmo/hf.safetensors")
    exported = load_file(tmp_path / "hf/model.safetensors")
    assert expected.keys() == exported.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, exported[name]), name


def test_a_smaller_vocabulary_leaves_out_rows(runs: Path, tmp_path: Path) -> None:
    code, said = olmo_bridge("export", runs / "olmo2", tmp_path / "hf", "--vocab-size", "60")
    assert code == 0, said
    rows = load_file(tmp_path / "hf/model.safetensors")["model.embed_tokens.weight"]
    assert rows.shape == (60, 16)
    code, said = olmo_bridge("export", runs / "olmo2", tmp_path / "no", "--vocab-size", "65")
    assert code == 2 and "the embedding has 64 rows, fewer than the vocabulary of 65" in said


# --------------------------------------------------------------------------------- training


def recorded(run: Path) -> dict[int, dict[str, Any]]:
    """OLMo-core's own steps."""
    return {
        int(step): values for step, values in json.loads((run / "run.json").read_text()).items()
    }


@pytest.fixture(scope="module")
def place(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("continued")
    (folder / "defaults.py").write_text(RECIPE)
    return Place(folder)


def settings(runs: Path, kind: str) -> list[str]:
    return [
        f"init.checkpoint={runs / kind}",
        "init.optimizer=true",
        f"data.mix={runs / 'mix.txt'}",
        "train.precision=float32",
        "train.micro_batch_size=2",
        "logging.interval=1",
    ]


CONTINUED = [
    ("olmo2", 1, ()),
    ("olmo2-by-2-ranks", 1, ("parallel.distributed_optimizer=false",)),
    ("olmo2-by-4-ranks", 1, ()),
    ("olmo2-first-step", 1, ()),
    ("olmo2-compiled", 1, ()),
    ("olmoe", 1, ()),
    ("flex-olmo-dropless", 1, ()),
    ("olmo3-adamw", 1, ()),
    ("olmo2", 2, ("parallel.tp=2",)),
    ("olmo2", 2, ()),
    ("olmo3-adamw", 2, ("parallel.pp=2", "parallel.distributed_optimizer=false")),
    ("olmoe", 2, ("parallel.tp=2", "parallel.sp=true")),
]


@pytest.mark.parametrize(("kind", "processes", "overrides"), CONTINUED)
def test_the_next_steps_are_those_of_olmo_core(
    runs: Path, place: Place, kind: str, processes: int, overrides: tuple[str, ...]
) -> None:
    """Also across an epoch of the data, which has 8 batches in these runs of 6 steps."""
    name = "-".join([kind, str(processes), *overrides]).replace("=", "-")
    run = place.run(
        name, *settings(runs, kind), *overrides, processes=processes, recipe="defaults"
    ).done()
    expected = recorded(runs / kind)
    assert sorted(run.curve) == list(range(STEP + 1, LAST + 1))
    for step, (loss, norm) in run.curve.items():
        assert loss == pytest.approx(expected[step]["train/CE loss"], abs=1e-6), step
        assert norm == pytest.approx(expected[step]["optim/total grad norm"], rel=2e-6), step
    if (runs / kind / "last.safetensors").exists():
        export_checkpoint(
            run.folder, place.folder / f"{name}-back", ExportOptions(to="olmo-core", optimizer=True)
        )
        folder = DCPFolder.read(place.folder / f"{name}-back" / "model_and_optim")
        for key, weight in load_file(runs / kind / "last.safetensors").items():
            with Transfer() as transfer:
                view = folder.view(f"model.{key}")
                data = bytearray().join(block for *_, block in transfer.blocks(view))
            values = torch.frombuffer(data, dtype=torch.float32).view(weight.shape)
            torch.testing.assert_close(values, weight, atol=1e-6, rtol=0)
        steps = {folder.number(k) for k in folder.tensors if k.endswith(".step")}
        assert steps == {0.0 if "first-step" in kind else LAST + 1.0}


LAYOUTS = [
    ("olmo2", 4, {"tp": 2, "pp": 2}),
    ("olmo2", 4, {"tp": 2, "pp": 2, "distributed_optimizer": False}),
    ("olmo2-by-4-ranks", 2, {"distributed_optimizer": True}),
    ("olmo3-adamw", 2, {"distributed_optimizer": True}),
    ("olmoe", 4, {"tp": 2, "sp": True, "pp": 2}),
    ("olmoe", 2, {"ep": 2}),
]


@pytest.mark.parametrize(("kind", "processes", "parallel"), LAYOUTS)
def test_megatron_saves_what_olmo_core_saved(
    runs: Path, tmp_path: Path, kind: str, processes: int, parallel: dict[str, Any]
) -> None:
    """Every tensor, bit for bit, after loading and saving at any layout."""
    step = runs / kind / f"step{STEP}"
    config = {
        "init": {"checkpoint": str(step), "optimizer": True},
        "data": {"mix": str(runs / "mix.txt")},
        "train": {"precision": "float32"},
        "parallel": parallel,
        "checkpoint": {"save": str(tmp_path / "run")},
    }
    run_script("resaved", json.dumps(config), processes=processes)
    export_checkpoint(
        tmp_path / "run", tmp_path / "back", ExportOptions(to="olmo-core", optimizer=True)
    )
    for other in ("run", "back"):
        result = verify(step, tmp_path / other, optimizer=True)
        assert result.equal, result.differences
        assert result.compared == 4 * len(open_checkpoint(step).tensors)
    before, after = (DCPFolder.read(f / "model_and_optim") for f in (step, tmp_path / "back"))
    assert tensors_of(before) == tensors_of(after)


def test_a_run_without_steps_left_is_refused(runs: Path, place: Place) -> None:
    overrides = [*settings(runs, "olmo2"), f"train.steps={STEP}", "--dry-run"]
    code, said = olmo_bridge("train", place.folder / "defaults.py", *overrides)
    assert code == 2
    assert f"train.steps={STEP}: no step is left, as the run that it continues has taken" in said


def test_an_imported_run_continues_too(runs: Path, place: Place) -> None:
    """The same from a Megatron checkpoint, for which the settings are given."""
    import_checkpoint(runs / "olmo2", place.folder / "imported", ImportOptions(optimizer=True))
    run = place.run(
        "from-megatron", *settings(runs, "olmo2"), f"init.checkpoint={place.folder / 'imported'}",
        f"init.step={STEP}", f"train.steps={LAST}", "train.global_batch_size=4",
        "train.sequence_length=16", "data.seed=34521", "optimizer.lr=3e-3",
        "optimizer.z_loss=1e-4", "schedule.warmup_steps=2", "stability.on_spike=skip",
        "stability.sigma=6", recipe="defaults",
    ).done()  # fmt: skip
    expected = recorded(runs / "olmo2")
    for step, (loss, _) in run.curve.items():
        assert loss == pytest.approx(expected[step]["train/CE loss"], abs=1e-6), step


@pytest.mark.parametrize("distributed", ["true", "false"])
def test_experts_may_get_an_optimizer_of_their_own(
    runs: Path, place: Place, distributed: str
) -> None:
    """megatron-core has one for them under expert parallelism: from OLMo-core's state, from that of
    a run without, and back."""
    own = f"parallel.distributed_optimizer={distributed}"
    shared = [*settings(runs, "olmoe"), own, "checkpoint.fully_reshardable=all"]
    kind = f"experts-{distributed}"
    without = place.run(f"{kind}-without", *shared, processes=2, recipe="defaults").done()
    experts = place.run(
        f"{kind}-with", *shared, "parallel.ep=2", processes=2, recipe="defaults"
    ).done()
    curves = zip(without.curve.values(), experts.curve.values(), strict=True)
    for (loss, norm), (same_loss, same_norm) in curves:
        assert same_loss == pytest.approx(loss, abs=1e-6)
        assert same_norm == pytest.approx(norm, rel=1e-6)
    for begin, parallel in ((without, 2), (experts, 1)):
        more = place.run(
            f"{kind}-then-{parallel}", *settings(runs, "olmoe"), own,
            f"init.checkpoint={begin.folder}", f"init.step={LAST}", f"train.steps={LAST + 1}",
            "train.global_batch_size=4", "train.sequence_length=16", f"parallel.ep={parallel}",
            processes=2, recipe="defaults",
        ).done()  # fmt: skip
        assert list(more.curve) == [LAST + 1]


def test_a_mixture_on_two_tensor_parallel_ranks_needs_sequence_parallelism(
    runs: Path, place: Place
) -> None:
    overrides = [*settings(runs, "olmoe"), "parallel.tp=2", "--dry-run"]
    code, said = olmo_bridge("train", place.folder / "defaults.py", *overrides)
    assert code == 2 and "with parallel.tp=2 only if parallel.sp=true" in said


def test_a_run_writes_checkpoints_of_olmo_core(runs: Path, place: Place) -> None:
    """With one of the run's own that can be loaded at any layout, in the middle of the run too."""
    exports = place.folder / "exports"
    run = place.run(
        "exporting", *settings(runs, "olmo2"), f"export.olmo_core={exports}", "export.interval=2",
        "checkpoint.fully_reshardable=none", processes=2, recipe="defaults",
    ).done()  # fmt: skip
    assert sorted(path.name for path in exports.glob("step*")) == ["step4", "step6"]
    for step in (4, 6):
        own = run.folder / f"iter_{step:07d}"
        assert verify(own, exports / f"step{step}", optimizer=True).equal
    log = [line["path"] for line in run.events("export")]
    assert log == [str(exports / "step4"), str(exports / "step6")]


def test_a_dry_run_says_where_each_setting_is_from(runs: Path, place: Place) -> None:
    arguments = [*settings(runs, "olmo2"), "optimizer.lr=1e-3", "--dry-run", "--json"]
    done = CliRunner().invoke(app, ["train", str(place.folder / "defaults.py"), *arguments])
    assert done.exit_code == 0, done.output
    config = json.loads(done.stdout)["result"]["config"]
    file = str(runs / "olmo2" / f"step{STEP}" / "config.json")
    assert config["optimizer"]["z_loss"] == 1e-4 and config["sources"]["optimizer.z_loss"] == file
    assert config["init"]["step"] == STEP and config["train"]["global_batch_size"] == 4
    assert config["optimizer"]["lr"] == 1e-3
    assert config["sources"]["optimizer.lr"] == f"command line; the run had 0.003 ({file})"


# ------------------------------------------------------------------------------- bad input


@dataclass(frozen=True)
class Fault:
    """Change of a run's folder, and what the message must say."""

    change: Callable[[Path], object]
    says: str
    command: str = "import"


def rewritten(key: str, change: Callable[[bytearray], object]) -> Callable[[Path], None]:
    """Change the bytes of a tensor in the file that stores it."""

    def damage(step: Path) -> None:
        folder = DCPFolder.read(step / "model_and_optim")
        ((_, array),) = folder.arrays(key)
        data = bytearray(array.file.read_bytes())
        part = data[array.offset : array.offset + array.nbytes]
        change(part)
        data[array.offset : array.offset + array.nbytes] = part
        array.file.write_bytes(data)

    return damage


def without(key: str) -> Callable[[Path], None]:
    """Remove a key from the metadata, by renaming it to one of the same length."""

    def damage(step: Path) -> None:
        file = step / "model_and_optim/.metadata"
        data = file.read_bytes()
        assert key.encode() in data
        file.write_bytes(data.replace(key.encode(), b"_" * len(key)))

    return damage


def config_with(path: str, value: object) -> Callable[[Path], None]:
    def damage(step: Path) -> None:
        config = json.loads((step / "config.json").read_text())
        *sections, name = path.split(".")
        section = config
        for part in sections:
            section = section[part]
        section[name] = value
        (step / "config.json").write_text(json.dumps(config))

    return damage


class Runs:
    """Pickled, it would write a file when it is read."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return eval, ("open('ran', 'w')",)


MOMENT = "optim.state.lm_head.w_out.weight.exp_avg"
BLOCK = "model.block"
FAULTS = {
    "moment missing": Fault(without(MOMENT + "_sq"), f"doesn't have {MOMENT}_sq"),
    "steps differ": Fault(
        rewritten(
            "optim.state.lm_head.w_out.weight.step",
            lambda part: part.__setitem__(slice(0, 4), struct.pack("<f", 9.0)),
        ),
        "that of lm_head.w_out.weight is 9.0; Megatron's optimizer keeps one for all",
    ),
    "other optimizer": Fault(without("lm_head.w_out.weight.exp_avg_sq"), "optim.state"),
    "hostile progress": Fault(
        lambda step: torch.save({"global_step": Runs()}, step / "train/rank0.pt"), "eval"
    ),
    "truncated": Fault(
        lambda step: os.truncate(step / "model_and_optim/__0_0.distcp", 1000), "truncated"
    ),
    "no progress": Fault(
        lambda step: (step / "train/rank0.pt").unlink(),
        "no train/rank0.pt: it says how many steps the run has taken",
    ),
    "no config": Fault(lambda step: (step / "config.json").unlink(), "no config.json: it says"),
    "another trainer": Fault(
        lambda step: torch.save({"global_step": 3, "data_loader": 4}, step / "train/rank0.pt"),
        "does not hold a state of OLMo-core's trainer",
    ),
    "other eps": Fault(
        config_with(f"{BLOCK}.layer_norm.eps", 1e-5), "different eps: [1e-06, 1e-05]"
    ),
    "gate": Fault(
        config_with(f"{BLOCK}.sequence_mixer.gate", {"granularity": "headwise"}),
        'sequence_mixer.gate is {"granularity": "headwise"}: not converted',
    ),
    "fused attention": Fault(
        config_with(f"{BLOCK}.sequence_mixer.name", "fused_v2"),
        'name is "fused_v2", which can\'t be converted; supported: "default"',
    ),
    "pre-norm": Fault(
        config_with(f"{BLOCK}.name", "default"),
        'name is "default", which can\'t be converted; supported: "reordered_norm"',
    ),
    "tied": Fault(config_with("model.tie_word_embeddings", True), "tie_word_embeddings is true"),
    "other width": Fault(config_with("model.d_model", 32), "has shape [64, 16], the config asks"),
    "no model": Fault(config_with("model", None), "model must be an object, not null"),
    "schedule": Fault(
        config_with("train_module.scheduler._CLASS_", "olmo_core.optim.scheduler.WSDS"),
        "its schedule is 'WSDS', not one of CosWithWarmup",
        "train",
    ),
    "data set": Fault(
        config_with("dataset._CLASS_", "olmo_core.data.numpy_dataset.NumpyPackedFSLDatasetConfig"),
        "its data set is 'NumpyPackedFSLDatasetConfig', not NumpyFSLDataset",
        "train",
    ),
    "no settings": Fault(
        config_with("train_module", {"max_sequence_length": 16}),
        "has no optim, so the settings of the run can't be taken from it. Import the checkpoint",
        "train",
    ),
    "optimizer": Fault(
        config_with("train_module.optim._CLASS_", "olmo_core.optim.lion.LionConfig"),
        "its optimizer is 'LionConfig', not AdamW",
        "train",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_one_message_and_nothing_is_written(
    runs: Path, place: Place, tmp_path: Path, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(runs / "olmo2", tmp_path / "run")
    FAULTS[fault].change(tmp_path / "run" / f"step{STEP}")
    if FAULTS[fault].command == "import":
        arguments: list[object] = ["import", tmp_path / "run", tmp_path / "out", "--optimizer"]
    else:
        overrides = [s for s in settings(runs, "olmo2") if not s.startswith("init.checkpoint")]
        arguments = [
            "train", place.folder / "defaults.py", *overrides,
            f"init.checkpoint={tmp_path / 'run'}", f"checkpoint.save={tmp_path / 'out'}",
        ]  # fmt: skip
    code, said = olmo_bridge(*arguments)
    assert code == 2, said
    assert FAULTS[fault].says in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_another_data_set_is_refused(runs: Path, place: Place, tmp_path: Path) -> None:
    (tmp_path / "mix.txt").write_text("part-1.npy\npart-0.npy\n")
    mix = f"data.mix={tmp_path / 'mix.txt'}"
    overrides = [*settings(runs, "olmo2"), mix, f"data.root={runs}"]
    run = place.run("other-data", *overrides, recipe="defaults")
    assert run.codes == [2] and "is not the data set of the run" in run.said
    assert not run.folder.exists()


def test_states_of_different_models_are_compared_as_far_as_they_go(runs: Path) -> None:
    code, said = olmo_bridge("verify", runs / "olmo2", runs / "olmo3-adamw", "--optimizer")
    assert code == 1 and "model.layers.2" in said


def test_another_place_in_the_data_is_refused(runs: Path, place: Place) -> None:
    run = place.run("other-place", *settings(runs, "olmo2"), "init.step=1", recipe="defaults")
    said = " ".join(run.said.split())
    assert run.codes == [2]
    assert "data.mix would be at another place than in OLMo-core's run" in said
    assert "batches_processed: 1, OLMo-core's was 3" in said
    assert not run.folder.exists()
