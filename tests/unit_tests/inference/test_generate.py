"""Generation by a live model: the cache of keys and values changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("megatron.core")
if torch.cuda.is_available():
    pytest.skip("written for the CPU runtime", allow_module_level=True)

from megatron_olmo_bridge import AutoBridge
from megatron_olmo_bridge.errors import InputError, UnsupportedError
from megatron_olmo_bridge.inference.forward import forward
from megatron_olmo_bridge.inference.generate import generate

HFFactory = Callable[..., Path]
Chunks = list[torch.nn.Module]
VOCAB = 101


pytestmark = pytest.mark.usefixtures("one_process")


def loaded(hf: Path, **fields: Any) -> Chunks:
    provider = AutoBridge.from_hf_pretrained(hf).to_megatron_provider()
    for name, value in fields.items():
        setattr(provider, name, value)
    return provider.provide_distributed_model(wrap_with_ddp=False)


def sharpen(tensors: dict[str, torch.Tensor]) -> None:
    """Make the distributions sharp: a wrong position or key then shows."""
    tensors["lm_head.weight"] *= 30


@pytest.fixture
def model(make_hf: HFFactory) -> Chunks:
    return loaded(make_hf(change=sharpen))


def generated(model: Chunks, **options: Any) -> list[int]:
    settings = {"prompt": [5, 17, 99, 0], "vocab_size": VOCAB, "max_new_tokens": 8}
    return list(generate(model, **{**settings, **options}))


def without_a_cache(model: Chunks, tokens: list[int], count: int) -> list[int]:
    """Greedy, the whole sequence anew for each token."""
    tokens = list(tokens)
    for _ in range(count):
        logits = forward(model, torch.tensor([tokens]), vocab_size=VOCAB)
        assert logits is not None
        assert logits.shape == (1, len(tokens), VOCAB)
        tokens.append(int(logits[0, -1].argmax()))
    return tokens[-count:]


@pytest.mark.parametrize("prompt", [[5], [5, 17, 99, 0]])
def test_greedy_generation_is_that_without_a_cache(model: Chunks, prompt: list[int]) -> None:
    found = generated(model, prompt=prompt, max_new_tokens=12)
    assert found == without_a_cache(model, prompt, 12)
    assert len(set(found)) > 3, "a model that repeats itself proves little"


def test_padding_rows_are_never_generated(make_hf: HFFactory) -> None:
    chunks = loaded(make_hf(), make_vocab_size_divisible_by=128)
    with torch.no_grad():  # without the cut they would be the likeliest
        chunks[0].output_layer.weight[VOCAB:] = chunks[0].output_layer.weight[:27] * 100
    sampled = generated(chunks, max_new_tokens=40, temperature=3.0)
    assert max(*generated(chunks), *sampled) < VOCAB


def test_sampling_repeats_itself_with_the_seed_and_only_with_it(model: Chunks) -> None:
    def sampled(seed: int) -> list[int]:
        return generated(model, temperature=5.0, seed=seed, max_new_tokens=12)

    assert sampled(1) == sampled(1) != sampled(2)


def test_a_narrow_top_p_is_greedy(model: Chunks) -> None:
    assert generated(model, temperature=5.0, top_p=1e-9) == generated(model)


def test_it_ends_after_a_token_to_stop_at(model: Chunks) -> None:
    whole = generated(model)
    stop = whole[4]
    first = whole.index(stop)
    assert generated(model, stop_at={stop}) == whole[: first + 1]
    assert generated(model, stop_at={VOCAB - 1} - set(whole)) == whole


def test_no_new_tokens_are_none(model: Chunks) -> None:
    assert generated(model, max_new_tokens=0) == []


def test_the_model_stays_as_it_was(model: Chunks) -> None:
    model[0].train()
    before = {name: p.detach().clone() for name, p in model[0].named_parameters()}
    logits = forward(model, torch.tensor([[1, 2, 3]]), vocab_size=VOCAB)
    generated(model)
    assert model[0].training
    assert all(torch.equal(before[name], p) for name, p in model[0].named_parameters())
    assert all(p.grad is None for p in model[0].parameters())
    again = forward(model, torch.tensor([[1, 2, 3]]), vocab_size=VOCAB)
    assert logits is not None
    assert again is not None
    assert torch.equal(again, logits)


def test_up_to_the_last_position(model: Chunks) -> None:
    assert len(generated(model, prompt=[1] * 120, max_new_tokens=8)) == 8


# --------------------------------------------------------------------------------- what cannot be


def test_a_request_that_cannot_be_is_refused(model: Chunks) -> None:
    with pytest.raises(InputError, match=r"^the prompt is empty"):
        generated(model, prompt=[])
    with pytest.raises(InputError) as caught:
        generated(model, max_new_tokens=125)
    assert str(caught.value) == "4 tokens and 125 new ones are more than the model's 128 positions"


def test_sequence_parallelism_is_refused(model: Chunks) -> None:
    model[0].config.sequence_parallel = True
    with pytest.raises(UnsupportedError, match=r"^generation takes neither virtual pipelining nor"):
        generated(model)


def test_virtual_pipelining_is_refused(model: Chunks) -> None:
    with pytest.raises(UnsupportedError, match=r"^generation takes neither virtual pipelining nor"):
        generated(model * 2)
