"""What the files around the source say of the project."""

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_olmo_bridge import __version__

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def read(file: str) -> Any:
    """Return what a YAML file of the repository holds."""
    return yaml.safe_load((ROOT / file).read_text())


def test_the_changelog_and_the_citation_have_the_version_and_its_date() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text()
    citation = read("CITATION.cff")
    assert citation["version"] == __version__
    assert f"\n## [{__version__}] - {citation['date-released']}\n" in changelog
    assert f"\n[{__version__}]: {PROJECT['urls']['Repository']}/" in changelog
    assert citation["repository-code"] == PROJECT["urls"]["Repository"]


def test_continuous_integration_runs_make_targets_on_each_supported_python() -> None:
    (matrix,) = [
        job["strategy"]["matrix"] for job in read(".github/workflows/ci.yml")["jobs"].values()
    ]
    targets = [entry["target"] for entry in matrix["include"]]
    assert {"test", "wheel"} <= set(targets) <= TARGETS
    versions = {entry["python"] for entry in matrix["include"]}
    prefix = "Programming Language :: Python :: "
    assert {prefix + version for version in versions} == {
        line for line in PROJECT["classifiers"] if line.startswith(prefix)
    }


def test_hooks_run_the_tools_of_make_lint() -> None:
    (repository,) = read(".pre-commit-config.yaml")["repos"]
    tools = {hook["entry"].split()[0].removeprefix(".venv/bin/") for hook in repository["hooks"]}
    lint = (ROOT / "Makefile").read_text().partition("\nlint:")[2].partition("\n\n")[0]
    assert tools == set(re.findall(r"\$\(VENV\)/bin/(\w+)", lint))


@pytest.mark.parametrize("name", ["bug", "feature"])
def test_issue_forms_ask_something(name: str) -> None:
    form = read(f".github/ISSUE_TEMPLATE/{name}.yml")
    assert form["name"]
    assert form["description"]
    ids = [field["id"] for field in form["body"] if field["type"] != "markdown"]
    assert len(ids) == len(set(ids)) > 0
