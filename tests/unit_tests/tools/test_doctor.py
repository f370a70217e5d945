"""The doctor: what is installed and what works."""

import importlib.metadata

import pytest
import torch

from megatron_olmo_bridge import __version__
from megatron_olmo_bridge.runtime import te_import
from megatron_olmo_bridge.tools import doctor as module
from megatron_olmo_bridge.tools.doctor import doctor


def test_versions_devices_and_machine() -> None:
    found = {f.what: f for f in doctor()}
    assert found["megatron-olmo-bridge"].found == __version__
    assert (found["torch"].found, found["torch"].works) == (
        importlib.metadata.version("torch"),
        True,
    )
    assert found["CUDA"].works is torch.cuda.is_available()
    assert found["gloo"].works is torch.distributed.is_gloo_available()
    assert found["disk here"].found.endswith("GB free")
    assert found["memory"].found.endswith("GiB")
    assert found["copying"].found == "copy_file_range"
    assert {f.what for f in doctor()} >= {"CPUs", "nccl", "transformer-engine", "psutil"}


def test_without_transformer_engine_attention_runs_in_torch() -> None:
    if torch.cuda.is_available():
        pytest.skip("written for a machine without CUDA")
    found = {f.what: f for f in doctor()}
    assert found["attention"].found == "torch's scaled_dot_product_attention"


def test_an_installed_transformer_engine_that_cannot_be_used_says_why(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if torch.cuda.is_available():
        pytest.skip("written for a machine without CUDA")
    real = module.version
    monkeypatch.setattr(
        module, "version", lambda name: "2.20.2" if name == "transformer-engine" else real(name)
    )
    reason = "Transformer Engine can't be imported: libcudnn.so.9: no such file"
    monkeypatch.setattr(te_import, "_hidden", reason)
    found = {f.what: f for f in doctor()}["transformer-engine"]
    assert (found.found, found.works, found.means) == ("2.20.2", False, reason)


def test_a_missing_package_is_reported_with_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = module.version

    def without_megatron(name: str) -> str:
        if name == "megatron-core":
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(module, "version", without_megatron)
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    found = {f.what: f for f in doctor()}
    megatron = found["megatron-core"]
    assert (megatron.found, megatron.works) == ("absent", False)
    assert "pip install 'megatron-olmo-bridge[megatron]'" in megatron.means
    assert "CUDA" not in found  # without torch there is nothing to ask
