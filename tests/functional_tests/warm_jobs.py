"""Jobs of ``compare`` and ``roundtrip`` in forked processes, which start in a fraction of a second.
A module has them by ``pytest_plugins = ["warm_jobs"]``."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import pytest
from launching import run_script

from megatron_olmo_bridge.inference.jobs import JOB, Job


def run(job: Job, tell: Any = None) -> None:
    """Do a job with the worker's own code."""
    run_script(
        "megatron_olmo_bridge.inference.worker",
        processes=job.tp * job.pp * job.ep,
        environment={JOB: json.dumps(asdict(job))},
    )


@pytest.fixture(scope="module")
def warm_jobs() -> Iterator[None]:
    """Jobs are done by forked processes instead of by new ones."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Job, "run", run)
        yield
