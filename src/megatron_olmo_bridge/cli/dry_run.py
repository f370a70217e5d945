"""Output of ``train --dry-run``: settings with their sources, and the resources needed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import MISSING, asdict, fields, is_dataclass
from typing import Any

from megatron_olmo_bridge.models.bridge import ModelBridge
from megatron_olmo_bridge.models.families import published_sizes
from megatron_olmo_bridge.training.config import TrainingConfig
from megatron_olmo_bridge.training.estimate import LEFT_OUT, UTILISATION, Estimate
from megatron_olmo_bridge.training.folder import what_is_lost
from megatron_olmo_bridge.training.monitor.human import SI, duration, short
from megatron_olmo_bridge.training.resolve import ResolvedRun

from .console import human_bytes, say, table

Setting = tuple[str, Any]
OURS = "ours"
"""Prefix of a source that is not a citation but our own choice, with its reason."""


def print_dry_run(resolved: ResolvedRun, estimate: Estimate) -> None:
    """Print a run's settings, parameters, tokens, FLOPs and memory."""
    config = resolved.config
    _print_settings(config, resolved.bridge)
    _print_totals(estimate, config.train.micro_batch_size)
    _print_memory(estimate)
    _print_saves(config, estimate)


def dry_run_result(config: TrainingConfig, estimate: Estimate) -> dict[str, Any]:
    """Return all settings and the whole estimate, for ``--json``."""
    worst = estimate.worst.stage
    return {
        "config": asdict(config),
        "estimate": asdict(estimate) | {"worst": worst},
        "not_saved": what_is_lost(config),
    }


def _print_settings(config: TrainingConfig, bridge: ModelBridge) -> None:
    documents: list[str] = []
    rows = []
    for key, value in shown_settings(config, bridge):
        source = config.sources.get(key) or config.sources.get(key.partition(".")[0], "")
        rows.append([key, _text(value), _short_citation(source, documents)])
    say(f"{config.name}: {_model(bridge)}\n")
    table(["setting", "value", "source"], rows)
    for number, document in enumerate(documents, 1):
        say(f"[{number}] {document}")
    say("Settings not listed have their defaults; --json lists all.\n")


def shown_settings(config: TrainingConfig, bridge: ModelBridge) -> Iterator[Setting]:
    """Yield the settings that differ from their default or have a source of their own."""
    yield "model", model_name(bridge)
    for section in fields(config):
        values = getattr(config, section.name)
        if section.name == "provider":
            yield from ((f"provider.{name}", value) for name, value in values.items())
        elif is_dataclass(values):
            for f in fields(values):
                key, value = f"{section.name}.{f.name}", getattr(values, f.name)
                usual = f.default_factory() if f.default_factory is not MISSING else f.default
                if value != usual or key in config.sources:
                    yield key, value


def model_name(bridge: ModelBridge) -> str:
    """Return the name of the model's published size, or of its family."""
    known = published_sizes()
    named = [name for name in known if known[name].sizes[name] == bridge.hf_config]
    return named[0] if named else bridge.family


def _model(bridge: ModelBridge) -> str:
    numbers = bridge.config
    return (
        f"{numbers.num_layers} layers, {numbers.hidden_size} wide, "
        f"{numbers.num_attention_heads} heads, vocabulary of {numbers.vocab_size}"
    )


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list):
        return f"[{', '.join(map(str, value))}]"
    return str(value)


def _short_citation(source: str, documents: list[str]) -> str:
    """Shorten a citation to the document's number and the place in it: ``[1] optimizer.lr``."""
    document, colon, place = source.partition(": ")
    if not colon:
        return source
    if document == OURS:
        document, place = source, ""
    if document not in documents:
        documents.append(document)
    return f"[{documents.index(document) + 1}] {place}".strip()


def _flop(count: float) -> str:
    text = short(count, SI)
    digits = text.rstrip("".join(SI))
    return f"{digits} {text[len(digits) :]}FLOP" if count < 1e21 else f"{count:.3g} FLOP"


def _print_totals(estimate: Estimate, micro: int) -> None:
    e = estimate
    days = f"{e.gpu_days:,.0f} days" if e.gpu_days >= 10 else duration(e.gpu_days * 86400)
    active = f"; {short(e.active_parameters)} active per token"
    rows = [
        [
            "parameters",
            f"{e.parameters:,} ({short(e.parameters)})",
            f"{e.parameters_without_embeddings:,} without embeddings"
            + (active if e.active_parameters != e.parameters else ""),
        ],
        [
            "step",
            f"{short(e.tokens_per_step)} tokens",
            f"{micro * e.micro_batches * e.data_parallel_size} sequences: "
            f"{e.data_parallel_size} data-parallel ranks x {e.micro_batches} micro-batches x "
            f"{micro}",
        ],
        ["run", f"{short(e.tokens)} tokens", f"{e.steps:,} steps, {e.sequences:,} sequences"],
        [
            "compute",
            _flop(e.flops),
            f"{_flop(e.flops_per_token)} a token; {days} of one H100 at "
            f"{UTILISATION:.0%} of its peak",
        ],
    ]
    table(["total", "", ""], rows)
    say("")


def _print_memory(estimate: Estimate) -> None:
    parts = ("weights", "gradients", "optimizer", "activations", "logits", "total")
    several = len(estimate.stages) > 1
    rows = [
        [
            *([str(stage.stage), str(stage.layers)] if several else []),
            short(stage.parameters),
            *(human_bytes(getattr(stage, part)) for part in parts),
        ]
        for stage in estimate.stages
    ]
    processes = f"{estimate.processes} process{'es' if estimate.processes > 1 else ''}"
    say(f"Memory of each of {processes}, estimated:\n")
    table([*(["stage", "layers"] if several else []), "parameters", *parts], rows)
    say(f"Counted for Transformer Engine.\nNot counted: {LEFT_OUT}.")


def _print_saves(config: TrainingConfig, estimate: Estimate) -> None:
    save, last = (
        max(getattr(stage, name) for stage in estimate.stages) for name in ("save", "last_save")
    )
    say("\nHost memory of saving, in the first process of each data-parallel group:\n")
    wanted = config.checkpoint.fully_reshardable
    fully, by_dp = "can be resumed at any layout", "can be resumed at another data-parallel size"
    if not config.parallel.distributed_optimizer:
        wanted, by_dp = "none", fully
    rows = [
        ["on the way", human_bytes(save), fully if wanted == "all" else by_dp],
        ["the last step", human_bytes(last), by_dp if wanted == "none" else fully],
    ]
    table(["checkpoint", "memory", ""], rows)
    if lost := what_is_lost(config):
        say(f"\n{lost}")
