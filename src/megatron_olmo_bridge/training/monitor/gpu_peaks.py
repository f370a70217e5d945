"""Peak FLOP/s of GPUs: the denominator of utilisation."""

from __future__ import annotations

import re

PEAKS = {
    r"\bGB200\b": 2500e12,
    r"\bB200\b": 2250e12,
    r"\bGH200\b": 990e12,
    r"\bH200 NVL\b": 835e12,
    r"\bH200\b": 989e12,
    r"\bH100 NVL\b": 835e12,
    r"\bH100 PCIe\b": 756e12,
    r"\bH100 \d+GB HBM3\b": 989e12,  # SXM
    r"\bA[18]00\b": 312e12,
    r"\bA40\b": 149.7e12,
    r"\bA30\b": 165e12,
    r"\bA10G\b": 70e12,
    r"\bA10\b": 125e12,
    r"\bL40S\b": 362e12,
    r"\bL40\b": 181e12,
    r"\bL4\b": 121e12,
}
"""Patterns of the name that torch gives a device, and its dense bfloat16 tensor-core FLOP/s.

Source: NVIDIA's data sheet of each product (of A10G: the one that AWS publishes). From Hopper and
Ada on they state the rate with sparsity; half of that stands here."""


def peak_flops(device: str) -> float | None:
    """Return dense bfloat16 FLOP/s of a device; None if unknown, or only a slice of one (MIG).

    Nothing is guessed: an unknown variant of a known product has no peak.
    """
    if "MIG" in device:
        return None
    return next((peak for name, peak in PEAKS.items() if re.search(name, device)), None)
