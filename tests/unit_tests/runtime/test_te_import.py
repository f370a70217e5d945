"""megatron-core is imported, and trains on the CPU, beside any Transformer Engine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("megatron.core")

from importable_te import IMPORTABLE
from slow import slow_but

from megatron_olmo_bridge.runtime import te_import

LOOK = """
import json, logging, sys
import torch
if sys.argv[1] == "cuda":
    torch.cuda.is_available = lambda: True
said = []
class Keep(logging.Handler):
    def emit(self, record):
        said.append(record.getMessage())
logging.getLogger("megatron_olmo_bridge").addHandler(Keep())
if sys.argv[2] == "imported":
    import transformer_engine
import megatron_olmo_bridge
from megatron.core import optimizer
from megatron.core.extensions import transformer_engine as extension
from megatron_olmo_bridge.runtime.te_import import why_no_transformer_engine
print(json.dumps({
    "megatron-core uses it": extension.HAVE_TE,
    "optimizer": optimizer.Adam.__module__.partition(".")[0],
    "why not": why_no_transformer_engine(),
    "said": said,
}))
"""
NO_CUDA = "Transformer Engine needs CUDA, and there is none here"


def look(folder: Path, package: str, *args: str) -> dict[str, Any]:
    """What a process finds that has such a package on its path, with or without CUDA."""
    (folder / "transformer_engine").mkdir()
    (folder / "transformer_engine" / "__init__.py").write_text(package)
    path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LOOK, *args],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_without_cuda_one_that_works_is_not_used(tmp_path: Path) -> None:
    """Its optimizers run on GPUs only."""
    found = look(tmp_path, IMPORTABLE, "no cuda", "not imported")
    assert found == {
        "megatron-core uses it": False,
        "optimizer": "torch",
        "why not": NO_CUDA,
        "said": [],
    }


@pytest.mark.slow
def test_with_cuda_one_that_works_is_used(tmp_path: Path) -> None:
    found = look(tmp_path, IMPORTABLE, "cuda", "not imported")
    assert found == {
        "megatron-core uses it": True,
        "optimizer": "transformer_engine",
        "why not": None,
        "said": [],
    }


@pytest.mark.slow
def test_one_that_was_imported_before_is_left_alone(tmp_path: Path) -> None:
    found = look(tmp_path, IMPORTABLE, "no cuda", "imported")
    assert found["megatron-core uses it"]
    assert found["why not"] == NO_CUDA


ERRORS = [
    "AssertionError('Transformer Engine package version mismatch.')",
    "OSError('libcudnn.so.9: cannot open shared object file')",
    "RuntimeError('Found empty `transformer-engine` meta package installed.')",
    "ImportError('undefined symbol: nvte_x')",
    "AttributeError('')",
]


@pytest.mark.parametrize("error", slow_but(ERRORS[:1], ERRORS))
def test_one_that_fails_is_hidden_and_the_reason_is_given(error: str, tmp_path: Path) -> None:
    found = look(tmp_path, f"raise {error}", "cuda", "not imported")
    assert not found["megatron-core uses it"]
    assert found["optimizer"] == "torch"
    said = error.split("'")[1] or "AttributeError"
    assert found["why not"] == f"Transformer Engine can't be imported: {said}"
    assert found["said"] == [
        f"{found['why not']}. Models are made of PyTorch's modules, which are slower."
    ]


def test_wheels_of_different_versions_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, version in (
        ("transformer_engine", "2.20.2"),
        ("transformer_engine_torch", "2.19.0"),
        ("transformer_engine_cu12", "2.20.2"),
    ):
        info = tmp_path / f"{name}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert te_import._versions_that_differ() == (
        " (installed are transformer-engine 2.20.2, transformer-engine-torch 2.19.0, "
        "transformer-engine-cu12 2.20.2: install one version of all)"
    )
