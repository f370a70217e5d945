"""Measure how far two models' states differ, and how far rounding alone explains it.

In float32 the largest error of a state may be a fixed fraction (:data:`THRESHOLD`) of its largest
value. In 16 bits rounding is orders of magnitude larger and depends on the model, so it is
measured: transformers runs twice, in float32 as the reference and in the 16-bit dtype. The model's
error from the reference may be a multiple (:data:`NOISE`) of transformers' own. An error is the
mean over the elements of each token, then over tokens.

For a mixture of experts it is the median over tokens, with :data:`MIXTURE_NOISE`. Where two experts
are almost equally likely, rounding decides which of them a token is routed to, and two 16-bit runs
decide differently: the errors of single tokens are then many times the rounding, and would dominate
a mean. An error in fewer than half of the tokens of a mixture (one expert of many) is detected in
float32, and by ``verify``.

The constants were measured on all tiny models with three seeds each, stored in float32 and
bfloat16, run in bfloat16 and float16 at TP 1, 2 and 4, SP, PP 2 and EP 2, on 2 to 128 tokens; see
docs/verification.md for the results.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from .jobs import EMBEDDING, FINAL_NORM, LOGITS
from .weights import WeightDifference

States = dict[str, torch.Tensor]
"""Float32 states by name: hidden states [b, s, hidden], logits [b, s, vocab] or [b, classes]."""
THRESHOLD = 1e-4
"""Allowed error in float32, as a fraction of the largest value. Measured: at most 1.6e-6."""
NOISE = 1.5
"""Allowed error of logits in 16 bits, in units of transformers' own. Measured: at most 1.37."""
MIXTURE_NOISE = 2.0
"""The same for a mixture of experts. Measured: at most 1.53."""
LAYER_NOISE = 2.0
"""The same for hidden states. Measured: at most 1.41, for a mixture 1.60."""
CLASSIFIER_NOISE = 4.0
"""The same for a classifier's logits, in units of their expected rounding: :func:`_head_noise`."""


@dataclass(frozen=True)
class Layer:
    """Difference between two models' states after one module."""

    name: str
    max_error: float
    magnitude: float
    """Largest absolute value in the reference."""
    allowed: float
    """Largest ``error`` that rounding explains; 0 where transformers itself rounds nothing."""
    error: float
    """Largest error over magnitude in float32; in 16 bits see the module's docstring."""

    @property
    def differs(self) -> bool:
        """True if the states differ here by more than rounding, or are NaN."""
        return not self.error <= self.allowed  # unlike >, true for NaN

    @property
    def share(self) -> float:
        """Error divided by allowed error: above 1 is more than rounding."""
        if self.allowed:
            return self.error / self.allowed
        return float("inf") if self.error else 0.0


@dataclass(frozen=True)
class Comparison:
    """Result of comparing a model with the reference."""

    tokens: int
    dtype: str
    max_error: float
    mean_error: float
    magnitude: float
    """Largest absolute logit of the reference."""
    top1_agreement: float
    """Fraction of positions at which both models predict the same token."""
    kl_divergence: float
    """KL divergence of the model from the reference, mean over positions, in nats."""
    loss: tuple[float, float] | None
    """Mean next-token cross-entropy of the reference and of the model; None for a classifier."""
    layers: list[Layer]
    """Embedding, layers, final norm, logits."""
    measure: str
    """Description of a layer's ``error``."""
    bound: str
    """Description of where the logits' ``allowed`` comes from."""
    config_differences: list[str]
    weights: list[WeightDifference] = field(default_factory=list)
    """Every weight; empty if only states were compared."""

    @property
    def equal(self) -> bool:
        """True if the logits differ by no more than rounding."""
        return not self.layers[-1].differs

    @property
    def differs_from(self) -> str | None:
        """Name of the first module whose states differ by more than rounding; None if none do."""
        return next((layer.name for layer in self.layers if layer.differs), None)

    @property
    def verdict(self) -> str:
        """Error of the logits, allowed error, and where that comes from, in one line."""
        logits = self.layers[-1]
        return (
            f"{self.measure} {logits.error:.2g}, allowed {logits.allowed:.2g} ({self.bound}), "
            f"on {self.tokens} tokens"
        )


def difference(
    reference: States,
    model: States,
    own: States | None,
    ids: torch.Tensor,
    dtype: str,
    *,
    mixture: bool = False,
    threshold: float | None = None,
    config_differences: list[str] | None = None,
) -> Comparison:
    """Compare states of a model with those of a reference.

    Args:
        reference: states of transformers in float32.
        model: states of the model in ``dtype``, by the same names.
        own: states of transformers in ``dtype``; None in float32.
        ids: the tokens that both ran on, [b, s].
        mixture: whether tokens are routed to experts.
        threshold: replaces :data:`THRESHOLD`, or the factor of the logits in 16 bits.
    """
    a, b = reference[LOGITS].double(), model[LOGITS].double()
    classifier = a.dim() == 2
    noise = MIXTURE_NOISE if mixture else CLASSIFIER_NOISE if classifier else NOISE
    factor = threshold if threshold is not None else THRESHOLD if own is None else noise
    layers = []
    for name, states in reference.items():
        magnitude, largest = float(states.abs().max()), _max_error(model[name], states)
        if own is None:
            allowed, error = factor, largest / (magnitude or 1.0)
        else:
            median = mixture and name != EMBEDDING  # no token is routed before the first layer
            error = _typical_error(model[name], states, median)
            allowed = _typical_error(own[name], states, median)
            if name == LOGITS and classifier:
                allowed = max(allowed, _head_noise(own, reference))
            allowed *= factor if name == LOGITS else LAYER_NOISE
        layers.append(Layer(name, largest, magnitude, allowed, error))
    return Comparison(
        tokens=ids.numel(),
        dtype=dtype,
        max_error=_max_error(b, a),
        mean_error=_typical_error(b, a),
        magnitude=float(a.abs().max()),
        top1_agreement=float((a.argmax(-1) == b.argmax(-1)).double().mean()),
        kl_divergence=_kl(a, b),
        loss=None if classifier else (_loss(a, ids), _loss(b, ids)),
        layers=layers,
        measure="largest error / largest value"
        if own is None
        else "median token's mean error"
        if mixture
        else "mean error",
        bound="fixed" if own is None else f"{factor:g} x transformers' own in {dtype}",
        config_differences=config_differences or [],
    )


def _max_error(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())


def _typical_error(a: torch.Tensor, b: torch.Tensor, median: bool = False) -> float:
    """Return the mean error, or the median over tokens of each token's mean error."""
    error_of_token = (a - b).abs().double().mean(-1)
    return float(error_of_token.median() if median else error_of_token.mean())


def _head_noise(own: States, reference: States) -> float:
    """Return the expected rounding of a classifier's logits, which are too few to measure it.

    On average a linear head's output has the relative error of its input. So the rounding is the
    relative error of the final norm's output, times the largest logit.
    """
    norm = reference[FINAL_NORM].abs().double().mean()
    relative = _typical_error(own[FINAL_NORM], reference[FINAL_NORM]) / float(norm)
    return relative * float(reference[LOGITS].abs().max())


def _kl(reference: torch.Tensor, model: torch.Tensor) -> float:
    p, q = reference.log_softmax(-1), model.log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def _loss(logits: torch.Tensor, ids: torch.Tensor) -> float:
    return float(
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    )
