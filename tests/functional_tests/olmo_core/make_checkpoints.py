"""Make the checkpoints in checkpoints.tar.xz with OLMo-core's own trainer, on a CPU.

    python make_checkpoints.py FOLDER                          all of them, then the archive
    [torchrun --nproc-per-node N] make_checkpoints.py FOLDER KIND

Needs ``ai2-olmo-core==3.0.0``, ``transformers`` and ``accelerate``. Each KIND is a run of 6 steps
on the same tokens: FOLDER/KIND has the checkpoint of step 3, ``run.json`` with the batch and the
loss of each step, and ``last.safetensors`` with the weights after step 6. OLMo-core's mixtures move
tokens to experts by kernels that need a GPU; here two lines of PyTorch take their place. The kind
``flex-olmo`` has the experts of OLMo-core's mixture that drops tokens, which can't be run so: it
takes 3 steps with random gradients, and ``hf.safetensors`` has its weights as OLMo-core's own
converter writes them.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

KINDS = {
    "olmo2": {},
    "olmo2-by-2-ranks": {},
    "olmo2-by-4-ranks": {},
    "olmo2-first-step": {"step_increment_bugfix": False},
    "olmo2-compiled": {"compile": True},
    "olmo3-adamw": {"adamw": True},
    "olmoe": {},
    "flex-olmo-dropless": {},
}
LENGTH, BATCH, SAVED, LAST = 16, 4, 3, 6


def main(folder: Path, kind: str) -> None:
    for name, value in {
        "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1",
        "NUM_NODES": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29577",
    }.items():  # fmt: skip
        os.environ.setdefault(name, value)
    os.environ.setdefault("FS_LOCAL_RANK", os.environ["RANK"])
    import torch
    import torch.distributed as dist
    from olmo_core.data import NumpyDataLoaderConfig, NumpyFSLDatasetConfig, TokenizerConfig
    from olmo_core.distributed.parallel import DataParallelType
    from olmo_core.nn.attention import SlidingWindowAttentionConfig
    from olmo_core.nn.rope import YaRNRoPEScalingConfig
    from olmo_core.nn.transformer import TransformerConfig
    from olmo_core.optim import (
        AdamWConfig,
        CosWithWarmup,
        OptimGroupOverride,
        SkipStepAdamWConfig,
    )
    from olmo_core.train import (
        Duration,
        TrainerConfig,
        prepare_training_environment,
        teardown_training_environment,
    )
    from olmo_core.train.callbacks import Callback, CheckpointerCallback, ConfigSaverCallback
    from olmo_core.train.train_module import (
        TransformerDataParallelConfig,
        TransformerTrainModuleConfig,
    )
    from safetensors.torch import save_file

    torch.set_num_threads(1)
    prepare_training_environment(seed=0, backend="gloo")
    many = dist.get_world_size() > 1
    run, work = folder / kind, folder / "work"
    tokenizer = TokenizerConfig(vocab_size=60, eos_token_id=0, pad_token_id=1)
    windows, mixture = kind.startswith("olmo3"), kind in ("olmoe", "flex-olmo-dropless")
    sizes: dict[str, Any] = {"hidden_size_multiple_of": 8, "block_name": "reordered_norm"}
    make = TransformerConfig.llama_like
    if mixture:
        run_mixtures_without_a_gpu()
        make = TransformerConfig.llama_like_moe
        sizes = {
            "num_experts": 4, "top_k": 2, "expert_hidden_size": 8, "dropless": True,
            "reordered_norm": kind != "olmoe",
        }  # fmt: skip
    model_config = make(
        vocab_size=64, d_model=16, n_layers=4 if windows else 2, n_heads=4, n_kv_heads=2,
        qk_norm=True, rope_theta=500000, layer_norm_eps=1e-6, **sizes,
        sliding_window=SlidingWindowAttentionConfig(
            pattern=[4, 4, 4, -1], force_full_attention_on_first_layer=False
        ) if windows else None,
    )  # fmt: skip
    if windows:
        yarn = YaRNRoPEScalingConfig(factor=8.0, beta_fast=32, beta_slow=1, old_context_len=8)
        model_config = model_config.with_rope_scaling(yarn)
    options: dict[str, Any] = dict(KINDS[kind])
    optimizer = AdamWConfig if options.pop("adamw", False) else SkipStepAdamWConfig
    module_config = TransformerTrainModuleConfig(
        rank_microbatch_size=(1 if dist.get_world_size() == 4 else 2) * LENGTH,
        max_sequence_length=LENGTH,
        optim=optimizer(
            lr=3e-3,
            weight_decay=0.1,
            betas=(0.9, 0.95),
            group_overrides=[
                OptimGroupOverride(params=["embeddings.weight"], opts={"weight_decay": 0.0})
            ],
            **options,
        ),
        max_grad_norm=1.0,
        z_loss_multiplier=1e-4,
        compile_model=False,
        scheduler=CosWithWarmup(warmup=2),
        dp_config=TransformerDataParallelConfig(name=DataParallelType.fsdp) if many else None,
    )
    data_config = NumpyFSLDatasetConfig(
        tokenizer=tokenizer,
        paths=[str(folder / f"part-{i}.npy") for i in range(2)],
        sequence_length=LENGTH,
        work_dir=str(work),
    )
    loader_config = NumpyDataLoaderConfig(
        global_batch_size=BATCH * LENGTH, seed=34521, num_workers=0
    )
    trainer_config = TrainerConfig(
        save_folder=str(run), work_dir=str(work), save_overwrite=True,
        max_duration=Duration.steps(LAST), metrics_collect_interval=1, device="cpu",
        callbacks={
            "checkpointer": CheckpointerCallback(save_interval=SAVED, save_async=False),
            "config_saver": ConfigSaverCallback(),
        },
    )  # fmt: skip
    model = model_config.build(init_device="meta" if many else "cpu")
    module = module_config.build(model, device=torch.device("cpu"))
    loader = loader_config.build(data_config.build(), dp_process_group=module.dp_process_group)
    trainer = trainer_config.build(module, loader)
    sections = {
        "model": model_config, "train_module": module_config, "dataset": data_config,
        "data_loader": loader_config, "trainer": trainer_config,
    }  # fmt: skip
    trainer.callbacks["config_saver"].config = {
        name: section.as_config_dict() for name, section in sections.items()
    }
    steps: dict[int, dict[str, Any]] = {}

    class Record(Callback):
        def pre_step(self, batch: dict[str, Any]) -> None:
            steps.setdefault(self.step, {})["tokens"] = batch["input_ids"].tolist()

        def log_metrics(self, step: int, metrics: dict[str, float]) -> None:
            for name in ("train/CE loss", "optim/total grad norm"):
                if name in metrics and step > 0:
                    steps.setdefault(step, {})[name] = float(metrics[name])

    trainer.add_callback("record", Record())
    trainer.fit()
    if dist.get_rank() == 0:
        (run / "run.json").write_text(json.dumps(steps))
        if not many:
            weights = {n: p.detach().clone() for n, p in module.model.named_parameters()}
            save_file(weights, run / "last.safetensors")
    dist.barrier()
    teardown_training_environment()


def run_mixtures_without_a_gpu() -> None:
    """Replace the kernels that sort tokens by expert."""
    from olmo_core.nn.moe.parallel_mlp import ParallelDroplessMLP

    def permute_and_compute(
        self: Any, x: Any, *, batch_size_per_expert: Any, indices: Any, expert_weights: Any,
        top_k: int, **_: Any,
    ) -> Any:  # fmt: skip
        """``x`` [tokens, hidden]; ``indices`` [tokens * top_k], tokens and their choices by expert,
        ``expert_weights`` in the order of the tokens."""
        outputs = self.mlp(x[indices // top_k], batch_size_per_expert)
        weighted = outputs * expert_weights[indices][:, None]
        return weighted.new_zeros(x.shape).index_add(0, indices // top_k, weighted)

    ParallelDroplessMLP.permute_and_compute = permute_and_compute


def make_mixture(run: Path) -> None:
    """Write a step of a mixture that drops tokens."""
    import torch
    from olmo_core.distributed.checkpoint import save_state_dict
    from olmo_core.nn.hf.config import get_hf_config
    from olmo_core.nn.hf.convert import convert_state_to_hf
    from olmo_core.nn.transformer import TransformerConfig
    from olmo_core.optim import OptimGroupOverride, SkipStepAdamWConfig
    from olmo_core.train.train_module import TransformerTrainModuleConfig
    from safetensors.torch import save_file

    torch.manual_seed(0)
    model_config = TransformerConfig.llama_like_moe(
        vocab_size=64, d_model=16, n_layers=2, n_heads=4, n_kv_heads=2, num_experts=4, top_k=2,
        expert_hidden_size=8, reordered_norm=True, rope_theta=500000, layer_norm_eps=1e-6,
    )  # fmt: skip
    module_config = TransformerTrainModuleConfig(
        rank_microbatch_size=LENGTH,
        max_sequence_length=LENGTH,
        optim=SkipStepAdamWConfig(
            lr=3e-3,
            group_overrides=[
                OptimGroupOverride(params=["embeddings.weight"], opts={"weight_decay": 0.0})
            ],
        ),
    )
    module = module_config.build(model_config.build(init_device="cpu"), torch.device("cpu"))
    module.optim.latest_loss, module.optim.latest_grad_norm = torch.tensor(3.0), torch.tensor(1.0)
    for group in module.optim.param_groups:
        group["initial_lr"] = group["lr"]
    for _ in range(SAVED):
        for parameter in module.model.parameters():
            parameter.grad = torch.randn_like(parameter)
        module.optim.step()
    step = run / f"step{SAVED}"
    (step / "train").mkdir(parents=True)
    save_state_dict(step / "model_and_optim", module.state_dict_to_save())
    torch.save(
        {"global_step": SAVED, "global_train_tokens_seen": 0, "max_steps": LAST, "epoch": 1,
         "data_loader": {}},
        step / "train/rank0.pt",
    )  # fmt: skip
    config = {"model": model_config, "train_module": module_config}
    values = {name: section.as_config_dict() for name, section in config.items()}
    values["dataset"] = {"tokenizer": {"vocab_size": 60, "eos_token_id": 0, "pad_token_id": 1}}
    (step / "config.json").write_text(json.dumps(values))
    state = convert_state_to_hf(get_hf_config(module.model), module.model.state_dict())
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, run / "hf.safetensors")


def make_all(folder: Path) -> None:
    import numpy as np

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    random = np.random.default_rng(7)
    for i, count in enumerate((330, 205)):  # 20 and 12 sequences: an epoch has 8 batches
        random.integers(2, 60, count).astype(np.uint8).tofile(folder / f"part-{i}.npy")
    make_mixture(folder / "flex-olmo")
    for kind in KINDS:
        launch = [sys.executable]
        if match := re.search(r"by-(\d)-ranks", kind):
            launch += ["-m", "torch.distributed.run", "--nproc-per-node", match[1]]
        subprocess.run([*launch, __file__, str(folder), kind], check=True)
        for other in (folder / kind).glob("step*"):
            if other.name != f"step{SAVED}":
                shutil.rmtree(other)
    shutil.rmtree(folder / "work")
    with tarfile.open(Path(__file__).with_name("checkpoints.tar.xz"), "w:xz") as archive:
        archive.add(folder, ".")


if __name__ == "__main__":
    if len(sys.argv) == 2:
        make_all(Path(sys.argv[1]))
    else:
        main(Path(sys.argv[1]), sys.argv[2])
