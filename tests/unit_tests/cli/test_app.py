"""The command itself."""

import subprocess
import sys

import pytest
from typer.testing import CliRunner

import megatron_olmo_bridge
from megatron_olmo_bridge.cli import main
from megatron_olmo_bridge.cli.app import app


def test_version_is_printed() -> None:
    result = CliRunner().invoke(app, ["--version"])
    assert result.exit_code == 0
    assert result.stdout == f"olmo-bridge {megatron_olmo_bridge.__version__}\n"


def test_no_arguments_shows_help() -> None:
    result = CliRunner().invoke(app, [])
    assert "Usage" in result.output
    assert result.exit_code == 2


def test_main_runs_the_command_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["olmo-bridge", "--version"])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 0
    assert capsys.readouterr().out.startswith("olmo-bridge ")


def test_the_package_runs_as_a_module() -> None:
    args = [sys.executable, "-m", "megatron_olmo_bridge", "import", "absent", "x"]
    done = subprocess.run(args, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "olmo-bridge: absent: no such folder, and not a hub id (owner/name)\n"
