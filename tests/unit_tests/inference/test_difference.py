"""What is rounding and what is a difference, on states made up for it."""

from typing import Any

import pytest
import torch

from megatron_olmo_bridge.inference.difference import Comparison, States, difference

TOKENS, HIDDEN, VOCAB = 32, 16, 50


def states(seed: int, **logits: Any) -> States:
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "embedding": (1, TOKENS, HIDDEN),
        "layer 0": (1, TOKENS, HIDDEN),
        "final norm": (1, TOKENS, HIDDEN),
        "logits": logits.get("shape", (1, TOKENS, VOCAB)),
    }
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


REFERENCE = states(0)


def off_by(error: float, seed: int, reference: States = REFERENCE) -> States:
    """The reference with noise of this size, but for the embedding: that is looked up exactly."""
    shape = reference["logits"].shape
    noise = states(seed, shape=shape)
    noise["embedding"].zero_()
    return {name: tensor + error * noise[name] for name, tensor in reference.items()}


def compared(
    model: States, own: States | None, reference: States = REFERENCE, **options: Any
) -> Comparison:
    ids = torch.arange(TOKENS)[None]
    dtype = "float32" if own is None else "bfloat16"
    return difference(reference, model, own, ids, dtype, **options)


OWN = off_by(0.01, seed=1)


def test_in_float32_errors_are_shares_of_the_largest_value() -> None:
    largest = float(REFERENCE["logits"].abs().max())
    for error, equal in ((0.9e-4, True), (1.1e-4, False)):
        model = {name: tensor.clone() for name, tensor in REFERENCE.items()}
        model["logits"][0, 3, 7] += error * largest
        found = compared(model, None)
        assert found.equal is equal
        assert found.layers[-1].error == pytest.approx(error, rel=1e-2)
        assert found.differs_from == (None if equal else "logits")
    assert found.verdict == (
        "largest error / largest value 0.00011, allowed 0.0001 (fixed), on 32 tokens"
    )


@pytest.mark.parametrize(("error", "equal"), [(0.013, True), (0.017, False)])
def test_in_16_bits_logits_may_be_off_by_one_and_a_half_times_transformers_own(
    error: float, equal: bool
) -> None:
    found = compared(off_by(error, seed=2), OWN)

    assert found.equal is equal
    assert found.layers[-1].allowed == pytest.approx(1.5 * 0.01 * 0.8, rel=0.05)  # mean |N(0, 1)|
    assert found.bound == "1.5 x transformers' own in bfloat16"


def test_what_transformers_looks_up_exactly_must_be_exact() -> None:
    """Its own error is 0, and nothing is divided by it."""
    found = compared(off_by(0.01, seed=2), OWN)
    embedding = found.layers[0]
    assert (embedding.error, embedding.allowed, embedding.share) == (0, 0, 0)
    assert not embedding.differs

    model = off_by(0.01, seed=2)
    model["embedding"][0, 5, 5] += 1e-3
    found = compared(model, OWN)
    assert found.differs_from == "embedding"
    assert found.layers[0].share == float("inf")


def routed_elsewhere(model: States, tokens: int) -> States:
    """Some tokens went to another expert than in the reference."""
    other = states(9)
    for name in ("layer 0", "final norm", "logits"):
        model[name][0, :tokens] = other[name][0, :tokens]
    return model


def test_a_mixture_is_judged_by_the_tokens_that_go_to_the_same_experts() -> None:
    model = routed_elsewhere(off_by(0.01, seed=2), tokens=TOKENS // 4)

    assert compared(model, OWN, mixture=True).differs_from is None
    assert compared(model, OWN).differs_from == "layer 0"


def test_a_mixture_that_is_wrong_for_most_tokens_is_found() -> None:
    model = routed_elsewhere(off_by(0.01, seed=2), tokens=TOKENS * 3 // 4)

    assert compared(model, OWN, mixture=True).differs_from == "layer 0"
    assert not compared(off_by(0.025, seed=2), OWN, mixture=True).equal


def test_a_wrong_embedding_of_one_token_is_found_in_a_mixture_too() -> None:
    model = off_by(0.01, seed=2)
    model["embedding"][0, 5] = 0

    assert compared(model, OWN, mixture=True).differs_from == "embedding"


def test_the_few_logits_of_a_classifier_raise_no_false_alarm() -> None:
    """transformers' own error may be 0 by chance; the rounding of the layers before is known."""
    for seed in range(20):
        reference = states(seed, shape=(1, 2))
        own = off_by(0.01, seed=100 + seed, reference=reference)
        own["logits"] = reference["logits"].clone()
        model = off_by(0.01, seed=200 + seed, reference=reference)
        assert compared(model, own, reference).equal
        model["logits"] = -reference["logits"]
        found = compared(model, own, reference)
        assert not found.equal
        assert found.loss is None


@pytest.mark.parametrize("own", [None, OWN], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_differs(own: States | None, value: float) -> None:
    model = off_by(0, seed=2)
    model["logits"][0, 3, 7] = value
    assert not compared(model, own).equal


@pytest.mark.parametrize("own", [None, OWN], ids=["float32", "bfloat16"])
def test_a_threshold_of_zero_allows_nothing(own: States | None) -> None:
    assert not compared(off_by(1e-6, seed=2), own, threshold=0.0).equal
    assert compared(off_by(0, seed=2), own, threshold=0.0).equal


def test_the_first_place_that_differs_is_named() -> None:
    model = off_by(0, seed=2)
    model["final norm"] = model["final norm"] + 1
    found = compared(model, None)
    assert found.differs_from == "final norm"
    assert found.equal  # the logits are what counts


def test_figures_of_the_logits() -> None:
    model = {name: tensor.clone() for name, tensor in REFERENCE.items()}
    model["logits"][0, 0] = model["logits"][0, 0].flip(0)  # another token is likeliest
    found = compared(model, None)
    a, b = REFERENCE["logits"].double()[0], model["logits"].double()[0]
    p = a.softmax(-1)

    assert found.tokens == TOKENS
    assert found.top1_agreement == pytest.approx(1 - 1 / TOKENS)
    assert found.kl_divergence == pytest.approx(
        float((p * (a.softmax(-1) / b.softmax(-1)).log()).sum(-1).mean())
    )
    assert found.loss == pytest.approx(
        [float(-x.log_softmax(-1)[range(TOKENS - 1), range(1, TOKENS)].mean()) for x in (a, b)]
    )
