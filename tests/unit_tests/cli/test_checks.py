"""verify, inspect and doctor on the command line."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from megatron_olmo_bridge.cli.app import app

HF = Callable[..., Path]


def run(*args: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in args])


def result_of(command: Result) -> Any:
    """What ``--json`` printed of a command that did its work."""
    envelope = json.loads(command.stdout)
    assert envelope["ok"]
    return envelope["result"]


def test_verify_of_equal_checkpoints(tiny_hf: Path, tiny_megatron: Path) -> None:
    result = run("verify", tiny_hf, tiny_megatron, "--workers", 2)
    assert result.exit_code == 0
    assert result.stdout == "Equal: 47 tensors, 2.10 MB compared bit for bit.\n"
    said = result_of(run("verify", tiny_hf, tiny_megatron, "--json"))
    assert said == {
        "equal": True,
        "differences": [],
        "compared": 47,
        "nbytes": 2_100_992,
        "notes": [],
        "checked": "tensors",
    }
    assert run("verify", tiny_hf, tiny_megatron, "--quiet").output == ""


def test_verify_of_different_checkpoints(make_hf: HF) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    a, b = make_hf("a"), make_hf("b", change=lambda t: t[name][4].zero_())
    result = run("verify", a, b)
    assert result.exit_code == 1
    for text in (
        "differs",
        "values",
        name,
        "36 of 1800 differ; first at [4, 0]: ",
        "NOT equal: 1 difference(s). 36 tensors",
    ):
        assert text in result.stdout
    result = run("verify", a, b, "--json")
    assert result.exit_code == 1
    (difference,) = result_of(result)["differences"]
    assert (difference["kind"], difference["name"]) == ("values", name)
    result = run("verify", a, b, "--quiet")
    assert (result.exit_code, result.output) == (1, "")


def test_only_the_table_shortens_a_long_list_of_differences(make_hf: HF) -> None:
    a = make_hf("a", num_hidden_layers=6)
    b = make_hf("b", num_hidden_layers=6, dtype=torch.bfloat16)
    assert "... and 29 more; --json lists all." in run("verify", a, b).stdout
    assert len(result_of(run("verify", a, b, "--json"))["differences"]) == 69


def test_a_fingerprint_and_what_it_proves(
    tiny_hf: Path, tiny_megatron: Path, tmp_path: Path
) -> None:
    leaves = tmp_path / "leaves.json"
    result = run("fingerprint", tiny_hf, "--leaves", leaves)
    root = result.stdout.split()[0]
    assert result.stdout == f"{root}  {tiny_hf}: 47 tensors, 47 blocks, 2.10 MB\n"
    said = result_of(run("fingerprint", tiny_megatron, "--json"))
    assert said == {"fingerprint": root, "blocks": 47, "nbytes": 2_100_992, "leaves": None}

    result = run("verify", tiny_megatron, "--fingerprint", root)
    assert result.exit_code == 0
    assert result.stdout == "Equal: 47 tensors, 2.10 MB compared with the fingerprint.\n"
    result = run("verify", tiny_megatron, "--against", leaves)
    assert result.stdout == "Equal: 47 blocks, 2.10 MB compared with their hashes.\n"
    result = run("verify", tiny_megatron, "--against", leaves, "--sample", 12, "--seed", 3)
    assert "A sample of 12 of 47 blocks, with --seed 3" in result.stdout
    assert "a probability of 25.53 %, and 14 or more with 99 %" in result.stdout
    said = result_of(
        run("verify", tiny_megatron, "--against", leaves, "--sample", 12, "--seed", 3, "--json")
    )
    assert said["sample"] == {
        "blocks": 12, "total": 47, "seed": 3, "finds_one_changed": 1 - 35 / 47,
        "changed_for_99_percent": 14,
    }  # fmt: skip


def test_other_weights_have_another_fingerprint(make_hf: HF, tmp_path: Path) -> None:
    a, b = make_hf("a"), make_hf("b", seed=1)
    result = run("fingerprint", a, "--leaves", tmp_path / "leaves.json", "--tensors")
    root = result.stdout.splitlines()[-1].split()[0]
    for expected in (["--fingerprint", root], ["--against", tmp_path / "leaves.json"]):
        result = run("verify", b, *expected)
        assert result.exit_code == 1
        assert "NOT equal" in result.stdout
    assert "block 0, bytes 0 to 14,543" in result.stdout
    hashes = {
        t["name"]: t for t in result_of(run("fingerprint", a, "--tensors", "--json"))["tensors"]
    }
    assert len(hashes) == 36
    assert hashes["lm_head.weight"]["shape"] == [101, 36]
    assert hashes["lm_head.weight"]["dtype"] == "float32"
    assert hashes["lm_head.weight"]["hash"] in run("fingerprint", a, "--tensors").stdout


def test_one_path_is_compared_with_its_record(tiny_megatron: Path) -> None:
    result = run("verify", tiny_megatron)
    assert result.exit_code == 0
    assert "Note: no checksums were recorded" in result.stdout
    assert "Sizes only, no difference: 7 files" in result.stdout
    assert "Equal" not in result.stdout
    assert result_of(run("verify", tiny_megatron, "--json"))["checked"] == "sizes"


def test_one_path_is_compared_with_its_checksums(tiny_hf: Path, tmp_path: Path) -> None:
    run("import", tiny_hf, tmp_path / "m", "--checksum")
    assert "Equal: 7 files compared with the record." in run("verify", tmp_path / "m").stdout
    assert result_of(run("verify", tmp_path / "m", "--json"))["checked"] == "checksums"
    assert result_of(run("verify", tmp_path / "m", tiny_hf, "--json"))["checked"] == "tensors"


def test_verify_of_one_path_needs_a_record(tiny_hf: Path) -> None:
    result = run("verify", tiny_hf)
    assert result.exit_code == 2
    assert "nothing was recorded" in result.stderr


def test_inspect_prints_a_summary(tiny_hf: Path, tiny_megatron: Path) -> None:
    result = run("inspect", tiny_megatron)
    assert result.exit_code == 0
    for text in (
        "Megatron torch_dist, layers stacked in one key",
        "olmo2, olmo2-tiny",
        "1,050,496",
        "bfloat16",
        "iter_0000000",
        str(tiny_hf),
        "num_query_groups",
    ):
        assert text in result.stdout, text
    assert "linear_qkv" not in result.stdout
    assert run("inspect", tiny_megatron, "--quiet").output == ""


def test_inspect_tensors_and_mapping(tiny_megatron: Path) -> None:
    tensors = run("inspect", tiny_megatron, "--tensors").stdout
    assert "decoder.layers.3.mlp.linear_fc1.weight" in tensors
    assert "[768, 128]" in tensors
    mapping = run("inspect", tiny_megatron, "--mapping").stdout
    line = next(li for li in mapping.splitlines() if "linear_qkv" in li and "k_proj" in li)
    assert line.split()[:3] == [
        "decoder.layers.*.self_attention.linear_qkv.weight",
        "[32:48,",
        "0:128]",
    ]
    assert "ignored: computed from rope_theta" in mapping


def test_inspect_json_has_tensors_and_mapping_only_on_request(tiny_hf: Path) -> None:
    short = result_of(run("inspect", tiny_hf, "--json"))
    assert not short.keys() & {"tensors", "mapping"}
    said = result_of(run("inspect", tiny_hf, "--json", "--tensors", "--mapping"))
    assert short.items() <= said.items()
    assert (said["kind"], said["size"], said["dtypes"]) == (
        "Hugging Face",
        "olmo2-tiny",
        ["bfloat16"],
    )
    assert len(said["tensors"]) == 47
    assert said["mapping"]
    assert said["megatron_flags"]


def test_inspect_of_a_padded_vocabulary(make_hf: HF, tmp_path: Path) -> None:
    hf = make_hf()
    run("import", hf, tmp_path / "m", "--make-vocab-size-divisible-by", 128)
    assert "101, padded to 128" in run("inspect", tmp_path / "m").stdout
    assert "padded to" not in run("inspect", hf).stdout


def test_megatron_args_are_printed_in_one_line(tiny_megatron: Path) -> None:
    out = run("inspect", tiny_megatron, "--megatron-args").stdout
    assert out.count("\n") == 1
    assert out.startswith("--use-checkpoint-args --ckpt-format torch_dist")


def test_inspect_refuses_a_folder_without_a_checkpoint(tmp_path: Path) -> None:
    result = run("inspect", tmp_path)
    assert result.exit_code == 2
    assert f"{tmp_path}: not a checkpoint" in result.stderr


def test_doctor_prints_versions_and_a_conclusion() -> None:
    result = run("doctor")
    assert result.exit_code == 0
    for text in ("megatron-olmo-bridge", "torch", "gloo", "copy_file_range", "disk here"):
        assert text in result.stdout
    found = result_of(run("doctor", "--json"))
    assert found[0].keys() == {"what", "found", "works", "means"}
    assert run("doctor", "--quiet").output == ""


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_names_every_command_and_exit_code(flag: str) -> None:
    out = run(flag).stdout
    for command in (
        "synth",
        "import",
        "export",
        "verify",
        "inspect",
        "doctor",
        "compare",
        "roundtrip",
        "generate",
    ):
        assert command in out
    assert "Exit codes: 0 done, 1 a difference was found, 2 bad usage or input" in out
