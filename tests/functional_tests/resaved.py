"""Load a run's state into a live model and optimizer, and save it unchanged. Contains no tests.

resaved.py '{"init": {...}, "data": {...}, "parallel": {...}, "checkpoint": {...}}'
"""

from __future__ import annotations

import json
import sys

from megatron_olmo_bridge.runtime.process_groups import started_together
from megatron_olmo_bridge.tasks.language_modelling import LanguageModelling, with_model
from megatron_olmo_bridge.training.loop import save
from megatron_olmo_bridge.training.recipes import from_dict
from megatron_olmo_bridge.training.resolve import resolve
from megatron_olmo_bridge.training.setup import started


def main() -> None:
    config, source = with_model(from_dict(json.loads(sys.argv[1])))
    resolved = resolve(config, source, started_together())
    with started(resolved, LanguageModelling.open, say=lambda line: None) as run:
        save(run, any_layout=True)
