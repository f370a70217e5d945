"""Which modules a layer is made of, with Transformer Engine there, absent, broken or useless."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("megatron.core")
if torch.cuda.is_available():
    pytest.skip("written for a machine without CUDA", allow_module_level=True)

from importable_te import IMPORTABLE
from megatron.core.tensor_parallel import ColumnParallelLinear

from megatron_olmo_bridge.errors import InputError
from megatron_olmo_bridge.nn.attention import ScaledDotProductAttention
from megatron_olmo_bridge.nn.backends import (
    backend_named,
    why_no_transformer_engine,
)
from megatron_olmo_bridge.nn.post_norm import RMSNorm, RowParallelLinearPostLN
from megatron_olmo_bridge.runtime import te_import


@pytest.fixture(autouse=True)
def looked_up_anew() -> Iterator[None]:
    """The answer is looked up once per process; not so in these tests."""
    why_no_transformer_engine.cache_clear()
    yield
    why_no_transformer_engine.cache_clear()


def install(folder: Path, monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """Put a package of that name where Python finds it."""
    (folder / "transformer_engine").mkdir()
    (folder / "transformer_engine" / "__init__.py").write_text(code)
    monkeypatch.syspath_prepend(folder)
    for name in [name for name in sys.modules if name.partition(".")[0] == "transformer_engine"]:
        monkeypatch.delitem(sys.modules, name)


def test_local_is_plain_pytorch_and_megatrons_linears() -> None:
    local = backend_named("local")
    assert local.column_parallel_linear is ColumnParallelLinear
    assert local.row_parallel_linear_post_norm is RowParallelLinearPostLN
    assert local.core_attention is ScaledDotProductAttention
    assert local.norm is RMSNorm


def test_auto_is_local_where_transformer_engine_is_not_installed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(te_import, "find_spec", lambda name: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert not backend_named("auto").transformer_engine
    assert backend_named() == backend_named("local")
    with pytest.raises(InputError) as caught:
        backend_named("transformer_engine")
    assert str(caught.value) == (
        "backend 'transformer_engine' can't be used: Transformer Engine is not installed. "
        "Use 'local'."
    )


def test_without_cuda_auto_is_local_and_transformer_engine_is_not_even_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, monkeypatch, "raise AssertionError('imported')")
    assert not backend_named("auto").transformer_engine
    with pytest.raises(InputError) as caught:
        backend_named("transformer_engine")
    assert str(caught.value) == (
        "backend 'transformer_engine' can't be used: Transformer Engine needs CUDA, and there is "
        "none here. Use 'local'."
    )


@pytest.mark.parametrize(
    "error",
    [
        "ImportError('undefined symbol: nvte_x')",  # built for another version of torch
        "ModuleNotFoundError('No module named: transformer_engine_torch')",
        "OSError('libcudnn.so.9: cannot open shared object file')",
        "RuntimeError('found empty transformer-engine meta package')",
        "AssertionError('Transformer Engine package version mismatch')",
        "AttributeError('module has no attribute DType')",
    ],
)
def test_where_its_import_fails_the_reason_is_given(
    error: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, monkeypatch, f"raise {error}")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert not backend_named("auto").transformer_engine
    with pytest.raises(InputError) as caught:
        backend_named("transformer_engine")
    reason = error.split("'")[1]
    assert str(caught.value) == (
        "backend 'transformer_engine' can't be used: Transformer Engine can't be imported: "
        f"{reason}. Use 'local'."
    )


@pytest.mark.parametrize("name", ["te", "Local", "", "none"])
def test_another_name_is_refused_with_those_there_are(name: str) -> None:
    with pytest.raises(InputError) as caught:
        backend_named(name)
    assert str(caught.value) == f"backend {name!r} is none of auto, transformer_engine, local"


# ------------------------------------------------ installed from the start, as on a login node

ABSENT = "raise ModuleNotFoundError('a part of it is missing')"

RESOLVE = """
import json
import torch
from megatron.core.extensions import transformer_engine
from megatron_olmo_bridge.nn.backends import backend_named, why_no_transformer_engine

def made_of(name):
    fields = vars(backend_named(name)).items()
    modules = [module for field, module in fields if field != "transformer_engine"]
    return sorted({module.__module__.split(".")[0] + ":" + module.__name__ for module in modules})

found = {"megatron has it": transformer_engine.HAVE_TE, "without CUDA": made_of("auto")}
torch.cuda.is_available = lambda: True
why_no_transformer_engine.cache_clear()
found["with CUDA"] = made_of("auto")
print(json.dumps(found))
"""


def resolved_in_a_process_with(package: str, folder: Path) -> dict[str, Any]:
    (folder / "transformer_engine").mkdir()
    (folder / "transformer_engine" / "__init__.py").write_text(package)
    path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", RESOLVE],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_an_installed_transformer_engine_is_used_where_there_is_cuda_and_only_there(
    tmp_path: Path,
) -> None:
    found = resolved_in_a_process_with(IMPORTABLE, tmp_path)
    assert found["megatron has it"]
    local = vars(backend_named("local")).values()
    names = {module.__name__ for module in local if isinstance(module, type)}
    assert {x.rpartition(":")[2] for x in found["without CUDA"]} == names
    assert {x for x in found["with CUDA"] if "TE" in x} == {
        "megatron:TEColumnParallelLinear",
        "megatron:TENorm",
        "megatron:TERowParallelLinear",
        "megatron_olmo_bridge:MaskedTEDotProductAttention",
        "megatron_olmo_bridge:TERowParallelLinearPostLN",
    }


@pytest.mark.slow
def test_a_transformer_engine_that_cannot_be_imported_is_never_used(tmp_path: Path) -> None:
    found = resolved_in_a_process_with(ABSENT, tmp_path)
    assert not found["megatron has it"]
    assert found["with CUDA"] == found["without CUDA"]
    assert "megatron_olmo_bridge:RowParallelLinearPostLN" in found["without CUDA"]
