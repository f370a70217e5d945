"""Hide GPUs from all tests except those of ``pytest -m gpu``, which run separately, and limit each
worker to one thread, because several workers share the cores.

Processes that tests start inherit these settings, which must be in place before anything starts
CUDA or threads.
"""

import gc
import os
import tempfile

import pytest


def pytest_configure(config: pytest.Config) -> None:
    if config.option.markexpr.strip() != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        os.environ["OMP_NUM_THREADS"] = "1"


def pytest_collection_finish() -> None:
    """Exclude imported objects from garbage collection: destroying process groups triggers it, and
    each time it would traverse a million objects of torch and megatron-core."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def temporary_folder(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep the temporary files of all processes with those of the tests, so that what a killed
    process leaves behind is removed too. The name is short because paths of sockets are limited."""
    tempfile.tempdir = os.environ["TMPDIR"] = str(tmp_path_factory.mktemp("t"))
