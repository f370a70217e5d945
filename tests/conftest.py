"""Hides GPUs from all tests but those of ``pytest -m gpu``, which run by themselves; and gives each
worker one thread, as several workers share the cores.

The processes that tests start inherit it. It has to be said before anything starts CUDA or threads.
"""

import gc
import os

import pytest


def pytest_configure(config: pytest.Config) -> None:
    if config.option.markexpr.strip() != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        os.environ["OMP_NUM_THREADS"] = "1"


def pytest_collection_finish() -> None:
    """Leave what was imported out of garbage collection: destroying process groups collects, and
    each time would look through a million objects of torch and megatron-core."""
    gc.collect()
    gc.freeze()
