"""synth, import and export on the command line."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from megatron_olmo_bridge.cli.app import app
from megatron_olmo_bridge.convert import to_megatron


def run(*args: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in args])


def done(*args: object) -> str:
    """Standard output of a command that must succeed and say nothing on standard error."""
    result = run(*args)
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    return result.stdout


def result_of(*args: object) -> Any:
    """What ``--json`` printed of a command that did its work."""
    envelope = json.loads(done(*args, "--json"))
    assert envelope["ok"]
    return envelope["result"]


def tree(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def test_synth_writes_a_checkpoint(tmp_path: Path) -> None:
    out = done(
        "synth",
        "olmo2-tiny",
        tmp_path / "hf",
        "--layers",
        1,
        "--seed",
        3,
        "--dtype",
        "float16",
        "--max-shard-size",
        "200KB",
    )
    assert out.startswith(f"{tmp_path / 'hf'}: olmo2-tiny with random weights, float16, ")
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 2
    assert done("synth", "olmo2-tiny", tmp_path / "quiet", "--layers", 1, "--quiet") == ""
    made = result_of("synth", "olmo2-tiny", tmp_path / "json", "--layers", 1)
    assert made["destination"] == str(tmp_path / "json")
    assert made["bytes_written"] == sum(map(len, tree(tmp_path / "json").values()))


def test_import_and_export_print_what_they_wrote(tiny_hf: Path, tmp_path: Path) -> None:
    out = done("import", tiny_hf, tmp_path / "m", "--workers", 2)
    lines = out.splitlines()
    assert lines[0].startswith(f"{tmp_path / 'm'}: 39 tensors, 2.")
    assert lines[1] == f"Prove it:    olmo-bridge verify {tiny_hf} {tmp_path / 'm'}"
    assert lines[2] == f"Megatron-LM: olmo-bridge inspect {tmp_path / 'm'} --megatron-args"
    out = done("export", tmp_path / "m", tmp_path / "back", "--max-shard-size", "1MB")
    assert out.startswith(f"{tmp_path / 'back'}: 47 tensors, 2.12 MB in ")
    assert run("verify", tiny_hf, tmp_path / "back").exit_code == 0


def test_average_plans_and_names_its_output(
    tiny_hf: Path, tiny_megatron: Path, tmp_path: Path
) -> None:
    options = ("--weights", "3,1", "--max-shard-size", "500KB")
    plan = done("average", tiny_hf, tiny_megatron, tmp_path / "soup", *options, "--dry-run")
    assert "average of 47 tensors: reads 4.20 MB, writes 2.11 MB; " in plan
    assert not (tmp_path / "soup").exists()
    out = done("average", tiny_hf, tiny_megatron, tmp_path / "soup", *options)
    assert out.startswith(f"{tmp_path / 'soup'}: 47 tensors, 2.11 MB in ")
    assert run("verify", tiny_hf, tmp_path / "soup").exit_code == 0
    said = result_of("average", tiny_hf, tiny_hf, tmp_path / "soup", "--overwrite")
    assert said["destination"] == str(tmp_path / "soup")


def test_quiet_prints_nothing(tiny_hf: Path, tmp_path: Path) -> None:
    assert done("import", tiny_hf, tmp_path / "m", "--quiet") == ""
    assert done("export", tmp_path / "m", tmp_path / "back", "-q") == ""


def test_json_has_the_numbers_of_the_summary(tiny_hf: Path, tmp_path: Path) -> None:
    said = result_of("import", tiny_hf, tmp_path / "m")
    assert said.keys() == {"destination", "bytes_written", "bytes_cloned", "seconds", "plan_sha256"}
    assert said["destination"] == str(tmp_path / "m")
    recorded = json.loads((tmp_path / "m/iter_0000000/olmo_bridge.json").read_text())
    assert said["plan_sha256"] == [recorded["plan_sha256"]]
    said = result_of("export", tmp_path / "m", tmp_path / "back")
    assert said["bytes_written"] == sum(
        p.stat().st_size for p in (tmp_path / "back").iterdir() if p.name != "olmo_bridge.json"
    )


def test_import_options_reach_the_conversion(tiny_hf: Path, tmp_path: Path) -> None:
    done(
        "import",
        tiny_hf,
        tmp_path / "m",
        "--dtype",
        "float32",
        "--release",
        "--checksum",
        "--make-vocab-size-divisible-by",
        1000,
    )
    recorded = json.loads((tmp_path / "m/release/olmo_bridge.json").read_text())
    assert recorded["options"] == {"dtype": "float32", "padded_vocab_size": 2000, "release": True}
    assert all("sha256" in entry for entry in recorded["files"].values())
    result = run("import", tiny_hf, tmp_path / "m")
    assert result.exit_code == 2
    assert "exists already. Pass --overwrite" in result.stderr
    done("import", tiny_hf, tmp_path / "m", "--overwrite")
    assert not (tmp_path / "m/release").exists()


@pytest.mark.parametrize("name", ["bf16", "BF16", "torch.bfloat16", "bfloat16"])
def test_short_and_long_dtype_names_mean_the_same(
    name: str, tiny_hf: Path, tiny_megatron: Path, tmp_path: Path
) -> None:
    for command, *sources in (
        ("import", tiny_hf),
        ("export", tiny_megatron),
        ("average", tiny_hf, tiny_hf),
    ):
        arguments = (command, *sources, tmp_path / "x", "--dry-run", "--dtype")
        plan, usual = (result_of(*arguments, dtype)["plans"][0] for dtype in (name, "bfloat16"))
        assert plan["plan_sha256"] == usual["plan_sha256"]
    made = result_of("synth", "olmo2-tiny", tmp_path / "hf", "--layers", 1, "--dtype", name)
    assert made["dtype"] == "bfloat16"


def test_resume_with_nothing_to_resume(tiny_hf: Path, tmp_path: Path) -> None:
    done("import", tiny_hf, tmp_path / "m", "--resume")
    assert (tmp_path / "m/iter_0000000").is_dir()


@pytest.mark.parametrize("flags", [(), ("--json",), ("--quiet",)])
def test_dry_runs_write_nothing(
    tiny_hf: Path, tiny_megatron: Path, tmp_path: Path, flags: tuple[str, ...]
) -> None:
    for command, source, tensors in (("import", tiny_hf, 39), ("export", tiny_megatron, 47)):
        target = tmp_path / "not" / "there"
        out = done(command, source, target, "--dry-run", *flags)
        if "--json" in flags:
            (plan,) = json.loads(out)["result"]["plans"]
            assert (plan["operation"], plan["tensors"]) == (command, tensors)
            assert plan["destination"] == str(target)
            assert plan["bytes_written"] == sum(plan["files"].values())
            assert plan["disk_free"] > 0
            assert plan["expected_seconds"] >= 0
        elif flags:
            assert out == ""
        else:
            assert f"{command} of {tensors} tensors: reads 2.10 MB" in out
            assert "Nothing was written." in out
            assert "config.json" in out
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_shows_the_plan_of_the_run(tiny_hf: Path, tmp_path: Path) -> None:
    (planned,) = result_of("import", tiny_hf, tmp_path / "m", "--dry-run")["plans"]
    said = result_of("import", tiny_hf, tmp_path / "m")
    assert said["plan_sha256"] == [planned["plan_sha256"]]
    assert said["bytes_written"] == planned["bytes_written"]


def test_a_dry_run_refuses_what_the_run_would(
    tiny_hf: Path, tiny_megatron: Path, tmp_path: Path
) -> None:
    """With the same message and exit code, and without touching anything."""
    existing, file = tmp_path / "existing", tmp_path / "file"
    existing.mkdir()
    (existing / "mine").write_text("precious")
    file.write_text("precious")
    before = tree(tmp_path)
    for command, *sources in (
        ("import", tiny_hf),
        ("export", tiny_megatron),
        ("average", tiny_hf, tiny_hf),
    ):
        for destination, says in ((existing, "exists already"), (file, "is a file")):
            planned = run(command, *sources, destination, "--dry-run")
            real = run(command, *sources, destination)
            assert says in real.stderr
            assert planned.exit_code == real.exit_code == 2
            assert planned.stderr == real.stderr
        assert run(command, *sources, existing, "--dry-run", "--overwrite").exit_code == 0
    assert tree(tmp_path) == before


def test_a_dry_run_checks_the_free_space(
    tiny_hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage._replace(free=1000))
    planned = run("import", tiny_hf, tmp_path / "m", "--dry-run")
    assert planned.exit_code == 2
    assert planned.stderr == run("import", tiny_hf, tmp_path / "m").stderr
    assert "the disk is too small: 2,230,351 bytes needed, 1,000 free" in planned.stderr


def test_a_dry_run_plans_each_iteration(tiny_megatron: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_megatron, tmp_path / "m")
    shutil.copytree(tmp_path / "m/iter_0000000", tmp_path / "m/iter_0000004")
    args = ("export", tmp_path / "m", tmp_path / "all", "--iteration", "all")
    plans = result_of(*args, "--dry-run")["plans"]
    assert [Path(p["destination"]).name for p in plans] == ["iter_0000000", "iter_0000004"]
    assert len(result_of(*args)["plan_sha256"]) == 2


@pytest.fixture
def half_saved(tiny_megatron: Path, tmp_path: Path) -> Path:
    """Two sound iterations, one whose save was killed, one of which no more than a folder is."""
    root = tmp_path / "m"
    for number in (0, 4, 8):
        shutil.copytree(tiny_megatron / "iter_0000000", root / f"iter_{number:07d}")
    (root / "iter_0000004/.metadata").unlink()
    (root / "iter_0000009").mkdir()
    (root / "latest_checkpointed_iteration.txt").write_text("8")
    return root


def test_all_iterations_leaves_out_incomplete_saves(
    half_saved: Path, tiny_hf: Path, tmp_path: Path
) -> None:
    for flags in (("--dry-run",), (), ("--json", "--resume")):
        result = run("export", half_saved, tmp_path / "all", "--iteration", "all", *flags)
        assert result.exit_code == 2
        said = " ".join((result.stdout if "--json" in flags else result.stderr).split())
        assert "2 of 4 iterations can't be exported; the others are " in said
        assert f"- iter_0000004: {half_saved}/iter_0000004: no .meta" in said
        assert f"- iter_0000009: {half_saved}/iter_0000009: no metadata.json" in said
    assert sorted(p.name for p in (tmp_path / "all").iterdir()) == ["iter_0000000", "iter_0000008"]
    for folder in (tmp_path / "all").iterdir():
        assert run("verify", tiny_hf, folder).exit_code == 0


def test_all_iterations_refuses_only_incomplete_saves(half_saved: Path, tmp_path: Path) -> None:
    """The reason is said as for a single one: it may be the same for all."""
    for number in (0, 8):
        (half_saved / f"iter_{number:07d}/.metadata").unlink()
    result = run("export", half_saved, tmp_path / "all", "--iteration", "all")
    assert result.exit_code == 2
    assert "iter_0000000: no .metadata" in " ".join(result.stderr.split())
    assert not (tmp_path / "all").exists()


def test_export_names_the_iteration(half_saved: Path, tmp_path: Path) -> None:
    out = done("export", half_saved, tmp_path / "a")
    assert out.splitlines()[1] == f"Exported:    {half_saved}/iter_0000008"
    said = result_of("export", half_saved, tmp_path / "b", "--iteration", 0)
    assert said["sources"] == [f"{half_saved}/iter_0000000"]


def test_only_the_first_process_prints(
    tiny_hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    plan, _ = to_megatron.plan_import(tiny_hf)
    monkeypatch.setattr(to_megatron, "import_checkpoint", lambda *args, **kwargs: plan)
    assert done("import", tiny_hf, tmp_path / "m") == ""
    assert done("import", tiny_hf, tmp_path / "m", "--json") == ""


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("synth", "olmo2-2b", "x"), "'olmo2-2b' is not known. Known are: olmo2-tiny"),
        (("import", "absent", "x"), "absent: no such folder, and not a hub id (owner/name)"),
        (("import", "{hf}", "x", "--dtype", "int4"), "dtype 'int4' is not one of keep"),
        (("import", "{hf}", "{hf}/inside"), "may not be the source, in it, or around it"),
        (("export", "absent", "x"), "absent: no such file or folder"),
        (("export", "{hf}", "x"), "is a Hugging Face checkpoint already"),
        (("export", "{megatron}", "x", "--iteration", "7"), "has no iter_0000007"),
        (("export", "{megatron}", "x", "--max-shard-size", "big"), "'big' is not a size"),
        (("import", "{hf}", "x", "--workers", "0"), "--workers"),
        (("import", "{hf}", "x", "--workers", "many"), "--workers"),
        (("import", "{hf}"), "Missing argument 'DST'"),
        (("import", "{hf}", "x", "--no-such-flag"), "No such option"),
        (("no-such-command",), "No such command"),
    ],
)  # fmt: skip
def test_bad_usage_and_bad_input_exit_with_2(
    args: tuple[str, ...],
    says: str,
    tiny_hf: Path,
    tiny_megatron: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(*(a.format(hf=tiny_hf, megatron=tiny_megatron) for a in args))
    assert result.exit_code == 2
    assert says in result.stderr
    assert result.stdout == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["import", "export", "synth", "verify", "inspect", "doctor"])
def test_help(command: str) -> None:
    assert "Usage" in done(command, "--help")
