"""Config of a training run, as plain dataclasses, and the valid values of its fields.

A recipe is a function that returns a :class:`TrainingConfig`; the command line overrides its fields
as ``section.field=value``. Nothing here needs torch or megatron-core.

:func:`check_values` checks each value by itself. What depends on several values, on the model,
the data or the processes is checked where these are known: ``resolve.resolve``,
``optimizer.check_schedule``, ``token_data.check_data``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_olmo_bridge.checkpoints.optimizer_values import DECAYED
from megatron_olmo_bridge.errors import InputError
from megatron_olmo_bridge.formats.dtypes import canonical_dtype

FIRST_STEP = "first_step"
"""Value of ``optimizer.bias_correction``: always the correction of the first step."""


@dataclass
class StepsConfig:
    """Number, size and precision of the optimizer steps."""

    steps: int = 0
    """Number of optimizer steps; tokens = steps x global_batch_size x sequence_length."""
    global_batch_size: int = 8
    """Sequences per optimizer step, over all processes."""
    micro_batch_size: int = 1
    """Sequences that a process runs at once; gradients of its micro-batches are accumulated."""
    sequence_length: int = 4096
    """Tokens per sequence."""
    precision: str = "bfloat16"
    """Dtype of parameters and activations: ``float32``, or ``bfloat16`` with float32 weights in the
    optimizer; also ``fp32``, ``bf16`` or a torch dtype."""
    seed: int = 1234
    """Seed of initial weights, of the data's order and of dropout."""

    def __post_init__(self) -> None:
        self.precision = canonical_dtype(self.precision)


@dataclass
class DataConfig:
    """Training data: the output of ``prepare-data``, or OLMo's raw token files."""

    path: list[str] = field(default_factory=list)
    """Prefixes of .bin and .idx files. Several are blended."""
    mix: str | None = None
    """A list of OLMo's raw token files (.npy), instead of ``path``: they are read in the order of
    OLMo-core's data loader, and each sequence of T tokens has T - 1 targets."""
    root: str | None = None
    """Folder that the paths in ``mix`` are relative to; by default the folder of the list."""
    seed: int | None = None
    """Seed of the order of ``mix``; by default train.seed. For the order of OLMo's first trainer,
    which counts epochs from 0, it is that trainer's seed minus 1."""
    vocab_size: int | None = None
    """Size of the vocabulary that the files of ``mix`` were written with, which decides the bytes
    of a token; by default the model's."""
    fingerprint: str | None = None
    """OLMo-core's fingerprint of the data set, which ``mix`` must have."""
    skip_repetitive: bool = False
    """Don't learn from sequences of ``mix`` in which up to 13 tokens repeat 32 times or more."""
    weights: list[float] | None = None
    """Fraction of the samples from each path; by default proportional to its size."""
    validation: list[str] = field(default_factory=list)
    """Prefixes of held-out data; without any, nothing is evaluated."""
    cache: str | None = None
    """Folder for the index of samples; by default the folder of the data."""
    tokenizer: str | None = None
    """Tokenizer folder or hub id; by default the one that the data was prepared with."""
    workers: int = 0
    """Processes that read ahead; 0 reads in the training process."""


@dataclass
class OptimizerConfig:
    """AdamW, gradient clipping and z-loss."""

    lr: float = 3e-4
    """Peak learning rate."""
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    decayed: str = "all_but_embeddings"
    """Which parameters decay: ``all_but_embeddings`` (OLMo-2 and Olmo-3), ``all`` (OLMoE, OLMo 7B
    0424 and 0724), or ``matrices`` (GPT-2: embeddings, but neither norms nor biases)."""
    bias_correction: str = "each_step"
    """``each_step``, as AdamW is defined; or ``first_step``: always that of the first step, as in
    OLMo-core's SkipStepAdamW before version 2.2.0, where the step count did not advance. Updates
    are then sqrt(1 - beta2) / (1 - beta1) times larger (2.236 for 0.9 and 0.95) once the others'
    correction has faded."""
    clip_grad: float = 1.0
    """Maximum norm of the gradient, over all parameters; 0 disables clipping."""
    z_loss: float = 0.0
    """Weight of the mean square of log-sum-exp of the logits, in the loss that is trained on."""


@dataclass
class ScheduleConfig:
    """Learning rate schedule: linear warmup, then ``decay``."""

    warmup_steps: int = 0
    decay: str = "cosine"
    """``cosine``, ``linear``, ``wsd`` (warmup-stable-decay: constant, then linear to the minimum)
    or ``constant``."""
    min_lr_ratio: float = 0.1
    """Minimum learning rate, as a fraction of the peak."""
    end_step: int | None = None
    """Step at which the minimum is reached; by default the last step of the run. It may be later:
    OLMo-2's cosine was cut off before its end."""
    wsd_decay_steps: int = 0
    """Number of decay steps of ``wsd``."""


@dataclass
class StabilityConfig:
    """Handling of loss spikes. A loss that is not a number always stops the run."""

    on_spike: str = "stop"
    """``stop``; ``skip`` (the step is not taken: OLMo-core's SkipStepAdamW); or ``ignore``."""
    sigma: float = 10.0
    """A spike is a loss, or with ``skip`` a gradient norm too, this many standard deviations above
    the mean of the last ``window`` steps."""
    window: int = 128
    """Number of preceding steps. Detection starts in the middle of the first window (step 64 of
    128)."""


@dataclass
class ParallelConfig:
    """Parallel sizes; the remaining factor of the world size is data parallelism."""

    tp: int = 1
    """Tensor parallel size: processes that share each layer."""
    pp: int = 1
    """Pipeline parallel size: stages of layers."""
    vpp: int | None = None
    """Chunks of layers on each stage, interleaved."""
    ep: int = 1
    """Expert parallel size."""
    sp: bool = False
    """Sequence parallelism: also split by tokens what tensor parallelism leaves whole."""
    distributed_optimizer: bool = True
    """Each data-parallel rank keeps a part of the optimizer's state (ZeRO-1)."""
    timeout_minutes: int = 60
    """Timeout of collective operations, for example while the first process writes files."""
    overlap: bool = False
    """Reduce gradients and gather parameters while computing; for GPUs."""
    recompute: str = "none"
    """Activations that are recomputed in the backward pass: ``none``, ``selective``
    (attention) or ``full`` (each layer)."""


@dataclass
class CheckpointConfig:
    """The run's folder, and how often it is saved."""

    save: str | None = None
    """The run's folder: checkpoints, log, report. A run that is started again on it resumes.
    Without a folder, nothing is saved."""
    interval: int = 1000
    """Steps between checkpoints; the last step is always saved."""
    keep_last: int | None = None
    """Number of checkpoints to keep; by default all."""
    asynchronous: bool = False
    """Write checkpoints in the background."""
    fully_reshardable: str = "last"
    """Which checkpoints can be resumed at another tensor, pipeline or expert parallel size:
    ``last`` (that of the last step), ``all`` or ``none``. The others can be resumed at another
    data-parallel size. With the distributed optimizer it takes memory to save such a checkpoint:
    the state of all data-parallel ranks is gathered on the CPU of the first one."""


@dataclass
class InitConfig:
    """Initial weights; random by default."""

    hf: str | None = None
    """A Hugging Face folder or hub id, which also defines the model. It is loaded directly."""
    revision: str | None = None
    """Revision on the hub."""
    checkpoint: str | None = None
    """A Megatron checkpoint, of any run at any layout; or a training checkpoint of OLMo-core. With
    its optimizer state, settings that have their default are those of its run."""
    optimizer: bool = False
    """Take the optimizer's moments from ``init.checkpoint`` too, as OLMo's stage 2 does."""
    step: int | None = None
    """Steps that ``init.checkpoint`` was trained for, to continue its run: the schedule and the
    data go on after them. By default that of an OLMo-core checkpoint whose optimizer state is
    taken, else 0."""


@dataclass
class ExportConfig:
    """Checkpoints in other formats, written while training."""

    hf: str | None = None
    """Folder for Hugging Face checkpoints; each goes into ``step_N``, with a model card."""
    olmo_core: str | None = None
    """Folder for training checkpoints of OLMo-core with optimizer state; each goes into ``stepN``.
    It is made from a checkpoint of the run, which is saved for any layout."""
    interval: int | None = None
    """Steps between exports; by default only the last step is exported."""


@dataclass
class EvaluationConfig:
    """The loss on ``data.validation``."""

    interval: int = 1000
    """Steps between evaluations, which also run before the first step and after the last."""
    batches: int = 10
    """Global batches per evaluation; always the same ones."""


@dataclass
class LoggingConfig:
    """Console lines and trackers. A run's folder also gets ``log.jsonl`` and ``report.html``."""

    interval: int = 10
    """Steps between console lines."""
    tensorboard: bool = False
    """Also write ``tensorboard/`` into the run's folder."""
    wandb_project: str | None = None
    """Also log to this project of Weights & Biases."""


@dataclass
class ClassificationConfig:
    """Fine-tuning of a classifier: the data are texts with labels, not tokens."""

    train: str = ""
    """A .jsonl or .csv file."""
    validation: str = ""
    """Held-out .jsonl or .csv file, used for early stopping."""
    text: str = "text"
    """Name of the field or column with the text."""
    label: str = "label"
    """Name of the field or column with the label: a class, a list of classes, or a number or a list
    of numbers, as ``problem_type`` says. Lists in a .csv file are separated by ``;``."""
    problem_type: str = "single_label_classification"
    """``single_label_classification``, ``multi_label_classification`` or ``regression``."""
    class_weights: str = "none"
    """``none``, or ``balanced``: inversely proportional to the frequency of the class."""
    patience: int | None = None
    """Stop after N evaluations without a better macro-F1 (or R2); keep the best weights."""


@dataclass
class TrainingConfig:
    """Config of a run."""

    name: str = "run"
    model: dict[str, Any] = field(default_factory=dict)
    """The model, as in config.json; empty if ``init`` names a checkpoint, which defines it."""
    provider: dict[str, Any] = field(default_factory=dict)
    """Additional fields of the provider, which is megatron-core's ``TransformerConfig`` too."""
    train: StepsConfig = field(default_factory=StepsConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    stability: StabilityConfig = field(default_factory=StabilityConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    init: InitConfig = field(default_factory=InitConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    classification: ClassificationConfig | None = None
    sources: dict[str, str] = field(default_factory=dict)
    """Sources of published values: ``section.field`` (or ``section``) to a citation."""

    @property
    def tokens_per_step(self) -> int:
        return self.train.global_batch_size * self.train.sequence_length

    @property
    def folder(self) -> Path | None:
        """The run's folder, if it has one."""
        return self.output_folders.get("checkpoint.save")

    @property
    def output_folders(self) -> dict[str, Path]:
        """Folders that the run writes into, by the field that names them."""
        named = {
            "checkpoint.save": self.checkpoint.save,
            "export.hf": self.export.hf,
            "export.olmo_core": self.export.olmo_core,
        }
        return {
            name: Path(value).expanduser() for name, value in named.items() if value is not None
        }


CHOICES = {
    "train.precision": ("float32", "bfloat16"),
    "optimizer.bias_correction": ("each_step", FIRST_STEP),
    "optimizer.decayed": DECAYED,
    "schedule.decay": ("cosine", "linear", "wsd", "constant"),
    "stability.on_spike": ("stop", "skip", "ignore"),
    "parallel.recompute": ("none", "selective", "full"),
    "checkpoint.fully_reshardable": ("last", "all", "none"),
}
"""Valid values of fields with a fixed set of choices."""
RANGES: dict[str, tuple[Callable[[float], bool], tuple[str, ...]]] = {
    "at least 1": (lambda value: value >= 1, (
        "train.steps", "train.global_batch_size", "train.micro_batch_size",
        "train.sequence_length", "parallel.tp", "parallel.pp", "parallel.vpp", "parallel.ep",
        "parallel.timeout_minutes",
        "schedule.end_step", "checkpoint.interval", "checkpoint.keep_last", "evaluation.interval",
        "evaluation.batches", "logging.interval", "export.interval", "classification.patience",
        "provider.make_vocab_size_divisible_by", "data.vocab_size",
    )),
    "at least 2": (lambda value: value >= 2, ("stability.window",)),
    "at least 0": (lambda value: 0 <= value < math.inf, (
        "optimizer.lr", "optimizer.weight_decay", "optimizer.clip_grad", "optimizer.z_loss",
        "schedule.warmup_steps", "schedule.wsd_decay_steps", "data.workers", "init.step",
        "provider.init_method_std",
    )),
    "more than 0": (lambda value: value > 0, (
        "optimizer.eps", "stability.sigma", "provider.init_truncation",
    )),
    "at least 0 and less than 1": (lambda value: 0 <= value < 1, (
        "optimizer.beta1", "optimizer.beta2", "provider.hidden_dropout",
        "provider.attention_dropout",
    )),
    "from 0 to 1": (lambda value: 0 <= value <= 1, ("schedule.min_lr_ratio",)),
    "from 0 to 4294967295": (lambda value: 0 <= value < 2**32, ("train.seed", "data.seed")),
}  # fmt: skip
"""Condition in words, its test, and the fields that must satisfy it if they are set."""


def check_values(config: TrainingConfig) -> None:
    """Check each value.

    Raises:
        InputError: a number is out of its range, a choice is unknown, or a field is set without
            the field that it depends on.
    """
    for key, choices in CHOICES.items():
        if (value := _value(config, key)) not in choices:
            raise InputError(f"{key}={value!r} is none of {', '.join(choices)}")
    for what, (holds, keys) in RANGES.items():
        for key in keys:
            value = _value(config, key)
            if value is not None and not (isinstance(value, int | float) and holds(value)):
                raise InputError(f"{key}={value} must be {what}")
    init = config.init
    if init.hf and init.checkpoint:
        raise InputError("give either init.hf or init.checkpoint")
    if init.optimizer and not init.checkpoint:
        raise InputError("init.optimizer=true takes the optimizer from init.checkpoint: name it")
    if config.export.olmo_core and not config.checkpoint.save:
        raise InputError(
            "export.olmo_core is made from the run's own checkpoints: set checkpoint.save too"
        )
    if init.revision and not init.hf:
        raise InputError(f"init.revision={init.revision} needs init.hf: the hub id that it is of")


def _value(config: TrainingConfig, key: str) -> Any:
    """Return the value of ``section.field``; None where there is no such section or field."""
    section, _, name = key.partition(".")
    values = getattr(config, section)
    return values.get(name) if isinstance(values, dict) else getattr(values, name, None)
