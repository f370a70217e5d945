"""The model card that a run writes with its export."""

from pathlib import Path

from megatron_olmo_bridge.training.card import write_card
from megatron_olmo_bridge.training.config import OptimizerConfig, StepsConfig, TrainingConfig


def test_settings_are_shown_as_they_are_typed(tiny_hf: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((tiny_hf / "config.json").read_bytes())
    config = TrainingConfig(
        train=StepsConfig(steps=12000, seed=1234), optimizer=OptimizerConfig(lr=6e-4)
    )
    write_card(tmp_path, config, {"step": 12000.0, "tokens": 1e9, "train_loss": 2.5})
    lines = (tmp_path / "README.md").read_text().splitlines()
    for line in ("| train.seed | 1234 |", "| train.steps | 12000 |", "| optimizer.lr | 0.0006 |"):
        assert line in lines
