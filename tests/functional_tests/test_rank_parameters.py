"""The estimated parameters of each rank equal those that megatron-core builds."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pytest
from launching import run_script

from megatron_olmo_bridge.models.families import published_sizes
from megatron_olmo_bridge.training.config import ParallelConfig, StepsConfig, TrainingConfig
from megatron_olmo_bridge.training.estimate import estimate
from megatron_olmo_bridge.training.layout import Layout
from megatron_olmo_bridge.training.resolve import bridge_of


@dataclass
class Case:
    size: str
    parallel: dict[str, Any]
    provider: dict[str, Any] = field(default_factory=dict)
    changes: dict[str, Any] = field(default_factory=dict)

    @property
    def model(self) -> dict[str, Any]:
        return published_sizes()[self.size].sizes[self.size] | self.changes


CASES = {
    2: [
        Case("olmo2-tiny", {"tp": 2}),
        Case("olmo2-tiny", {"tp": 2, "sp": True}, {"make_vocab_size_divisible_by": 768}),
        Case("olmo2-tiny", {"pp": 2, "vpp": 2}),
        Case("olmo2-tiny", {"pp": 2}, {"num_layers_in_first_pipeline_stage": 1}),
        Case("olmo2-tiny", {"pp": 2}, changes={"tie_word_embeddings": True}),
        Case("gpt2-tiny", {"tp": 2}),
        Case("gpt2-tiny", {"pp": 2}),
        Case("olmo-tiny", {"tp": 2}),
        Case("olmoe-tiny", {"ep": 2}),
        Case("flex-olmo-tiny", {"pp": 2}),
    ],
    4: [
        Case("olmo2-tiny", {"tp": 2, "pp": 2}),
        Case("olmo3-tiny", {"tp": 2, "pp": 2}),
        Case("olmoe-tiny", {"tp": 2, "ep": 2, "sp": True}),
        Case("olmoe-tiny", {"tp": 2, "ep": 2, "sp": True}, {"expert_tensor_parallel_size": 1}),
    ],
}


@pytest.mark.parametrize("processes", CASES)
def test_each_rank_holds_the_estimated_parameters(processes: int, tmp_path: Path) -> None:
    cases, out = CASES[processes], tmp_path / "counted.json"
    jobs = [asdict(case) | {"model": case.model} for case in cases]
    run_script("rank_parameters", json.dumps(jobs), out, processes=processes)
    for case, found in zip(cases, json.loads(out.read_text()), strict=True):
        config = TrainingConfig(
            model=case.model,
            provider=case.provider,
            train=StepsConfig(steps=1, global_batch_size=8, precision="float32"),
            parallel=ParallelConfig(**case.parallel),
        )
        stages = estimate(config, bridge_of(config), Layout.of(config, processes)).stages
        # Ranks of a pipeline stage are consecutive: megatron-core's order is tp, ep, dp, pp.
        of_each = processes // len(stages)
        assert found == [s.parameters for s in stages for _ in range(of_each)], case
