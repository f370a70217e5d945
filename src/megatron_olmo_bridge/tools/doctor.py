"""Report what is installed, and which features of this package work with it."""

from __future__ import annotations

import os
import platform
import shutil
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from megatron_olmo_bridge._version import __version__
from megatron_olmo_bridge.errors import install_hint
from megatron_olmo_bridge.storage.cloning import can_clone_within
from megatron_olmo_bridge.storage.transfer import copy_methods

_WITH_MEGATRON = install_hint("megatron")


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's report."""

    what: str
    found: str
    works: bool
    means: str
    """What works with it, or what to do."""


def doctor() -> list[Finding]:
    """Return findings on versions, devices, memory and disk."""
    findings = [
        Finding("megatron-olmo-bridge", __version__, True, "conversion and its proof"),
        Finding("Python", platform.python_version(), True, platform.platform()),
        _package("torch", "a change of dtype", "pip install torch"),
        _package("huggingface_hub", "hub ids as a source", "pip install huggingface_hub"),
        _package("megatron-core", "models that run", _WITH_MEGATRON),
        _package("transformers", "Hugging Face models that run", _WITH_MEGATRON),
        _package("psutil", "megatron-core's checkpoint writer (it hangs without)", _WITH_MEGATRON),
        _transformer_engine(),
    ]
    if find_spec("torch"):
        findings += _devices()
        findings += _attention()
    methods = [method.__name__.strip("_") for method in copy_methods()]
    order = f"in this order: {', '.join(methods)}"
    findings.append(Finding("copying", methods[0], len(methods) > 1, order))
    clones = can_clone_within(Path())
    use = (
        "conversions on this disk share blocks with their source"
        if clones
        else ("conversions on this disk copy; XFS and Btrfs can clone")
    )
    findings.append(Finding("cloning here", "yes" if clones else "no", clones, use))
    return findings + _machine()


def _package(name: str, enables: str, install: str) -> Finding:
    try:
        return Finding(name, version(name), True, enables)
    except PackageNotFoundError:
        return Finding(name, "absent", False, f"for {enables}: {install}")


def _transformer_engine() -> Finding:
    """Return whether Transformer Engine can be imported, which needs more than its wheels."""
    finding = _package(
        "transformer-engine",
        "Transformer Engine layers on GPUs",
        f"on a machine with CUDA {install_hint('gpu')}",
    )
    if finding.works and find_spec("torch"):
        from megatron_olmo_bridge.runtime.te_import import why_no_transformer_engine

        if reason := why_no_transformer_engine():
            return replace(finding, works=False, means=reason)
    return finding


def _attention() -> list[Finding]:
    """Return the attention kernels. On a GPU they depend on head widths and windows."""
    from megatron_olmo_bridge.models.attention_kernels import attention_kernels

    kernels = attention_kernels()
    if not kernels:
        sdpa = "torch's scaled_dot_product_attention"
        return [Finding("attention", sdpa, True, "of all families, with windows and masks")]
    return [
        Finding(
            f"attention, {kernel.size}",
            kernel.kernel,
            not kernel.kernel.startswith("not"),
            f"{kernel.layers}, causal, in bfloat16; with another mask the unfused one",
        )
        for kernel in kernels
    ]


def _devices() -> list[Finding]:
    import torch
    import torch.distributed as dist

    cuda = torch.cuda.is_available()
    name = torch.cuda.get_device_name() if cuda else "none"
    use = "GPU models" if cuda else "conversion needs none; models run on the CPU"
    findings = [Finding("CUDA", name, cuda, use)]
    for backend, device in (("gloo", "CPU"), ("nccl", "GPU")):
        works = dist.is_available() and dist.is_backend_available(backend)
        works = works and (cuda or backend != "nccl")
        use = f"several processes on {device}s"
        findings.append(Finding(backend, "available" if works else "absent", works, use))
    return findings


def _machine() -> list[Finding]:
    findings = [Finding("CPUs", str(os.cpu_count()), True, "--workers up to this many")]
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        findings.append(
            Finding("memory", f"{memory / 2**30:.1f} GiB", True, "conversion needs under 0.4 GiB")
        )
    free = shutil.disk_usage(Path()).free
    use = "a conversion needs the size of its output"
    return [*findings, Finding("disk here", f"{free / 1e9:.1f} GB free", True, use)]
