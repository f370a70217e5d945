"""The doctor: what is installed and what works."""

import importlib.metadata

import pytest
import torch

from megatron_olmo_bridge import __version__
from megatron_olmo_bridge.convert import doctor as module
from megatron_olmo_bridge.convert.doctor import doctor


def test_versions_devices_and_machine() -> None:
    found = {f.what: f for f in doctor()}
    assert found["megatron-olmo-bridge"].found == __version__
    assert (found["torch"].found, found["torch"].works) == (importlib.metadata.version("torch"),
                                                            True)  # fmt: skip
    assert found["CUDA"].works is torch.cuda.is_available()
    assert found["gloo"].works is torch.distributed.is_gloo_available()
    assert found["disk here"].found.endswith("GB free")
    assert found["memory"].found.endswith("GiB")
    assert found["copying"].found == "copy_file_range"
    assert {f.what for f in doctor()} >= {"CPUs", "nccl", "transformer-engine", "psutil"}


def test_what_is_absent_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
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
