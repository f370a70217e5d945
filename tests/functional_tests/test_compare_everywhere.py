"""`compare` and `roundtrip` raise no false alarm: every family, dtype and layout.

The full table is slow; a part of it runs by default. test_compare.py tests that mistakes are found.
"""

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("megatron.core")

from megatron_olmo_bridge import synth
from megatron_olmo_bridge.inference.compare import compare
from megatron_olmo_bridge.inference.roundtrip import roundtrip

pytest_plugins = ["warm_jobs"]
pytestmark = pytest.mark.usefixtures("warm_jobs")

LAYOUTS: dict[str, dict[str, Any]] = {
    "tp1": {},
    "tp2": {"tp": 2},
    "tp2-sp": {"tp": 2, "sp": True},
    "pp2": {"pp": 2},
    "ep2": {"ep": 2},
}
MIXTURES = ("olmoe-tiny", "flex-olmo-tiny")
MODELS = ("olmo-tiny", "olmo2-tiny", "olmo3-tiny", "gpt2-tiny", *MIXTURES)
DTYPES = ("float32", "bfloat16", "float16")
FAST = {("olmo2-tiny", "bfloat16", "tp2-sp"), ("olmoe-tiny", "bfloat16", "ep2")}
CASES = [
    pytest.param(*case, marks=() if case in FAST else pytest.mark.slow, id="-".join(case))
    for model in MODELS
    for dtype in DTYPES
    for layout in LAYOUTS
    if layout != "ep2" or model in MIXTURES
    for case in [(model, dtype, layout)]
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with each model stored in each dtype."""
    root = tmp_path_factory.mktemp("models")
    for model in MODELS:
        for dtype in DTYPES:
            synth(model, root / f"{model}-{dtype}", dtype=dtype)
    return root


@pytest.mark.parametrize(("model", "dtype", "layout"), CASES)
def test_a_model_is_itself(models: Path, model: str, dtype: str, layout: str) -> None:
    """A model may run in a dtype other than the stored one."""
    hf = models / f"{model}-bfloat16"

    found = compare(hf, hf, dtype=dtype, **LAYOUTS[layout])

    assert found.equal, found.verdict
    assert found.differs_from is None
    assert found.magnitude > 0.5
    assert found.top1_agreement > 0.9
    if dtype != "float32":  # the reference ran in float32
        assert found.layers[-1].error > 0


@pytest.mark.parametrize(("model", "dtype", "layout"), CASES)
def test_nothing_is_lost(models: Path, model: str, dtype: str, layout: str) -> None:
    found = roundtrip(models / f"{model}-{dtype}", **LAYOUTS[layout])

    assert found.ok, [step.result for step in found.steps]
    assert ", allowed " in found.steps[-1].result
    assert found.steps[-1].result.endswith("on 64 tokens")
