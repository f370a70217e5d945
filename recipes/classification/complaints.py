"""Which of 113 issues is a consumer's complaint about? OLMo-2 1B as a classifier of texts.

    olmo-bridge train complaints checkpoint.save=RUN \
        classification.train=train.jsonl classification.validation=validation.jsonl

``tiny()`` is for a laptop: the models and texts of examples/classification/make_synthetic.py.
"""

from megatron_olmo_bridge.training.config import (
    CheckpointConfig,
    ClassificationConfig,
    EvaluationConfig,
    InitConfig,
    LoggingConfig,
    OptimizerConfig,
    ScheduleConfig,
    StabilityConfig,
    StepsConfig,
    TrainingConfig,
)

_SFT = (
    "allenai/open-instruct docs/olmo2.md: supervised fine-tuning of OLMo-2 1B (learning rate 3e-5, "
    "linear to 0 after 3 % of warm-up, no weight decay, 128 sequences a step)"
)


def config() -> TrainingConfig:
    """About two epochs of 200,000 complaints; on one GPU of 80 GB as it stands."""
    return TrainingConfig(
        name="complaints",
        init=InitConfig(hf="allenai/OLMo-2-0425-1B"),
        train=StepsConfig(
            steps=3000, global_batch_size=128, micro_batch_size=16, sequence_length=512
        ),
        optimizer=OptimizerConfig(lr=3e-5, beta2=0.999, weight_decay=0.0),
        schedule=ScheduleConfig(warmup_steps=90, decay="linear", min_lr_ratio=0.0),
        stability=StabilityConfig(on_spike="ignore"),
        evaluation=EvaluationConfig(interval=250),
        checkpoint=CheckpointConfig(interval=250, keep_last=2),
        classification=ClassificationConfig(class_weights="balanced", patience=4),
        sources={
            "optimizer.lr": _SFT,
            "optimizer.weight_decay": _SFT,
            "optimizer.beta2": "PyTorch's default, which that run had",
            "schedule": _SFT,
            "train.global_batch_size": _SFT,
            "train.sequence_length": "ours: complaints are letters, most of them shorter",
            "train.steps": "ours: two epochs of 200,000 texts, less by early stopping",
            "stability": "ours: the loss of few classes is noisy, and begins at its highest",
        },
    )  # fmt: skip


def tiny() -> TrainingConfig:
    """Tiny models, ten classes, some minutes on a laptop; ``init.hf`` and the files are to be
    named."""
    return TrainingConfig(
        name="tiny-classifier",
        train=StepsConfig(
            steps=200, global_batch_size=32, micro_batch_size=32, sequence_length=64,
            precision="float32",
        ),
        optimizer=OptimizerConfig(lr=3e-3, weight_decay=0.0),
        schedule=ScheduleConfig(warmup_steps=20, decay="linear", min_lr_ratio=0.0),
        stability=StabilityConfig(on_spike="ignore"),
        evaluation=EvaluationConfig(interval=50),
        checkpoint=CheckpointConfig(interval=50, keep_last=2),
        logging=LoggingConfig(interval=20),
        classification=ClassificationConfig(class_weights="balanced", patience=4),
        sources={"train": "ours", "optimizer": "ours", "schedule": "ours"},
    )  # fmt: skip
