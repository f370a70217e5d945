"""Compare a live Megatron model with transformers: logits, loss, and layer by layer."""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megatron_olmo_bridge.checkpoints.checkpoint import Checkpoint
from megatron_olmo_bridge.checkpoints.hf import HFCheckpoint
from megatron_olmo_bridge.checkpoints.open import open_checkpoint
from megatron_olmo_bridge.data.tokenizer import load_pretrained
from megatron_olmo_bridge.errors import InputError, UnsupportedError
from megatron_olmo_bridge.formats.dtypes import parse_dtype
from megatron_olmo_bridge.formats.hf_folder import artifact_files, read_config
from megatron_olmo_bridge.formats.remote_path import RemotePath, address_of, here
from megatron_olmo_bridge.models.families import bridge_for
from megatron_olmo_bridge.storage.hub import fetch

from .difference import Comparison, States, difference
from .jobs import EMBEDDING, FINAL_NORM, LOGITS, Job, Tell, read_states
from .weights import weight_differences


def compare(
    hf: str | Path,
    other: str | Path,
    *,
    tp: int = 1,
    pp: int = 1,
    sp: bool = False,
    ep: int = 1,
    dtype: str | torch.dtype = "float32",
    prompt: str | None = None,
    tokens: int = 128,
    threshold: float | None = None,
    tell: Tell = lambda _: None,
) -> Comparison:
    """Run transformers and a live Megatron model on the same tokens.

    Args:
        hf: the reference: a Hugging Face folder or hub id, run by transformers.
        other: a checkpoint of any kind, run by megatron-core in separate processes.
        tp, pp, sp, ep: tensor and pipeline parallel size, sequence parallelism, expert parallel
            size of these.
        dtype: dtype of both models: ``float32``, ``bfloat16`` or ``float16``; also ``bf16`` or a
            torch dtype.
        prompt: text to run on, tokenized by the tokenizer of ``hf``.
        tokens: number of random tokens to run on without a prompt.
        threshold: allowed error in float32, or in 16 bits the allowed multiple of transformers'
            own error; replaces the constants of :mod:`inference.difference`.
        tell: called with each step as it begins.

    Raises:
        BridgeError: a checkpoint is damaged, the models have different shapes, or the layout is
            impossible.
    """
    dtype = parse_dtype(dtype, keep=False)
    reference = open_checkpoint(fetch(str(hf), None)[0])
    model = open_checkpoint(fetch(str(other), None)[0])
    here(reference.path)  # transformers reads it
    if not isinstance(reference, HFCheckpoint):
        raise InputError(f"{reference.path}: the reference must be a Hugging Face checkpoint")
    differences = _config_differences(reference, model)
    batch = [random_tokens(reference, tokens) if prompt is None else tokenize(reference, prompt)]
    with tempfile.TemporaryDirectory(prefix="olmo-bridge-") as work:
        Job(address_of(model.path), tp, pp, sp, ep, dtype=dtype, tokens=batch, states=work).run(
            tell
        )
        states = read_states(Path(work))
    found = comparison(reference, states, batch, dtype, threshold, differences, tell)
    tell("compare the weights")
    return replace(found, weights=weight_differences(reference, model))


def comparison(
    reference: Checkpoint,
    states: States,
    batch: list[list[int]],
    dtype: str,
    threshold: float | None = None,
    config_differences: list[str] | None = None,
    tell: Tell = lambda _: None,
) -> Comparison:
    """Compare the states that a job wrote with those of transformers, which runs here."""
    ids = torch.tensor(batch)
    tell("run transformers in float32")
    folder = here(reference.path)
    expected, own = run_transformers(folder, ids, "float32"), None
    if dtype != "float32":
        tell(f"run transformers in {dtype}, to measure what rounding does")
        own = run_transformers(folder, ids, dtype)
    return difference(
        expected,
        states,
        own,
        ids,
        dtype,
        mixture="num_moe_experts" in reference.bridge.config_values,
        threshold=threshold,
        config_differences=config_differences,
    )


def run_transformers(folder: Path, ids: torch.Tensor, dtype: str) -> States:
    """Return transformers' hidden states and logits, as float32 on the CPU, by name."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
    from transformers.utils import logging

    logging.disable_progress_bar()
    is_classifier = bridge_for(read_config(folder), folder).num_labels is not None
    auto = AutoModelForSequenceClassification if is_classifier else AutoModelForCausalLM
    model, report = auto.from_pretrained(
        folder, dtype=getattr(torch, dtype), output_loading_info=True
    )
    if wrong := {k: v for k, v in report.items() if v and k.endswith("_keys")}:
        raise InputError(f"{folder}: transformers reports {wrong}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device).eval()
    found: States = {}
    with torch.no_grad(), _collecting(model.base_model, found):
        logits = model(ids.to(device), use_cache=False).logits
    found[LOGITS] = logits.float().cpu()
    if not found[LOGITS].isfinite().all():
        raise InputError(
            f"{folder}: transformers' own logits in {dtype} are not finite: a weight is infinite "
            "or NaN, or the dtype's range is too small for this model. Compare in float32 or "
            "bfloat16."
        )
    del model
    gc.collect()
    return found


@contextmanager
def _collecting(model: Any, found: States) -> Iterator[None]:
    """Collect the outputs of a transformers model's modules, by the names of ``hidden_states``."""
    if model.config.model_type == "gpt2":  # drop's input is the sum of both embeddings
        embedding, layers, norm = model.drop, model.h, model.ln_f
    else:
        embedding, layers, norm = model.embed_tokens, model.layers, model.norm
    modules = {EMBEDDING: embedding}
    modules |= {f"layer {i}": layer for i, layer in enumerate(layers)}
    modules[FINAL_NORM] = norm

    def keep(name: str, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        found[name] = hidden.detach().float().cpu()

    with ExitStack() as stack:
        for name, module in modules.items():
            hook = module.register_forward_hook(lambda _, __, out, name=name: keep(name, out))
            stack.callback(hook.remove)
        yield


def tokenize(source: Checkpoint, prompt: str) -> list[int]:
    """Return token ids of a text, by the tokenizer stored with a checkpoint.

    Raises:
        InputError: there is no tokenizer, or the model takes no sequence of that length.
    """
    ids = [int(token) for token in tokenizer_of(source)(prompt)["input_ids"]]
    _check_length(source, len(ids))
    return ids


def tokenizer_of(source: Checkpoint) -> Any:
    """Load the tokenizer stored with a checkpoint.

    Raises:
        InputError: there is none.
    """
    folder = source.artifacts_folder
    if folder is None or not any(folder.glob("tokenizer*")):
        raise InputError(
            f"{source.path}: has no tokenizer. compare takes random tokens without --prompt; "
            "generate takes --tokens 1,2,3, or --tokenizer with a folder or a hub id."
        )
    if not isinstance(folder, RemotePath):
        return load_pretrained(str(folder))[0]
    with tempfile.TemporaryDirectory(prefix="olmo-bridge-") as copy:
        for name, data in artifact_files(folder).items():
            (Path(copy) / name).parent.mkdir(exist_ok=True)
            (Path(copy) / name).write_bytes(data)
        return load_pretrained(copy)[0]


def _check_length(source: Checkpoint, count: int) -> None:
    if count < 2:
        raise InputError("at least two tokens are needed, to predict a next token")
    positions = source.bridge.config_values.get("max_position_embeddings")
    if positions is not None and count > positions:
        raise InputError(f"{count} tokens are more than the model's {positions} positions")


def random_tokens(source: Checkpoint, count: int) -> list[int]:
    """Return ``count`` token ids of the model's vocabulary, the same each time.

    Raises:
        InputError: the model takes no sequence of that length.
    """
    _check_length(source, count)
    generator = torch.Generator().manual_seed(0)
    return torch.randint(source.bridge.vocab_size, (count,), generator=generator).tolist()


def _config_differences(a: Checkpoint, b: Checkpoint) -> list[str]:
    if a.bridge.family != b.bridge.family or a.mapping.hf_shapes != b.mapping.hf_shapes:
        raise UnsupportedError(
            f"{a.path} and {b.path} can't be compared: they hold models of different shapes "
            f"({a.bridge.family}, {a.parameter_count:,} parameters; "
            f"{b.bridge.family}, {b.parameter_count:,})"
        )
    first, second = a.bridge.config_values, b.bridge.config_values
    return [f"{k}: {v} and {second[k]}" for k, v in first.items() if v != second[k]]
