"""A live model streamed out, one Hugging Face tensor at a time."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("megatron.core")
if torch.cuda.is_available():
    pytest.skip("written for the CPU runtime", allow_module_level=True)

from safetensors.torch import load_file

from megatron_olmo_bridge import AutoBridge
from megatron_olmo_bridge.checkpoints.checkpoint import Checkpoint
from megatron_olmo_bridge.checkpoints.open import open_checkpoint
from megatron_olmo_bridge.errors import MappingError
from megatron_olmo_bridge.live.export import stream_weights
from megatron_olmo_bridge.live.load import load_weights

Build = Callable[..., list[torch.nn.Module]]
HFFactory = Callable[..., Path]


def loaded(build: Build, hf: Path, **fields: object) -> tuple[list[torch.nn.Module], Checkpoint]:
    chunks, source = build(hf, **fields), open_checkpoint(hf)
    load_weights(chunks, source)
    return chunks, source


@pytest.mark.parametrize("fields", [{}, {"make_vocab_size_divisible_by": 128},
                                    {"wrap_with_ddp": True}])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_was_loaded_comes_out_bit_for_bit(
    dtype: torch.dtype, fields: dict[str, object], build: Build, make_hf: HFFactory
) -> None:
    hf = make_hf(dtype=dtype)
    chunks, source = loaded(build, hf, **fields)
    # All of them kept: no tensor may change when the next one comes.
    found = dict(stream_weights(chunks, source.bridge))
    expected = load_file(hf / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype is dtype
        assert found[name].is_contiguous()
        assert torch.equal(found[name], tensor), name


def test_a_tied_model_has_no_head_to_give(build: Build, make_hf: HFFactory) -> None:
    hf = make_hf(tie_word_embeddings=True)
    chunks, source = loaded(build, hf)
    names = [name for name, _ in stream_weights(chunks, source.bridge)]
    assert sorted(names) == sorted(load_file(hf / "model.safetensors"))


def test_the_order_is_the_state_dicts_or_the_one_that_is_asked_for(
    build: Build, make_hf: HFFactory
) -> None:
    chunks, source = loaded(build, make_hf())
    names = [name for name, _ in stream_weights(chunks, source.bridge)]
    assert names == list(source.mapping.hf_shapes)
    asked = ["model.norm.weight", "model.layers.2.self_attn.k_proj.weight"]
    assert [name for name, _ in stream_weights(chunks, source.bridge, names=asked)] == asked


def test_autobridge_gives_them_in_the_order_of_the_files(build: Build, make_hf: HFFactory) -> None:
    hf = make_hf()
    chunks, _ = loaded(build, hf)
    bridge = AutoBridge.from_hf_pretrained(hf)
    names = [name for name, _ in bridge.export_hf_weights(chunks)]
    assert bridge.source is not None
    assert bridge.source.hf_folder is not None
    assert names == list(bridge.source.hf_folder.arrays)


@pytest.mark.parametrize("to", [None, 0])
@pytest.mark.parametrize("cpu", [False, True])
def test_the_process_that_is_named_is_given_every_tensor(
    to: int | None, cpu: bool, build: Build, make_hf: HFFactory
) -> None:
    hf = make_hf()
    chunks, source = loaded(build, hf)
    found = dict(stream_weights(chunks, source.bridge, to=to, cpu=cpu))
    assert all(torch.equal(found[n], t) for n, t in load_file(hf / "model.safetensors").items())


def test_the_tensors_are_the_callers_own(build: Build, make_hf: HFFactory) -> None:
    hf = make_hf()
    chunks, source = loaded(build, hf)
    for _, tensor in stream_weights(chunks, source.bridge):
        assert not tensor.requires_grad
        tensor.zero_()
    found = dict(stream_weights(chunks, source.bridge))
    assert all(torch.equal(found[n], t) for n, t in load_file(hf / "model.safetensors").items())


def test_they_are_those_of_the_moment_they_are_asked_for(build: Build, make_hf: HFFactory) -> None:
    chunks, source = loaded(build, make_hf())
    stream = stream_weights(chunks, source.bridge)
    first, _ = next(stream)
    with torch.no_grad():
        for parameter in chunks[0].parameters():
            parameter.fill_(7.0)
    rest = dict(stream)
    assert first not in rest
    assert all((tensor == 7).all() for tensor in rest.values())


def test_a_model_that_is_not_whole_is_refused_before_the_first_tensor(
    build: Build, make_hf: HFFactory
) -> None:
    hf = make_hf()
    build(hf)  # sets up the process groups
    provider = AutoBridge.from_hf_pretrained(hf).to_megatron_provider()
    last_stage = provider.provide(pre_process=False, post_process=True)
    with pytest.raises(MappingError) as caught:
        next(stream_weights([last_stage], open_checkpoint(hf).bridge))
    assert str(caught.value) == (
        "the model's processes don't hold all of model.embed_tokens.weight: 3636 of 3636 elements "
        "are not covered"
    )


def test_a_tensor_is_let_go_before_the_next_is_made(
    build: Build, make_hf: HFFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    chunks, source = loaded(build, make_hf())
    given: list[weakref.ref[torch.Tensor]] = []
    make_empty = torch.empty

    def empty(*arguments: Any, **options: Any) -> torch.Tensor:
        assert all(tensor() is None for tensor in given), "there would be two at a time"
        return make_empty(*arguments, **options)

    monkeypatch.setattr(torch, "empty", empty)
    stream = stream_weights(chunks, source.bridge)
    for _ in source.mapping.hf_shapes:
        given.append(weakref.ref(next(stream)[1]))
    assert next(stream, None) is None
    assert len(given) == 36
