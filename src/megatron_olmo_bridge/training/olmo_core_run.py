"""Continue a run of OLMo-core: its settings, its step, and the state that it needs to go on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from megatron_olmo_bridge.checkpoints.checkpoint import Checkpoint, OptimizerState
from megatron_olmo_bridge.checkpoints.olmo_core import OLMoCoreCheckpoint
from megatron_olmo_bridge.data.olmo_core import MAX_PERIOD, MIN_REPEATS
from megatron_olmo_bridge.errors import InputError, UnsupportedError, quote
from megatron_olmo_bridge.formats.files import read_json
from megatron_olmo_bridge.formats.hf_folder import CONFIG
from megatron_olmo_bridge.mapping.registry import bulleted

from .config import FIRST_STEP, TrainingConfig
from .recipes import as_dict, from_dict

_SCHEDULES = {
    "CosWithWarmup": "cosine",
    "LinearWithWarmup": "linear",
    "WSD": "wsd",
    "ConstantWithWarmup": "constant",
    "ConstantScheduler": "constant",
}
_FILTER = {
    "repetition_max_period": MAX_PERIOD,
    "repetition_min_period": 1,
    "repetition_max_count": MIN_REPEATS,
}


def continued(
    config: TrainingConfig, source: OLMoCoreCheckpoint, state: OptimizerState
) -> TrainingConfig:
    """Return the config with the settings of OLMo-core's run where it has the default itself.

    The source of each setting says where it is from, and what the run had if that is changed.

    Raises:
        InputError: a value in ``config.json`` is not of its type.
        UnsupportedError: the run has a setting that can't be continued.
    """
    file = source.path / CONFIG
    values, defaults = as_dict(config), as_dict(TrainingConfig())
    sources = dict(config.sources)
    try:
        settings = olmo_core_settings(read_json(file))
    except KeyError as error:
        raise InputError(
            f"{file}: has no {error.args[0]}, so the settings of the run can't be taken from it. "
            "Import the checkpoint with --optimizer, and continue from that with init.step and a "
            "recipe that has the settings."
        ) from error
    except (TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        raise InputError(f"{file}: a setting of the run is not of its type: {error}") from error
    except UnsupportedError as error:
        raise UnsupportedError(f"{file}: {error}") from error
    if state.step == 0 < state.iteration:
        settings["optimizer.bias_correction"] = FIRST_STEP
    settings["optimizer.decayed"] = state.decayed
    settings["init.step"] = state.iteration
    if config.data.mix and state.trainer:
        settings["data.fingerprint"] = state.trainer["data_loader"]["dataset_fingerprint"]
    settings = {key: value for key, value in settings.items() if value is not None}
    for key, value in settings.items():
        section, name = key.split(".")
        chosen = values[section].get(name)
        if chosen == defaults[section].get(name) and key not in config.sources:
            values[section][name] = value
            sources[key] = str(file)
        elif chosen != value:
            sources[key] = f"{sources.get(key, 'recipe')}; the run had {value} ({file})"
    return replace(from_dict(values), sources=sources)


def check_position(source: Checkpoint, continues_at: Mapping[str, Any]) -> None:
    """Raise InputError unless OLMo-core's data loader stood where this run continues.

    Args:
        source: the checkpoint of OLMo-core.
        continues_at: state of the data loader after as many steps, by this run's settings.
    """
    state = source.optimizer_state
    stood_at = state.trainer["data_loader"] if state.trainer else {}
    differences = [
        f"{name}: {continues_at[name]}, OLMo-core's was {stood_at.get(name)}"
        for name in ("seed", "epoch", "batches_processed", "sequence_length")
        if continues_at[name] != stood_at.get(name)
    ]
    if differences:
        raise InputError(
            f"{source.path}: after {state.iteration} steps, data.mix would be at another place "
            f"than in OLMo-core's run:\n{bulleted(differences)}\n"
            "Was its batch size or its data changed during the run? Only runs that kept both are "
            "continued with data.mix."
        )


def olmo_core_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the config of OLMo-core's run says, by ``section.field`` of a run here.

    Raises:
        UnsupportedError: a setting has no counterpart.
        KeyError, TypeError, ValueError: a value is absent or not of its type.
    """
    module, loader = config["train_module"], config["data_loader"]
    dataset, optim = config["dataset"], module["optim"]
    kind = _class_of(optim)
    if kind not in ("AdamWConfig", "SkipStepAdamWConfig"):
        raise UnsupportedError(f"its optimizer is {quote(kind)}, not AdamW or SkipStepAdamW")
    if _class_of(dataset) not in ("NumpyFSLDatasetConfig", "NumpyDatasetConfig"):
        raise UnsupportedError(f"its data set is {quote(_class_of(dataset))}, not NumpyFSLDataset")
    length = int(dataset["sequence_length"])
    if dataset.get("max_target_sequence_length") not in (None, length):
        raise UnsupportedError("its data set has max_target_sequence_length")
    batch, rest = divmod(int(loader["global_batch_size"]), length)
    if rest:
        raise ValueError("the batch is not a number of sequences")
    rules = dataset.get("instance_filter_config")
    if rules is not None and {**_FILTER, **_plain(rules)} != _FILTER:
        raise UnsupportedError("its data set has another filter of sequences than the default")
    beta1, beta2 = optim.get("betas", (0.9, 0.999))
    settings = {
        "train.sequence_length": length,
        "train.global_batch_size": batch,
        "data.seed": int(loader["seed"]),
        "data.vocab_size": int(dataset["tokenizer"]["vocab_size"]),
        "data.skip_repetitive": rules is not None,
        "optimizer.lr": float(optim.get("lr", 1e-3)),
        "optimizer.beta1": float(beta1),
        "optimizer.beta2": float(beta2),
        "optimizer.eps": float(optim.get("eps", 1e-8)),
        "optimizer.weight_decay": float(optim.get("weight_decay", 1e-2)),
        "optimizer.clip_grad": float(module.get("max_grad_norm") or 0.0),
        "optimizer.z_loss": float(module.get("z_loss_multiplier") or 0.0),
        "stability.on_spike": "skip" if kind == "SkipStepAdamWConfig" else "ignore",
    }
    if kind == "SkipStepAdamWConfig":
        settings["stability.sigma"] = float(optim.get("sigma_factor", 6))
        settings["stability.window"] = int(optim.get("rolling_interval_length", 128))
    steps = _steps(config["trainer"]["max_duration"], batch * length)
    schedule = _schedule(module.get("scheduler"), batch * length)
    return settings | {"train.steps": steps} | schedule | _router_losses(config["model"], length)


def _router_losses(model: Mapping[str, Any], length: int) -> dict[str, float]:
    """Return the weights of the router's losses in each layer of a mixture.

    OLMo-core averages them over the targets, of which a sequence has one less than tokens;
    megatron-core over the tokens.
    """
    if (moe := model["block"].get("feed_forward_moe")) is None:
        return {}
    if (granularity := moe.get("lb_loss_granularity")) not in (None, "local_batch"):
        raise UnsupportedError(f"its router is balanced over each {quote(granularity)}")
    layers = int(model["n_layers"]) if moe.get("scale_loss_by_num_layers", True) else 1
    scale = length / (length - 1) / layers
    return {
        "provider.moe_aux_loss_coeff": float(moe.get("lb_loss_weight") or 0.0) * scale,
        "provider.moe_z_loss_coeff": float(moe.get("z_loss_weight") or 0.0) * scale,
    }


def _schedule(scheduler: Mapping[str, Any] | None, step_tokens: int) -> dict[str, Any]:
    if scheduler is None:
        return {"schedule.decay": "constant"}
    kind = _class_of(scheduler)
    if kind not in _SCHEDULES:
        raise UnsupportedError(f"its schedule is {quote(kind)}, not one of {', '.join(_SCHEDULES)}")
    if scheduler.get("warmup_min_lr"):
        raise UnsupportedError("its warmup does not begin at 0 (warmup_min_lr)")
    if scheduler.get("warmup_fraction") is not None:
        raise UnsupportedError("its warmup is a fraction of the run (warmup_fraction)")
    unit = step_tokens if scheduler.get("units") == "tokens" else 1

    def steps(*names: str) -> int | None:
        value = next((scheduler[n] for n in names if scheduler.get(n) is not None), None)
        return None if value is None else int(value) // unit

    settings: dict[str, Any] = {
        "schedule.decay": _SCHEDULES[kind],
        "schedule.warmup_steps": steps("warmup", "warmup_steps") or 0,
    }
    if kind in ("CosWithWarmup", "LinearWithWarmup"):
        settings["schedule.min_lr_ratio"] = float(scheduler.get("alpha_f", 0.1))
        settings["schedule.end_step"] = steps("t_max")
    if kind == "WSD":
        if (decay := steps("decay", "decay_steps")) is None:
            raise UnsupportedError("its decay is a fraction of the run (decay_fraction)")
        if scheduler.get("decay_min_lr"):
            raise UnsupportedError("its decay does not end at 0 (decay_min_lr)")
        settings |= {"schedule.wsd_decay_steps": decay, "schedule.min_lr_ratio": 0.0}
    return settings


def _steps(duration: Mapping[str, Any], step_tokens: int) -> int:
    value, unit = int(duration["value"]), duration["unit"]
    if unit not in ("steps", "tokens"):
        raise UnsupportedError(f"its length is in {quote(unit)}, not in steps or tokens")
    return value if unit == "steps" else -(-value // step_tokens)


def _class_of(section: Mapping[str, Any]) -> str:
    return str(section.get("_CLASS_", "")).rpartition(".")[2]


def _plain(section: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in section.items() if key not in ("_CLASS_", "type")}
