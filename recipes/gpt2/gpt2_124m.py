"""GPT-2 124M on OpenWebText: 295B tokens, to the loss of the published model.

OpenAI has not published how GPT-2 was trained. The values are those of nanoGPT's reproduction,
whose learning rate and batch follow GPT-3's smallest model (arXiv 2005.14165, Table 2.1). nanoGPT
leaves out the biases; here they are, as in the published model.

8 GPUs of any size above 16 GB; with another number, ``train.micro_batch_size`` times the GPUs must
divide 480.
"""

from __future__ import annotations

from megatron_olmo_bridge.models.families import published_sizes
from megatron_olmo_bridge.training.config import (
    EvaluationConfig,
    OptimizerConfig,
    ParallelConfig,
    ScheduleConfig,
    StepsConfig,
    TrainingConfig,
)

RECIPE, DEFAULTS = "karpathy/nanoGPT config/train_gpt2.py", "karpathy/nanoGPT train.py"
MODEL = "karpathy/nanoGPT model.py"


def config() -> TrainingConfig:
    return TrainingConfig(
        name="gpt2-124m",
        model=dict(published_sizes()["gpt2-124m"].sizes["gpt2-124m"]),
        provider={"init_method_std": 0.02, "make_vocab_size_divisible_by": 64},
        train=StepsConfig(
            steps=600_000, global_batch_size=480, micro_batch_size=12, sequence_length=1024,
            precision="bfloat16", seed=1337,
        ),
        optimizer=OptimizerConfig(
            lr=6e-4, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, decayed="matrices",
            clip_grad=1.0, z_loss=0.0,
        ),
        schedule=ScheduleConfig(
            warmup_steps=2000, decay="cosine", min_lr_ratio=0.1, end_step=600_000
        ),
        parallel=ParallelConfig(overlap=True),
        evaluation=EvaluationConfig(interval=1000, batches=10),
        sources={
            "model": "openai-community/gpt2: config.json",
            "provider.init_method_std": f"{MODEL}: _init_weights",
            "provider.make_vocab_size_divisible_by": f"{MODEL}: GPTConfig.vocab_size",
            "train.steps": f"{RECIPE}: max_iters",
            "train.global_batch_size": f"{RECIPE}: batch_size, gradient_accumulation_steps",
            "train.micro_batch_size": f"{RECIPE}: batch_size",
            "train.sequence_length": f"{RECIPE}: block_size",
            "train.precision": f"{DEFAULTS}: dtype",
            "train.seed": f"{DEFAULTS}: torch.manual_seed",
            "optimizer.lr": f"{DEFAULTS}: learning_rate",
            "optimizer.beta1": f"{DEFAULTS}: beta1",
            "optimizer.beta2": f"{DEFAULTS}: beta2",
            "optimizer.eps": "torch.optim.AdamW: eps, by default",
            "optimizer.weight_decay": f"{RECIPE}: weight_decay",
            "optimizer.decayed": f"{MODEL}: configure_optimizers",
            "optimizer.clip_grad": f"{DEFAULTS}: grad_clip",
            "optimizer.z_loss": f"{DEFAULTS}: there is none",
            "schedule.warmup_steps": f"{DEFAULTS}: warmup_iters",
            "schedule.decay": f"{DEFAULTS}: get_lr",
            "schedule.min_lr_ratio": f"{DEFAULTS}: min_lr",
            "schedule.end_step": f"{RECIPE}: lr_decay_iters",
            "parallel": "ours",
            "evaluation.interval": f"{RECIPE}: eval_interval",
            "evaluation.batches": "ours",
        },
    )  # fmt: skip
