"""A GPT-2 built from OLM's blocks and trained by OLM's trainer converts to HF and to Megatron."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from damage import calling, write_archive
from slow import slow_but
from torch.nn.functional import cross_entropy
from typer.testing import CliRunner, Result

from megatron_olmo_bridge import export_checkpoint, import_checkpoint, inspect, verify
from megatron_olmo_bridge.checkpoints.checkpoint import ReadOptions
from megatron_olmo_bridge.cli.app import app
from megatron_olmo_bridge.convert.options import ExportOptions, ImportOptions

pytest.importorskip("olm")

EXAMPLE = Path(__file__).parents[2] / "examples/no_magic"
SCRIPT, NOTEBOOK = EXAMPLE / "train_and_convert.py", EXAMPLE / "no_magic.ipynb"
VOCABULARY, CONTEXT, LAYERS, WIDTH, HEADS = 39, 64, 4, 64, 4
"""Number of heads of the example's model."""
HEAD = "blocks.2.blocks.1.weight"


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Folder that the example wrote, and what it printed. Read-only."""
    folder = tmp_path_factory.mktemp("example")
    done = subprocess.run(
        [sys.executable, SCRIPT], cwd=folder, capture_output=True, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder / "no_magic_output", done.stdout


@pytest.fixture(scope="module")
def checkpoint(example: tuple[Path, str]) -> Path:
    return example[0] / "step_100.pt"


def batch() -> torch.Tensor:
    """Return tokens [4, CONTEXT + 1] of int64."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(VOCABULARY, (4, CONTEXT + 1), generator=generator)


def loss_of(logits: torch.Tensor) -> float:
    return float(cross_entropy(logits.flatten(0, 1), batch()[:, 1:].flatten()))


def olm_model(tied: bool = True) -> torch.nn.Module:
    """Build OLM's own GPT-2 of the example's sizes with random weights."""
    from olm.models.openai.gpt2 import GPT2Model

    return GPT2Model(VOCABULARY, WIDTH, LAYERS, HEADS, CONTEXT, tie_weights=tied).eval()


def olm_logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(batch()[:, :-1])


def hf_logits(folder: Path) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(found for kind, found in report.items() if kind.endswith("_keys"))
    with torch.no_grad():
        return model.eval()(batch()[:, :-1]).logits


def megatron_logits(folder: Path, work: Path, tp: int = 1) -> torch.Tensor:
    """Compute logits with a live model in separate processes."""
    from megatron_olmo_bridge.inference.jobs import LOGITS, Job, read_states

    work.mkdir()
    Job(str(folder), tp, tokens=batch()[:, :-1].tolist(), states=str(work)).run()
    return read_states(work)[LOGITS]


# ------------------------------------------------------------------------------------ the example


def test_the_example_finds_the_same_loss_three_times(example: tuple[Path, str]) -> None:
    lines = [line.split() for line in example[1].splitlines()[-3:]]
    assert [name for name, _ in lines] == ["OLM", "transformers", "Megatron"]
    losses = [float(loss) for _, loss in lines]
    assert max(losses) - min(losses) <= 1e-5
    assert losses[0] < 3, "it has learned: of nothing the loss would be 3.7"


@pytest.mark.slow
@pytest.mark.parametrize("tp", slow_but([1], [1, 2]))
def test_the_loss_is_the_same_in_all_three_libraries(
    example: tuple[Path, str], checkpoint: Path, tmp_path: Path, tp: int
) -> None:
    """The test builds its own models and loads the example's checkpoint into them."""
    pytest.importorskip("megatron.core")
    model = olm_model()
    model.load_state_dict(torch.load(checkpoint)["model_state_dict"])
    expected = loss_of(olm_logits(model))

    assert loss_of(hf_logits(example[0] / "hf")) == pytest.approx(expected, abs=1e-5)
    logits = megatron_logits(example[0] / "megatron", tmp_path / "states", tp)
    assert loss_of(logits) == pytest.approx(expected, abs=1e-5)


def test_a_wrong_number_of_heads_changes_the_loss(checkpoint: Path, tmp_path: Path) -> None:
    model = olm_model()
    model.load_state_dict(torch.load(checkpoint)["model_state_dict"])
    export_checkpoint(checkpoint, tmp_path / "hf", ExportOptions(kind_options={"heads": 2}))
    assert abs(loss_of(hf_logits(tmp_path / "hf")) - loss_of(olm_logits(model))) > 1e-3


def test_the_notebook_has_the_code_of_the_script() -> None:
    nbformat = pytest.importorskip("nbformat")
    made = runpy.run_path(str(EXAMPLE / "make_notebook.py"))["notebook"]()
    stored = nbformat.read(NOTEBOOK, as_version=4)
    assert stored.cells == made.cells, "run examples/no_magic/make_notebook.py"
    code = "\n".join(cell.source for cell in stored.cells if cell.cell_type == "code")
    script = [line for line in SCRIPT.read_text().splitlines() if not line.startswith("#")]
    assert list(filter(None, code.splitlines())) == list(filter(None, script))


@pytest.mark.slow
def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(
        notebook, timeout=900, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    ).execute()
    said = "".join(o.get("text", "") for c in notebook.cells for o in c.get("outputs", ()))
    assert "OLM " in said and "Megatron " in said


# ------------------------------------------------------------------------------------ conversions


def run(*args: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in args])


def tree(root: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(root)): p.read_bytes()
        for p in root.rglob("*")
        if p.is_file() and p.name != "olmo_bridge.json"
    }


def test_commands(checkpoint: Path, tmp_path: Path) -> None:
    result = run("export", checkpoint, tmp_path / "hf", "--heads", HEADS)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith(f"{tmp_path / 'hf'}: 52 tensors, 8")
    result = run("import", checkpoint, tmp_path / "m", "--heads", HEADS)
    assert result.exit_code == 0, result.output
    assert verify(tmp_path / "hf", tmp_path / "m").equal
    export_checkpoint(tmp_path / "m", tmp_path / "back")
    assert tree(tmp_path / "back") == tree(tmp_path / "hf")
    import_checkpoint(tmp_path / "hf", tmp_path / "m2")
    assert verify(tmp_path / "m2", tmp_path / "m").equal  # at other offsets, as in their sources


def test_a_config_and_a_tokenizer_come_with_the_model(
    example: tuple[Path, str], checkpoint: Path, tmp_path: Path
) -> None:
    given = shutil.copytree(example[0] / "hf", tmp_path / "given")
    (given / "tokenizer.json").write_text('{"a": "tokenizer"}')
    for command, inside in (("export", "."), ("import", "iter_0000000/hf")):
        result = run(command, checkpoint, tmp_path / command, "--hf-config", given)
        assert result.exit_code == 0, result.output
        found = tmp_path / command / inside
        assert (found / "tokenizer.json").read_text() == '{"a": "tokenizer"}'
        assert json.loads((found / "config.json").read_text())["n_head"] == HEADS


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_another_dtype(checkpoint: Path, tmp_path: Path, dtype: str) -> None:
    export_checkpoint(
        checkpoint, tmp_path / "hf", ExportOptions(kind_options={"heads": HEADS}, dtype=dtype)
    )
    import_checkpoint(
        checkpoint, tmp_path / "m", ImportOptions(kind_options={"heads": HEADS}, dtype=dtype)
    )
    assert verify(tmp_path / "hf", tmp_path / "m").equal
    assert inspect(tmp_path / "m").dtypes == [dtype]
    config = json.loads((tmp_path / "m/iter_0000000/hf/config.json").read_text())
    assert config["torch_dtype"] == dtype


@pytest.mark.slow
def test_an_untied_head_is_kept(tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = olm_model(tied=False)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    file = tmp_path / "step_1.pt"
    torch.save({"step": 1, "model_state_dict": model.state_dict()}, file)
    export_checkpoint(file, tmp_path / "hf", ExportOptions(kind_options={"heads": HEADS}))
    import_checkpoint(file, tmp_path / "m", ImportOptions(kind_options={"heads": HEADS}))

    expected = olm_logits(model)
    found = hf_logits(tmp_path / "hf")
    assert float((found - expected).abs().max()) <= 1e-5 * float(expected.abs().max())
    config = json.loads((tmp_path / "hf/config.json").read_text())
    assert config["tie_word_embeddings"] is False
    pytest.importorskip("megatron.core")
    found = megatron_logits(tmp_path / "m", tmp_path / "states")
    assert float((found - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


def test_a_plan_needs_no_torch(checkpoint: Path) -> None:
    code = (
        "import sys\nfrom megatron_olmo_bridge import ExportOptions, ImportOptions\n"
        "from megatron_olmo_bridge.convert import to_hf, to_megatron\n"
        "heads = {'heads': 4}\n"
        "to_hf.plan_exports(sys.argv[1], 'x', ExportOptions(kind_options=heads))\n"
        "to_megatron.plan_import(sys.argv[1], ImportOptions(kind_options=heads))\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, checkpoint], check=True)


def test_verify(checkpoint: Path, tmp_path: Path) -> None:
    said = run("import", checkpoint, tmp_path / "m", "--heads", HEADS).stdout.splitlines()[1]
    command = said.removeprefix("Prove it:    olmo-bridge ").split()
    result = run(*command)
    assert result.stdout.startswith("Equal: 52 tensors, 8"), result.output
    assert run("verify", tmp_path / "m", checkpoint, "--heads", HEADS).exit_code == 0
    result = run("verify", checkpoint, tmp_path / "m", "--heads", 2)
    assert result.exit_code == 1
    assert "num_attention_heads" in result.stdout
    result = run("verify", checkpoint, tmp_path / "m")
    assert result.exit_code == 2
    assert "Pass --heads" in result.stderr

    value = torch.load(checkpoint)
    value["model_state_dict"][QUERY][3, 5] += 1
    torch.save(value, tmp_path / "other.pt")
    result = run("verify", tmp_path / "other.pt", tmp_path / "m", "--heads", HEADS)
    assert result.exit_code == 1
    assert "transformer.h.2.attn.c_attn.weight" in result.stdout
    assert "1 of 12288 differ; first at [5, 3]" in result.stdout


def test_inspect(checkpoint: Path, example: tuple[Path, str]) -> None:
    result = run("inspect", checkpoint, "--heads", HEADS)
    assert result.exit_code == 0, result.output
    for text in ("OLM, a file of its trainer", "gpt2, no published size", "206,656", "in 1 files",
                 "step_100.pt", "num_attention_heads"):  # fmt: skip
        assert text in result.stdout, text
    assert run("inspect", checkpoint, "--hf-config", example[0] / "hf").exit_code == 0
    found = inspect(checkpoint, ReadOptions(kind_options={"heads": HEADS}))
    assert found.files == {"step_100.pt": checkpoint.stat().st_size}
    assert found.nbytes == checkpoint.stat().st_size
    assert len(found.tensors) == 52
    result = run("inspect", checkpoint)
    assert result.exit_code == 2
    assert "Pass --heads" in result.stderr


# -------------------------------------------------------------------------------------- bad input

SENTINEL = "the-pickle-was-run"


def hostile(file: Path) -> None:
    write_archive(file, calling("os.system", f"touch {SENTINEL}"))


def truncated(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-30_000])


def compressed(file: Path) -> None:
    with zipfile.ZipFile(file) as old:
        records = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as new:
        for name, data in records.items():
            new.writestr(name, data)


def changed(change: Any) -> Any:
    def damage(file: Path) -> None:
        value = torch.load(file)
        change(value, value.get("model_state_dict"))
        torch.save(value, file)

    return damage


QUERY = "blocks.1.stack.2.blocks.0.block.blocks.1.q_proj.weight"
BAD: dict[str, tuple[Any, str]] = {
    "hostile": (hostile, "the pickle asks for os.system, which has no place in a checkpoint"),
    "truncated": (truncated, "not an archive of torch.save"),
    "compressed": (compressed, "the archive is compressed"),
    "no zip": (lambda file: file.write_bytes(b"text" * 99), "not an archive of torch.save"),
    "no model": (changed(lambda v, _: v.pop("model_state_dict")), "has no model_state_dict"),
    "strides": (changed(lambda _, m: m.update({QUERY: m[QUERY].T})), f"{QUERY}: the tensor is not"),
    "missing": (changed(lambda _, m: m.pop(QUERY)), f"missing (1):\n  - {QUERY}"),
    "too many": (changed(lambda _, m: m.update(more=torch.ones(2))), "unexpected (1):\n  - more"),
    "shape": (changed(lambda _, m: m.update({QUERY: m[QUERY][:7]})), f"{QUERY} has shape [7, 64]"),
    "mask": (changed(lambda _, m: m.update(mask=torch.ones(2) > 0)), "mask: tensors of torch.Bool"),
}


@pytest.mark.parametrize("command", ["export", "import", "verify", "inspect"])
@pytest.mark.parametrize("kind", BAD)
def test_bad_input_is_refused(
    checkpoint: Path, tmp_path: Path, kind: str, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    damage, says = BAD[kind]
    shutil.copy(checkpoint, tmp_path)
    damage(tmp_path / checkpoint.name)
    monkeypatch.chdir(tmp_path)
    second = {"verify": [checkpoint.name], "inspect": []}.get(command, ["out"])
    result = run(command, checkpoint.name, *second, "--heads", HEADS)
    if command == "verify" and kind in ("missing", "too many", "shape"):
        assert result.exit_code == 1
        assert "mapping" in result.stdout
        return
    assert result.exit_code == 2
    assert says in result.stderr
    assert checkpoint.name in result.stderr
    assert "Traceback" not in result.output
    assert len(result.output.splitlines()) < 24
    assert [p.name for p in tmp_path.iterdir()] == [checkpoint.name]


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ((), "Pass --heads, or --hf-config"),
        (("--heads", "5"), "n_embd 64 cannot be divided by 5 attention heads"),
        (("--heads", "0"), "--heads"),
        (("--hf-config", "absent"), "absent: no config.json"),
    ],
)
@pytest.mark.parametrize("command", ["export", "import"])
def test_bad_options_are_refused(
    checkpoint: Path, tmp_path: Path, args: tuple[str, ...], says: str, command: str
) -> None:
    result = run(command, checkpoint, tmp_path / "out", *args)
    assert result.exit_code == 2
    assert says in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "command",
    [("compare", "CKPT", "CKPT"), ("roundtrip", "CKPT"), ("generate", "CKPT", "--tokens", "1,2")],
    ids=lambda command: command[0],
)
def test_commands_without_the_heads_option_name_those_that_have_it(
    checkpoint: Path, command: tuple[str, ...]
) -> None:
    result = run(*(checkpoint if word == "CKPT" else word for word in command))
    assert result.exit_code == 2
    assert f"first export it: olmo-bridge export {checkpoint} DST --heads N" in result.stderr


def test_the_heads_option_is_refused_for_other_kinds(
    single: Path, megatron: Path, tmp_path: Path
) -> None:
    for args, says in (
        (("import", single, tmp_path / "x", "--heads", 4), "--heads is for OLM checkpoints"),
        (("export", megatron, tmp_path / "x", "--heads", 4), "--heads is for OLM checkpoints"),
        (("import", single, tmp_path / "x", "--hf-config", single), "--hf-config is for"),
    ):
        result = run(*args)
        assert result.exit_code == 2
        assert says in result.stderr
