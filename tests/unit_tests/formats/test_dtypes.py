"""Names of dtypes, wherever one is taken."""

import re
from pathlib import Path

import pytest
import torch

from megatron_olmo_bridge import (
    AutoBridge,
    average_checkpoints,
    export_checkpoint,
    import_checkpoint,
    inspect,
    synth,
)
from megatron_olmo_bridge.convert.options import AverageOptions, ExportOptions, ImportOptions
from megatron_olmo_bridge.errors import InputError
from megatron_olmo_bridge.formats.dtypes import parse_dtype
from megatron_olmo_bridge.training.config import StepsConfig


@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        ("float32", "float32"), ("fp32", "float32"), ("float", "float32"),
        ("torch.float", "float32"), (torch.float32, "float32"), (torch.float, "float32"),
        ("bfloat16", "bfloat16"), ("bf16", "bfloat16"), ("BF16", "bfloat16"),
        ("torch.bfloat16", "bfloat16"), (torch.bfloat16, "bfloat16"),
        ("float16", "float16"), ("fp16", "float16"), ("half", "float16"),
        ("torch.half", "float16"), (torch.half, "float16"), ("keep", "keep"),
    ],
)  # fmt: skip
def test_what_is_understood(dtype: object, name: str) -> None:
    assert parse_dtype(dtype) == name


@pytest.mark.parametrize("dtype", ["int4", torch.float64, "bf", "", "float8_e4m3fn", None])
def test_others_are_refused_with_a_list(dtype: object) -> None:
    understood = (
        f"dtype {str(dtype)!r} is not one of keep, float32 (fp32, float), bfloat16 (bf16), "
        "float16 (fp16, half)"
    )
    with pytest.raises(InputError, match=f"^{re.escape(understood)}$"):
        parse_dtype(dtype)


def test_keep_is_refused_where_there_is_nothing_to_keep() -> None:
    with pytest.raises(InputError, match=r"^dtype 'keep' is not one of float32 "):
        parse_dtype("keep", keep=False)


def test_the_python_api_takes_torch_dtypes(tiny_hf: Path, tmp_path: Path) -> None:
    import_checkpoint(tiny_hf, tmp_path / "m", ImportOptions(dtype=torch.float16))
    export_checkpoint(tmp_path / "m", tmp_path / "hf", ExportOptions(dtype=torch.float32))
    average_checkpoints([tiny_hf, tiny_hf], tmp_path / "mean", AverageOptions(dtype=torch.half))
    synth("olmo2-tiny", tmp_path / "made", layers=1, dtype=torch.float16)
    found = [inspect(tmp_path / name).dtypes for name in ("m", "hf", "mean", "made")]
    assert found == [["float16"], ["float32"], ["float16"], ["float16"]]


@pytest.mark.parametrize("dtype", ["fp16", torch.float16])
def test_a_live_model_takes_both(tiny_hf: Path, dtype: str | torch.dtype) -> None:
    provider = AutoBridge.from_hf_pretrained(tiny_hf).to_megatron_provider(dtype=dtype)
    assert provider.params_dtype is torch.float16


@pytest.mark.parametrize("precision", ["bf16", torch.bfloat16])
def test_training_takes_both(precision: str) -> None:
    assert StepsConfig(precision=precision).precision == "bfloat16"
