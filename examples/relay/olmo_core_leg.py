"""One leg of the relay: train with OLMo-core's own trainer, on a CPU.

    python olmo_core_leg.py TOKENS SAVE --stop N [--load STEP]

TOKENS is a folder with raw token files. Checkpoints go to SAVE/stepN, each step's loss to
SAVE/losses.json. Needs ``ai2-olmo-core``.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

LENGTH, BATCH, STEPS = 64, 16, 75
"""Tokens of a sequence, sequences of a batch, and steps of the whole run."""


def config(tokens: Path) -> dict[str, Any]:
    """Return the sections of the run's config: what a training script of OLMo-core has."""
    from olmo_core.data import NumpyDataLoaderConfig, NumpyFSLDatasetConfig, TokenizerConfig
    from olmo_core.nn.transformer import TransformerConfig
    from olmo_core.optim import CosWithWarmup, OptimGroupOverride, SkipStepAdamWConfig
    from olmo_core.train.train_module import TransformerTrainModuleConfig

    undecayed = OptimGroupOverride(params=["embeddings.weight"], opts={"weight_decay": 0.0})
    return {
        "model": TransformerConfig.llama_like(
            vocab_size=256,
            d_model=128,
            n_layers=4,
            n_heads=4,
            qk_norm=True,
            rope_theta=500_000,
            layer_norm_eps=1e-6,
            block_name="reordered_norm",
        ),
        "train_module": TransformerTrainModuleConfig(
            rank_microbatch_size=BATCH * LENGTH,
            max_sequence_length=LENGTH,
            optim=SkipStepAdamWConfig(
                lr=2e-3, weight_decay=0.1, betas=(0.9, 0.95), group_overrides=[undecayed]
            ),
            max_grad_norm=1.0,
            z_loss_multiplier=1e-5,
            compile_model=False,
            scheduler=CosWithWarmup(warmup=10),
        ),
        "dataset": NumpyFSLDatasetConfig(
            tokenizer=TokenizerConfig(vocab_size=256, eos_token_id=0, pad_token_id=0),
            paths=sorted(str(file) for file in tokens.glob("*.npy")),
            sequence_length=LENGTH,
            work_dir=str(tokens / "work"),
        ),
        "data_loader": NumpyDataLoaderConfig(
            global_batch_size=BATCH * LENGTH, seed=34521, num_workers=0
        ),
    }


def main(tokens: Path, save: Path, stop: int, load: Path | None) -> None:
    for name, value in {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
        "NUM_NODES": "1",
        "FS_LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29541",
    }.items():
        os.environ.setdefault(name, value)
    import torch
    from olmo_core.train import (
        Duration,
        LoadStrategy,
        TrainerConfig,
        prepare_training_environment,
        teardown_training_environment,
    )
    from olmo_core.train.callbacks import Callback, CheckpointerCallback, ConfigSaverCallback

    prepare_training_environment(seed=0, backend="gloo")
    sections = config(tokens)
    module = sections["train_module"].build(
        sections["model"].build(init_device="cpu"), device=torch.device("cpu")
    )
    loader = sections["data_loader"].build(
        sections["dataset"].build(), dp_process_group=module.dp_process_group
    )
    sections["trainer"] = TrainerConfig(
        save_folder=str(save),
        work_dir=str(tokens / "work"),
        save_overwrite=True,
        load_path=str(load) if load else None,
        load_strategy=LoadStrategy.always if load else LoadStrategy.never,
        max_duration=Duration.steps(STEPS),
        hard_stop=Duration.steps(stop),
        metrics_collect_interval=1,
        device="cpu",
        callbacks={
            "checkpointer": CheckpointerCallback(save_interval=25, save_async=False),
            "config_saver": ConfigSaverCallback(),
        },
    )
    trainer = sections["trainer"].build(module, loader)
    trainer.callbacks["config_saver"].config = {
        name: section.as_config_dict() for name, section in sections.items()
    }
    losses: dict[int, float] = {}

    class Record(Callback):
        def log_metrics(self, step: int, metrics: dict[str, float]) -> None:
            if "train/CE loss" in metrics:
                losses[step] = float(metrics["train/CE loss"])

    trainer.add_callback("record", Record())
    trainer.fit()
    (save / "losses.json").write_text(json.dumps(losses))
    teardown_training_environment()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tokens", type=Path)
    parser.add_argument("save", type=Path)
    parser.add_argument("--stop", type=int, required=True)
    parser.add_argument("--load", type=Path)
    main(**vars(parser.parse_args()))
