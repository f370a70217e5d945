"""Does Megatron compute what transformers computes? Logits, loss, and layer by layer."""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_olmo_bridge.convert.source import Source, fetch, open_source
from megatron_olmo_bridge.errors import InputError, UnsupportedError
from megatron_olmo_bridge.formats.detect import Kind
from megatron_olmo_bridge.formats.dtypes import parse_dtype
from megatron_olmo_bridge.formats.hf_folder import read_config
from megatron_olmo_bridge.models.bridge import bridge_for

from .jobs import LOGITS, Job, read_states

States = dict[str, torch.Tensor]
THRESHOLD = 1e-4
"""Largest error in float32, as a share of the largest magnitude (of logits, of hidden states)."""
NOISE = 1.2
"""In a dtype of 16 bits: mean error of the logits, in units of transformers' own in that dtype."""
LAYER_NOISE = 2.0
"""The same for the hidden states of one layer, which are fewer and scatter more."""


@dataclass(frozen=True)
class Layer:
    """How far two models' hidden states are apart."""

    name: str
    max_error: float
    magnitude: float
    """Largest absolute value in the reference."""
    allowed: float
    """What ``error`` may be."""
    error: float
    """Largest error over magnitude in float32, mean error in 16 bits."""

    @property
    def parts(self) -> bool:
        """Whether they differ here by more than rounding."""
        return not self.error <= self.allowed


@dataclass(frozen=True)
class Comparison:
    """What :func:`compare` found."""

    tokens: int
    dtype: str
    max_error: float
    mean_error: float
    magnitude: float
    """Largest absolute logit of the reference."""
    top1_agreement: float
    """Share of positions at which both find the same token likeliest."""
    kl_divergence: float
    """Of the model from the reference, mean over positions, in nats."""
    loss: tuple[float, float] | None
    """Mean cross-entropy of the next token: of the reference, of the model. None of a classifier.
    """
    layers: list[Layer]
    """Embedding, layers, final norm, logits."""
    config_differences: list[str]

    @property
    def equal(self) -> bool:
        """Whether the logits differ by no more than rounding."""
        return not self.layers[-1].parts

    @property
    def parts_at(self) -> str | None:
        """The first place at which they differ by more than rounding."""
        return next((layer.name for layer in self.layers if layer.parts), None)


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
) -> Comparison:
    """Run transformers and a live Megatron model on the same tokens.

    Args:
        hf: the reference: a Hugging Face folder or hub id, run by transformers.
        other: a checkpoint of either kind, run by megatron-core in processes of its own.
        tp, pp, sp, ep: tensor and pipeline parallel size, sequence parallelism, expert parallel
            size of these.
        dtype: of both models: ``float32``, ``bfloat16`` or ``float16``; also ``bf16`` or a torch
            dtype.
        prompt: text to run on; it is read by the tokenizer of ``hf``.
        tokens: without a prompt, how many random ones.
        threshold: instead of :data:`THRESHOLD` in float32, of :data:`NOISE` in 16 bits.

    Raises:
        BridgeError: a checkpoint is not sound, the models have different shapes, or the layout
            can't be.
    """
    dtype = parse_dtype(dtype, keep=False)
    reference = open_source(fetch(str(hf), None)[0])
    model = open_source(fetch(str(other), None)[0])
    if reference.kind is not Kind.HF:
        raise InputError(f"{hf}: the reference must be a Hugging Face checkpoint")
    differences = _config_differences(reference, model)
    batch = [
        tokenize(reference, prompt) if prompt is not None else random_tokens(reference, tokens)
    ]
    if len(batch[0]) < 2:
        raise InputError("two tokens at least are needed: the loss is of the next token")
    with tempfile.TemporaryDirectory(prefix="olmo-bridge-") as work:
        Job(str(model.folder), tp, pp, sp, ep, dtype=dtype, tokens=batch, states=work).run()
        found = read_states(Path(work))
    return comparison(reference, found, batch, dtype, threshold, differences)


def comparison(
    reference: Source,
    found: States,
    batch: list[list[int]],
    dtype: str,
    threshold: float | None = None,
    config_differences: list[str] | None = None,
) -> Comparison:
    """What a job's states are against those of transformers, which runs here."""
    ids = torch.tensor(batch)
    wanted = run_transformers(reference.folder, ids, "float32")
    layers = []
    if dtype == "float32":
        for name, states in wanted.items():
            worst, magnitude = _max_error(found[name], states), float(states.abs().max())
            layers.append(
                Layer(name, worst, magnitude, threshold or THRESHOLD, worst / (magnitude or 1.0))
            )
    else:
        own = run_transformers(reference.folder, ids, dtype)
        for name, states in wanted.items():
            worst, magnitude = _max_error(found[name], states), float(states.abs().max())
            noise = (threshold or NOISE) if name == LOGITS else LAYER_NOISE
            allowed = noise * _mean_error(own[name], states)
            layers.append(Layer(name, worst, magnitude, allowed, _mean_error(found[name], states)))
    a, b = wanted[LOGITS].double(), found[LOGITS].double()
    return Comparison(
        tokens=ids.numel(),
        dtype=dtype,
        max_error=_max_error(b, a),
        mean_error=_mean_error(b, a),
        magnitude=float(a.abs().max()),
        top1_agreement=float((a.argmax(-1) == b.argmax(-1)).double().mean()),
        kl_divergence=_kl(a, b),
        loss=(_loss(a, ids), _loss(b, ids)) if a.dim() == 3 else None,
        layers=layers,
        config_differences=config_differences or [],
    )


def run_transformers(folder: Path, ids: torch.Tensor, dtype: str) -> States:
    """Hidden states and logits by transformers, in float32 on the CPU, by the worker's names."""
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
    del model
    gc.collect()
    return found


@contextmanager
def _collecting(model: Any, found: States) -> Iterator[None]:
    """Keeps what the parts of a transformers model give, by the names of ``hidden_states``."""
    if model.config.model_type == "gpt2":  # its dropout stands after tokens and positions are added
        embedding, layers, norm = model.drop, model.h, model.ln_f
    else:
        embedding, layers, norm = model.embed_tokens, model.layers, model.norm
    modules = {"embedding": embedding}
    modules |= {f"layer {i}": layer for i, layer in enumerate(layers)}
    modules["final norm"] = norm

    def keep(name: str, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        found[name] = hidden.detach().float().cpu()

    with ExitStack() as stack:
        for name, module in modules.items():
            hook = module.register_forward_hook(lambda _, __, out, name=name: keep(name, out))
            stack.callback(hook.remove)
        yield


def tokenize(source: Source, prompt: str) -> list[int]:
    """Token ids of a text, by the tokenizer beside a checkpoint.

    Raises:
        InputError: there is no tokenizer.
    """
    return [int(token) for token in tokenizer_of(source)(prompt)["input_ids"]]


def tokenizer_of(source: Source) -> Any:
    """The tokenizer beside a checkpoint.

    Raises:
        InputError: there is none.
    """
    folder = source.side_folder
    if folder is None or not any(folder.glob("tokenizer*")):
        raise InputError(f"{source.folder}: has no tokenizer; give token ids instead of text")
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def random_tokens(source: Source, count: int) -> list[int]:
    """So many token ids of the model's vocabulary, the same each time."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(source.bridge.vocab_size, (count,), generator=generator).tolist()


def _config_differences(a: Source, b: Source) -> list[str]:
    if a.bridge.family != b.bridge.family or a.mapping.hf_shapes != b.mapping.hf_shapes:
        raise UnsupportedError(
            f"{a.folder} and {b.folder} can't be compared: they hold models of different shapes "
            f"({a.bridge.family} and {b.bridge.family})"
        )
    mine, theirs = a.bridge.numbers, b.bridge.numbers
    return [f"{k}: {v} and {theirs[k]}" for k, v in mine.items() if v != theirs[k]]


def _max_error(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())


def _mean_error(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().double().mean())


def _kl(reference: torch.Tensor, model: torch.Tensor) -> float:
    p, q = reference.log_softmax(-1), model.log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def _loss(logits: torch.Tensor, ids: torch.Tensor) -> float:
    return float(
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    )
