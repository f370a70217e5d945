"""What every command does alike: the JSON envelope, errors, exit codes, broken pipes."""

import json
import logging
import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import pytest
import typer
from typer.testing import CliRunner, Result

from megatron_olmo_bridge import __version__
from megatron_olmo_bridge.cli import app as command_line
from megatron_olmo_bridge.cli.command import CommandGroup, Outcome, register
from megatron_olmo_bridge.cli.console import output, say
from megatron_olmo_bridge.errors import AskedToStop, FormatError


@dataclass(frozen=True)
class Found:
    """A result as functions of the package return it."""

    path: Path
    shape: tuple[int, ...]
    error: float


def run_command(function: Callable[..., Outcome], *args: str, **options: Any) -> Result:
    """Run ``olmo-bridge look ...``, where ``look`` is the function."""
    app = typer.Typer(cls=CommandGroup, pretty_exceptions_enable=False)
    app.callback()(lambda: None)
    register(app, "look", function, **options)
    return CliRunner().invoke(app, ["look", *args])


def failing(error: BaseException) -> Callable[[], Outcome]:
    def command() -> Outcome:
        raise error

    return command


def succeeding(at: Annotated[str, typer.Argument(metavar="AT")]) -> Outcome:
    """Look at something."""
    say(f"looked at {at}")
    return Outcome({"at": at})


# ---------------------------------------------------------------------------------- the envelope


def test_json_prints_only_the_envelope() -> None:
    done = run_command(succeeding, "here", "--json")
    assert done.exit_code == 0
    assert done.stderr == ""
    assert json.loads(done.stdout) == {
        "command": "look",
        "ok": True,
        "error": None,
        "result": {"at": "here"},
    }


def test_the_summary_is_printed_unless_quiet() -> None:
    assert run_command(succeeding, "here").stdout == "looked at here\n"
    assert run_command(succeeding, "here", "--quiet").output == ""


def test_options_of_a_command_do_not_affect_the_next() -> None:
    run_command(succeeding, "here", "--json", "--quiet")
    assert not output.silent


def test_a_difference_has_exit_code_1() -> None:
    """The command did its work: ok says so, and the result says what differs."""
    done = run_command(lambda: Outcome({"equal": False}, exit_code=1), "--json")
    assert done.exit_code == 1
    envelope = json.loads(done.stdout)
    assert (envelope["ok"], envelope["result"]) == (True, {"equal": False})


def test_infinity_and_nan_are_null_in_json() -> None:
    """Paths are text, and numbers that JSON lacks are null: Python alone would read ``NaN``."""
    found = Found(Path("a/b"), (2, 3), math.nan)
    done = run_command(lambda: Outcome({"found": [found], "largest": math.inf}), "--json")
    assert json.loads(done.stdout)["result"] == {
        "found": [{"path": "a/b", "shape": [2, 3], "error": None}],
        "largest": None,
    }


def test_output_of_libraries_goes_to_standard_error() -> None:
    def chatty() -> Outcome:
        print("a library says hello")
        return Outcome(3)

    done = run_command(chatty, "--json")
    assert json.loads(done.stdout)["result"] == 3
    assert done.stderr == "a library says hello\n"


def test_only_the_first_process_of_torchrun_prints(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    assert run_command(succeeding, "here").output == ""
    assert run_command(succeeding, "here", "--json").output == ""
    done = run_command(failing(FormatError("shard of rank 1 is damaged")), "--json")
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr == "olmo-bridge: shard of rank 1 is damaged\n"


# ----------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("error", [FormatError, OSError, RuntimeError])
def test_text_from_a_file_is_escaped_and_shortened(error: type[Exception]) -> None:
    said = run_command(failing(error(f"a\x1b[2J\nb{'c' * 10_000}"))).stderr.splitlines()[-3:]
    assert said[0].endswith(r"a\x1b[2J")
    assert said[1].startswith("bccc")
    assert len(said[1]) < 5000
    assert said[2] == "(the rest of this message is left out)"
    printed = run_command(failing(error("a\x1b[2J")), "--json").stdout
    assert json.loads(printed)["error"]["message"].endswith(r"a\x1b[2J")


ERRORS = [
    (FormatError("file x is damaged"), 2, "FormatError", "file x is damaged"),
    (AskedToStop("stopped after step 3"), 75, "AskedToStop", "stopped after step 3"),
    (FileNotFoundError(2, "No such file or directory", "/a/b"), 2, "FileNotFoundError",
     "/a/b: No such file or directory"),
    (OSError(5, "Input/output error"), 2, "OSError", "Input/output error"),
    (OSError("only words"), 2, "OSError", "only words"),
    (KeyboardInterrupt(), 130, "Interrupted", "interrupted."),
]  # fmt: skip


@pytest.mark.parametrize(("error", "code", "kind", "message"), ERRORS)
def test_an_error_prints_one_message(
    error: BaseException, code: int, kind: str, message: str
) -> None:
    done = run_command(failing(error))
    assert (done.exit_code, done.stdout) == (code, "")
    assert done.stderr == f"olmo-bridge: {message}\n"


@pytest.mark.parametrize(("error", "code", "kind", "message"), ERRORS)
def test_an_error_in_json_has_the_same_exit_code(
    error: BaseException, code: int, kind: str, message: str
) -> None:
    done = run_command(failing(error), "--json")
    assert (done.exit_code, done.stderr) == (code, "")
    assert json.loads(done.stdout) == {
        "command": "look",
        "ok": False,
        "error": {"type": kind, "message": message},
        "result": None,
    }


def test_an_interrupted_command_names_its_resume_option() -> None:
    def convert(resume: bool = False) -> Outcome:
        raise KeyboardInterrupt

    done = run_command(convert)
    assert (
        done.stderr == "olmo-bridge: interrupted. Run the same command with --resume to continue.\n"
    )


@pytest.mark.parametrize("flags", [(), ("--json",)])
def test_an_internal_error_shows_its_traceback(flags: tuple[str, ...]) -> None:
    """Not with exit code 1, which says that a difference was found."""
    done = run_command(failing(ZeroDivisionError("of x by y")), *flags)
    assert done.exit_code == 70
    assert "Traceback" in done.stderr
    message = "a bug in olmo-bridge: ZeroDivisionError: of x by y"
    if flags:
        assert json.loads(done.stdout)["error"] == {"type": "ZeroDivisionError", "message": message}
    else:
        assert done.stderr.endswith(f"olmo-bridge: {message}\n")


def test_a_missing_package_is_named_with_its_extra(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Before the command begins, and also where it comes upon it later."""
    expected = (
        "olmo-bridge: this needs pyarrow: pip install 'megatron-olmo-bridge[train]' "
        "(in a clone: pip install -e '.[train]')\n"
    )
    done = run_command(failing(ModuleNotFoundError(name="pyarrow.parquet")))
    assert (done.exit_code, done.stderr) == (2, expected)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    done = run_command(lambda: Outcome(), needs=("pyarrow",))
    assert (done.exit_code, done.stderr) == (2, expected)


def test_without_numpy_torch_does_not_warn(tmp_path: Path) -> None:
    """NumPy is not a dependency of conversion."""
    code = (
        "import sys; sys.modules['numpy'] = None\nfrom megatron_olmo_bridge.cli import main\nmain()"
    )
    args = ["synth", "olmo2-tiny", str(tmp_path / "hf"), "--layers", "1"]
    done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


# ------------------------------------------------------------------------------------------- help


def test_help_ends_with_examples_and_exit_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    for command in command_line.app.registered_commands:
        done = CliRunner().invoke(command_line.app, [str(command.name), "--help"])
        below = done.stdout.rpartition("╯")[2]
        assert "Exit codes: 0 done; " in below
        assert "Examples:" in below or command.name in ("models", "doctor")


# -------------------------------------------------------------------------------------- bad usage


def envelope_of(*args: str) -> Any:
    done = CliRunner().invoke(command_line.app, [*args])
    assert done.exit_code == 2
    assert done.stderr == ""
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("args", "command", "message"),
    [
        (("import", "hf", "--json"), "import", "Missing argument 'DST'"),
        (("--json", "import"), "import", "No such option: --json"),
        (("verify", "--json", "--no-such-flag"), "verify", "No such option: --no-such-flag"),
        (("verify", "a", "b", "-j", "0", "--json"), "verify", "Invalid value for '--workers'"),
        (("no-such-command", "--json"), None, "No such command 'no-such-command'"),
    ],
)
def test_bad_usage_prints_the_envelope(
    args: tuple[str, ...], command: str | None, message: str
) -> None:
    envelope = envelope_of(*args)
    assert envelope["command"] == command
    assert (envelope["ok"], envelope["result"]) == (False, None)
    assert envelope["error"]["type"] == "UsageError"
    assert message in envelope["error"]["message"]


def test_json_after_two_dashes_is_an_argument() -> None:
    done = CliRunner().invoke(command_line.app, ["verify", "--", "--json"])
    assert done.exit_code == 2
    assert done.stdout == ""
    assert "--json: no such file or folder" in done.stderr


def test_every_command_is_registered_in_the_same_way() -> None:
    """So that none lacks the envelope, or ends in a way of its own."""
    for command in command_line.app.registered_commands:
        done = CliRunner().invoke(command_line.app, [str(command.name), "--help"])
        assert done.exit_code == 0
        assert {"--json", "--quiet", "--verbose", "--log-file"} <= set(done.stdout.split())


# -------------------------------------------------------------------------------------------- logs


def logged() -> Outcome:
    logging.getLogger("megatron_olmo_bridge.convert").info("three files")
    logging.getLogger("megatron_olmo_bridge.convert").debug("the first file")
    return Outcome(3)


def test_verbose_logs_to_standard_error() -> None:
    done = run_command(logged, "--verbose", "--json")
    assert json.loads(done.stdout)["result"] == 3
    first, *_, happened, end = done.stderr.splitlines()
    assert first.startswith(f"olmo-bridge {__version__}: ")
    assert f"torch {version('torch')}" in done.stderr
    assert happened == "three files"
    assert end.startswith("done in ")
    assert run_command(logged).output == ""


def test_a_log_file_has_every_detail_even_if_quiet(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert run_command(logged, "--quiet", "--log-file", str(log)).output == ""
    text = log.read_text()
    assert "INFO megatron_olmo_bridge.convert: three files" in text
    assert "DEBUG megatron_olmo_bridge.convert: the first file" in text
    done = run_command(failing(FormatError("file x is damaged")), "--log-file", str(log))
    assert done.stderr == "olmo-bridge: file x is damaged\n"
    added = log.read_text().removeprefix(text)
    assert "by FormatError" in added
    assert "Traceback" in added


def test_a_log_file_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    done = run_command(logged, "--log-file", str(tmp_path / "absent/log"))
    assert done.exit_code == 2
    assert done.stderr == f"olmo-bridge: {tmp_path}/absent/log: No such file or directory\n"


def test_a_conversion_logs_how_each_tensor_was_copied(tiny_hf: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    args = ["import", str(tiny_hf), str(tmp_path / "m"), "--log-file", str(log)]
    assert CliRunner().invoke(command_line.app, args).exit_code == 0
    text = log.read_text()
    for line in (
        f"import of {tiny_hf} into {tmp_path / 'm.partial'}: 2230351 bytes in 1 files",
        "embedding.word_embeddings.weight: copied by the kernel, 262144 bytes",
        "linear_qkv.weight: through memory",
        "iter_0000000/__0_0.distcp: written and synced",
        f"{tmp_path / 'm'}: complete",
    ):
        assert line in text


# ----------------------------------------------------------------------------------- broken pipes


@pytest.mark.parametrize("args", [("models",), ("models", "--json"), ("import", "--help")])
def test_a_closed_pipe_is_not_an_error(args: tuple[str, ...]) -> None:
    """``olmo-bridge models | head -1``: exit code 1 would say that a difference was found."""
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "megatron_olmo_bridge", *args]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, "")


def test_under_torchrun_an_error_is_printed_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first process that finds it prints it; an error of only one process is printed too."""
    printed = []
    for rank, message in enumerate(["no such folder", "no such folder", "out of range"]):
        (tmp_path / f"{rank}").mkdir()
        monkeypatch.setenv("RANK", f"{rank}")
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", f"{tmp_path}/{rank}/error.json")
        done = run_command(failing(FormatError(message)))
        assert done.exit_code == 2
        printed.append(done.stderr)
    assert printed == ["olmo-bridge: no such folder\n", "", "olmo-bridge: out of range\n"]


@pytest.mark.parametrize("place", [os.devnull, "/nowhere/0/error.json"])
def test_without_torchrun_s_folder_each_process_prints(
    place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", place)
    for _ in range(2):
        assert run_command(failing(FormatError("no"))).stderr == "olmo-bridge: no\n"
