"""Build models at parallel layouts and count each rank's parameters. Contains no tests.

rank_parameters.py '[{"model": {...}, "fields": {...}}, ...]' OUT.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch.distributed as dist
from live_model import everyone, leave_layout

from megatron_olmo_bridge.runtime.process_groups import started_together
from megatron_olmo_bridge.training.config import ParallelConfig, StepsConfig, TrainingConfig
from megatron_olmo_bridge.training.resolve import resolve


def main() -> None:
    jobs, out = json.loads(sys.argv[1]), Path(sys.argv[2])
    counted = []
    for job in jobs:
        config = TrainingConfig(
            model=job["model"],
            provider=job["provider"],
            train=StepsConfig(
                steps=1, global_batch_size=8, sequence_length=64, precision="float32"
            ),
            parallel=ParallelConfig(**job["parallel"]),
        )
        provider = resolve(config, None, started_together()).provider
        chunks = provider.provide_distributed_model(wrap_with_ddp=False)
        parameters = {id(p): p.numel() for chunk in chunks for p in chunk.parameters()}
        counted.append(everyone(sum(parameters.values())))
        leave_layout()
    if dist.get_rank() == 0:
        out.write_text(json.dumps(counted))
