"""The package as users get it: built, installed alone, and used outside the repository."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("setuptools", minversion="77")

ROOT = Path(__file__).parents[2]
NOT_COPIED = shutil.ignore_patterns(".*", "build", "*.egg-info", "__pycache__", "*-output")
CLEAN = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}


def build(source: Path, kind: str, out: Path) -> Path:
    """Build the ``wheel`` or the ``sdist`` of a folder with the backend that pip would use."""
    code = f"from setuptools.build_meta import build_{kind} as build; build({str(out)!r})"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=source, env=CLEAN, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (built,) = out.iterdir()
    return built


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = tmp_path_factory.mktemp("source") / "copy"
    shutil.copytree(ROOT, source, symlinks=True, ignore=NOT_COPIED)
    return build(source, "wheel", tmp_path_factory.mktemp("wheel"))


def files_of(wheel: Path) -> set[str]:
    names = zipfile.ZipFile(wheel).namelist()
    return {name for name in names if ".dist-info/" not in name}


def test_the_wheel_has_every_recipe_and_only_the_package(wheel: Path) -> None:
    recipes = {
        f"megatron_olmo_bridge/recipes/{file.relative_to(ROOT / 'recipes').as_posix()}"
        for file in (ROOT / "recipes").rglob("*")
        if file.is_file() and "__pycache__" not in file.parts and file.suffix != ".md"
    }
    assert "megatron_olmo_bridge/recipes/launch/slurm.sbatch" in recipes
    names = files_of(wheel)
    assert {name for name in names if name.startswith("megatron_olmo_bridge/recipes/")} == recipes
    assert {name.partition("/")[0] for name in names} == {"megatron_olmo_bridge"}


def test_a_wheel_built_from_the_sdist_is_the_same(wheel: Path, tmp_path: Path) -> None:
    source = tmp_path / "copy"
    shutil.copytree(ROOT, source, symlinks=True, ignore=NOT_COPIED)
    (tmp_path / "sdist").mkdir()
    shutil.unpack_archive(build(source, "sdist", tmp_path / "sdist"), tmp_path, filter="data")
    (unpacked,) = tmp_path.glob("megatron_olmo_bridge-*")
    (tmp_path / "wheel").mkdir()
    assert files_of(build(unpacked, "wheel", tmp_path / "wheel")) == files_of(wheel)


# ----------------------------------------------------------------------------- in a new environment


def documented(section: str) -> list[str]:
    """Return the commands in a section of recipes/README.md, except the one that installs."""
    text = (ROOT / "recipes" / "README.md").read_text().partition(f"## {section}\n")[2]
    lines = re.findall(r"^    (\S.*?)(?: {2,}#.*)?$", text.partition("\n## ")[0], re.MULTILINE)
    return [line for line in lines if not line.startswith("pip ")]


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Make a virtual environment with torch, the wheel and its extra; return its variables."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", folder], env=CLEAN, check=True)
    install = [folder / "bin" / "pip", "install", "--quiet", "-c", ROOT / "constraints.txt"]
    for package in ("torch", f"{wheel}[train]"):
        subprocess.run([*install, package], env=CLEAN, check=True)
    return CLEAN | {"PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"}


def run(command: str, folder: Path, environment: dict[str, str]) -> str:
    done = subprocess.run(
        command, shell=True, cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.mark.slow
def test_an_installed_wheel_converts(environment: dict[str, str], tmp_path: Path) -> None:
    where = run(
        "python -c 'import megatron_olmo_bridge as m; print(m.__file__)'", tmp_path, environment
    )
    assert "site-packages" in where
    for command in ("synth olmo2-tiny hf", "import hf megatron", "export megatron back"):
        run(f"olmo-bridge {command}", tmp_path, environment)
    assert "Equal" in run("olmo-bridge verify hf back", tmp_path, environment)


@pytest.mark.slow
def test_an_installed_wheel_trains_as_documented(
    environment: dict[str, str], tmp_path: Path
) -> None:
    assert "olmo2_tiny" in run("olmo-bridge recipes", tmp_path, environment)
    commands = documented("The first run")
    assert [c.split()[1] for c in commands if c.startswith("olmo-bridge")] == [
        "recipes",
        "recipes",
        "prepare-data",
        "train",
        "export",
        "generate",
    ]
    for command in commands:
        shorter = " train.steps=20 schedule.warmup_steps=5" if " train " in command else ""
        run(command + shorter, tmp_path, environment)
    assert (tmp_path / "runs/first/report.html").is_file()
    assert (tmp_path / "model/model.safetensors").is_file()
