"""The mean of several checkpoints: the values that torch computes, in flat memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_olmo_bridge import average_checkpoints, import_checkpoint, verify
from megatron_olmo_bridge.convert.average import plan_average
from megatron_olmo_bridge.convert.options import AverageOptions, ImportOptions
from megatron_olmo_bridge.errors import InputError, OutputError
from megatron_olmo_bridge.storage import transfer
from megatron_olmo_bridge.storage.provenance import read_provenance

HFFactory = Callable[..., Path]


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return {n: t for f in folder.glob("*.safetensors") for n, t in load_file(f).items()}


def torch_mean(
    folders: list[Path], dtype: torch.dtype, weights: list[float] | None = None
) -> dict[str, torch.Tensor]:
    models = [weights_of(folder) for folder in folders]
    shares = torch.tensor(weights or [1.0] * len(models), dtype=torch.float64)
    return {
        name: torch.einsum("n,n...->...", shares, torch.stack([m[name].double() for m in models]))
        .div(shares.sum()).float().to(dtype)
        for name in models[0]
    }  # fmt: skip


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


@pytest.fixture(params=[False, True], ids=["", "small blocks"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks as they are, and so small that small tensors take many."""
    if request.param:
        monkeypatch.setattr(transfer, "BLOCK", 512)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("weights", [None, [0.5, 0.25, 0.25], [1.0, 3.0, 0.1]])
def test_the_mean_equals_torchs(
    make_hf: HFFactory, tmp_path: Path, dtype: str, weights: list[float] | None
) -> None:
    """Mean of a Hugging Face checkpoint and a Megatron checkpoint with a padded vocabulary."""
    wanted = getattr(torch, dtype)
    folders = [make_hf(name, seed=i, dtype=wanted) for i, name in enumerate("abc")]
    import_checkpoint(
        folders[1], tmp_path / "megatron", ImportOptions(make_vocab_size_divisible_by=64)
    )
    sources = [folders[0], tmp_path / "megatron", folders[2]]
    average_checkpoints(
        sources, tmp_path / "mean", AverageOptions(weights=weights, max_shard_size="20KB")
    )
    found = weights_of(tmp_path / "mean")
    assert_equal(found, torch_mean(folders, wanted, weights))
    if dtype == "float32" and weights is None:
        for name, tensor in found.items():
            stacked = torch.stack([weights_of(folder)[name] for folder in folders])
            torch.testing.assert_close(tensor, stacked.mean(0), rtol=2e-7, atol=2e-8)


@pytest.mark.parametrize("count", [2, 3, 5, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_mean_of_copies_is_the_copy(
    make_hf: HFFactory, tmp_path: Path, count: int, dtype: torch.dtype
) -> None:
    hf = make_hf(dtype=dtype)
    average_checkpoints([hf] * count, tmp_path / "equal")
    average_checkpoints(
        [hf] * count, tmp_path / "unequal", AverageOptions(weights=[0.1 + i for i in range(count)])
    )
    assert verify(hf, tmp_path / "equal").equal
    assert verify(hf, tmp_path / "unequal").equal


def test_bfloat16_is_rounded_once_and_not_before(make_hf: HFFactory, tmp_path: Path) -> None:
    folders = [make_hf(name, seed=i, dtype=torch.bfloat16) for i, name in enumerate("ab")]
    average_checkpoints(folders, tmp_path / "mean", AverageOptions(dtype="float32"))
    expected = torch_mean(folders, torch.float32)
    assert_equal(weights_of(tmp_path / "mean"), expected)
    assert any(not torch.equal(t, t.bfloat16().float()) for t in expected.values())
    assert json.loads((tmp_path / "mean/config.json").read_text())["torch_dtype"] == "float32"


def test_dtypes_may_differ_if_one_is_asked_for(make_hf: HFFactory, tmp_path: Path) -> None:
    folders = [make_hf("a"), make_hf("b", seed=1, dtype=torch.bfloat16)]
    with pytest.raises(InputError, match=r"(?s)a and .*b can't be averaged.*dtype, .*Pass --dtype"):
        average_checkpoints(folders, tmp_path / "mean")
    average_checkpoints(folders, tmp_path / "mean", AverageOptions(dtype="bfloat16"))
    assert_equal(weights_of(tmp_path / "mean"), torch_mean(folders, torch.bfloat16))


def test_the_artifacts_are_the_first_sources(make_hf: HFFactory, tmp_path: Path) -> None:
    a, b = make_hf("a"), make_hf("b", seed=1)
    (b / "tokenizer.json").write_text('{"another": "tokenizer"}')
    plan = average_checkpoints([a, b], tmp_path / "mean", AverageOptions(weights=[3, 1]))
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        assert (tmp_path / "mean" / name).read_bytes() == (a / name).read_bytes()
    recorded = read_provenance(tmp_path / "mean")
    assert recorded is not None
    assert recorded["operation"] == "average"
    assert recorded["source"] == f"{a}, {b}"
    assert recorded["options"]["weights"] == [3, 1]
    assert recorded["plan_sha256"] == plan.digest
    assert verify(tmp_path / "mean").equal


def test_another_weight_makes_another_plan(make_hf: HFFactory, tmp_path: Path) -> None:
    sources = [make_hf("a"), make_hf("b", seed=1)]
    plans = [
        plan_average(sources, tmp_path / "m", AverageOptions(weights=w))[0]
        for w in (None, [1, 1], [1, 2])
    ]
    assert plans[0].digest == plans[1].digest != plans[2].digest
    assert plans[0].source_files == [folder / "model.safetensors" for folder in sources]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"num_hidden_layers": 2}, "config, num_layers: 3 and 2"),
        ({"vocab_size": 103}, r"shape, model.embed_tokens.weight: \[101, 36\] and \[103, 36\]"),
        ({"rope_theta": 10000}, "config, rotary_base"),
        ({"tie_word_embeddings": True}, "missing, lm_head.weight: only in the first"),
        ({"eos_token_id": 9}, "config, eos_token_id: absent and 9"),
    ],
)
def test_other_models_are_refused(
    make_hf: HFFactory, tmp_path: Path, changes: dict[str, Any], says: str
) -> None:
    sources = [make_hf("a"), make_hf("same", seed=1), make_hf("other", **changes)]
    with pytest.raises(InputError, match=f"(?s)a and .*other can't be averaged.*{says}"):
        average_checkpoints(sources, tmp_path / "mean")
    assert not (tmp_path / "mean").exists()


@pytest.mark.parametrize(
    ("weights", "says"),
    [([1], "1 weights for 2"), ([1, 0], "above 0, not 0"), ([1, float("nan")], "not nan"),
     ([1, -1], "above 0, not -1")],
)  # fmt: skip
def test_invalid_weights_are_refused(
    make_hf: HFFactory, tmp_path: Path, weights: list[float], says: str
) -> None:
    with pytest.raises(InputError, match=says):
        average_checkpoints(
            [make_hf("a"), make_hf("b")], tmp_path / "mean", AverageOptions(weights=weights)
        )


def test_one_source_is_refused(make_hf: HFFactory, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="two checkpoints or more"):
        average_checkpoints([make_hf("a")], tmp_path / "mean")


@pytest.mark.parametrize("inside", [0, 1])
def test_the_output_may_not_be_in_a_source(make_hf: HFFactory, tmp_path: Path, inside: int) -> None:
    sources = [make_hf("a"), make_hf("b")]
    with pytest.raises(OutputError, match="may not be the source"):
        average_checkpoints(sources, sources[inside] / "mean")


def test_a_value_too_large_for_float16_is_refused(make_hf: HFFactory, tmp_path: Path) -> None:
    def huge(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.norm.weight"][3] = 1e6

    sources = [make_hf("a", change=huge), make_hf("b")]
    with pytest.raises(InputError, match=r"the mean of model.norm.weight: 1 values are too large"):
        average_checkpoints(sources, tmp_path / "mean", AverageOptions(dtype="float16"))
    assert not (tmp_path / "mean").exists()


MEASURE = """
import sys
from megatron_olmo_bridge import average_checkpoints
for folder in sys.argv[1:]:
    average_checkpoints([f"{folder}-0", f"{folder}-1"], f"{folder}-mean")
    [peak] = [line for line in open("/proc/self/status") if line.startswith("VmHWM")]
    print(peak.split()[1])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow_with_the_model(make_hf: HFFactory, tmp_path: Path) -> None:
    """Both in one process: how much of the libraries is resident varies from process to process."""
    # Blocks are then mappings of their own, which are returned to the system when they are freed.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
    folders = [tmp_path / "small", tmp_path / "large"]
    for folder, rows in zip(folders, (100_000, 400_000), strict=True):
        for i in range(2):
            make_hf(f"{folder.name}-{i}", vocab_size=rows, seed=i)
    command = [sys.executable, "-c", MEASURE, *folders]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    small, large = (int(peak) / 1024 for peak in done.stdout.split())
    # The larger has 86 MB more, and twice that is read.
    assert large - small < 12, f"MiB: {small}, {large}"
