"""Filling a live model from a checkpoint of either kind."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("megatron.core")
if torch.cuda.is_available():
    pytest.skip("written for the CPU runtime", allow_module_level=True)

from range_server import serving
from safetensors.torch import load_file

from megatron_olmo_bridge import import_checkpoint
from megatron_olmo_bridge.checkpoints.checkpoint import Checkpoint
from megatron_olmo_bridge.checkpoints.open import open_checkpoint
from megatron_olmo_bridge.convert.options import ImportOptions
from megatron_olmo_bridge.errors import FormatError, InputError, MappingError
from megatron_olmo_bridge.live.load import load_weights
from megatron_olmo_bridge.models.olmo2.bridge import Olmo2Bridge
from megatron_olmo_bridge.storage.progress import Reporter

Build = Callable[..., list[torch.nn.Module]]
HFFactory = Callable[..., Path]
DTYPES = ["float32", "bfloat16", "float16"]


def read(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


def assert_filled(
    chunks: list[torch.nn.Module], expected: dict[str, torch.Tensor], dtype: torch.dtype
) -> None:
    found = {n.removeprefix("module."): p for n, p in chunks[0].named_parameters()}
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype is dtype
        assert torch.equal(found[name], value.to(dtype)), name


class Told(Reporter):
    """Remembers what it is told."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def begin(self, what: str, total: int) -> None:
        self.calls.append(("begin", what, total))

    def advance(self, done: int) -> None:
        self.calls.append(("advance", done))

    def end(self) -> None:
        self.calls.append(("end",))


# ---------------------------------------------------------------------------------- every element


@pytest.mark.parametrize("kind", ["hf", "megatron"])
@pytest.mark.parametrize(("stored", "dtype"), itertools.product(DTYPES, DTYPES))
def test_every_parameter_is_set(
    kind: str, stored: str, dtype: str, build: Build, make_hf: HFFactory, tmp_path: Path,
    reference: SimpleNamespace,
) -> None:  # fmt: skip
    hf = checkpoint = make_hf(dtype=getattr(torch, stored))
    if kind == "megatron":
        checkpoint = tmp_path / "megatron"
        import_checkpoint(hf, checkpoint)
    chunks = build(hf, params_dtype=getattr(torch, dtype))
    load_weights(chunks, open_checkpoint(checkpoint))
    expected = reference.parameters(read(hf), reference.config)
    assert_filled(chunks, expected, getattr(torch, dtype))


def test_a_head_beside_tied_embeddings_is_a_head_of_its_own(
    build: Build, make_hf: HFFactory
) -> None:
    """transformers 5 ties a head only if it is missing or equal."""
    head = torch.randn(101, 36)
    hf = make_hf(tie_word_embeddings=True, change=lambda t: t.update({"lm_head.weight": head}))
    chunks = build(hf, share_embeddings_and_output_weights=False)
    load_weights(chunks, open_checkpoint(hf))
    parameters = dict(chunks[0].named_parameters())
    assert torch.equal(parameters["output_layer.weight"], head)
    with pytest.raises(MappingError, match="True in the model, the checkpoint asks for False"):
        load_weights(build(hf), open_checkpoint(hf))


def test_from_several_files(
    build: Build, tiny_hf: Path, tiny_megatron: Path, reference: SimpleNamespace
) -> None:
    assert len(list(tiny_hf.glob("*.safetensors"))) > 1
    expected = reference.parameters(read(tiny_hf), Olmo2Bridge.sizes["olmo2-tiny"])
    for checkpoint in (tiny_hf, tiny_megatron):
        chunks = build(tiny_hf)
        load_weights(chunks, open_checkpoint(checkpoint))
        assert_filled(chunks, expected, torch.bfloat16)


def test_from_a_web_server(build: Build, tiny_hf: Path, reference: SimpleNamespace) -> None:
    expected = reference.parameters(read(tiny_hf), Olmo2Bridge.sizes["olmo2-tiny"])
    chunks = build(tiny_hf)
    with serving(tiny_hf) as site:
        load_weights(chunks, open_checkpoint(site.url))
    assert_filled(chunks, expected, torch.bfloat16)


def test_a_model_that_is_wrapped_for_training(
    build: Build, make_hf: HFFactory, reference: SimpleNamespace
) -> None:
    hf = make_hf()
    chunks = build(hf, wrap_with_ddp=True)
    load_weights(chunks, open_checkpoint(hf))
    assert_filled(chunks, reference.parameters(read(hf), reference.config), torch.float32)


@pytest.mark.parametrize("imported_with", [None, 1, 64, 128])
def test_rows_that_pad_the_vocabulary_are_zeros(
    imported_with: int | None, build: Build, make_hf: HFFactory, tmp_path: Path,
    reference: SimpleNamespace,
) -> None:  # fmt: skip
    hf = checkpoint = make_hf()
    if imported_with is not None:  # to as many rows, to fewer, to as many as the vocabulary has
        checkpoint = tmp_path / "megatron"
        import_checkpoint(hf, checkpoint, ImportOptions(make_vocab_size_divisible_by=imported_with))
    chunks = build(hf, make_vocab_size_divisible_by=128)
    load_weights(chunks, open_checkpoint(checkpoint))
    expected = reference.parameters(read(hf), reference.config)
    for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        expected[name] = torch.cat([expected[name], torch.zeros(27, 36)])
    assert_filled(chunks, expected, torch.float32)


def test_a_tied_model(build: Build, make_hf: HFFactory, reference: SimpleNamespace) -> None:
    tied = {"tie_word_embeddings": True}
    hf = make_hf(**tied)
    chunks = build(hf)
    load_weights(chunks, open_checkpoint(hf))
    expected = reference.parameters(read(hf), reference.config | tied)
    assert "output_layer.weight" not in expected
    assert_filled(chunks, expected, torch.float32)


def test_the_bytes_read_are_told_and_returned(build: Build, make_hf: HFFactory) -> None:
    hf = make_hf()
    chunks, told = build(hf, make_vocab_size_divisible_by=128), Told()
    done = load_weights(chunks, open_checkpoint(hf), told)
    size = sum(tensor.nbytes for tensor in read(hf).values())
    assert done == size
    padding = 2 * 27 * 36 * 4  # counted beforehand, but in no file
    assert told.calls[0] == ("begin", "loading", size + padding)
    assert told.calls[-1] == ("end",)
    assert sum(call[1] for call in told.calls[1:-1]) == size


def test_the_files_are_not_written_to(build: Build, make_hf: HFFactory) -> None:
    hf = make_hf()
    before = (hf / "model.safetensors").read_bytes()
    chunks = build(hf)
    load_weights(chunks, open_checkpoint(hf))
    with torch.no_grad():
        for parameter in chunks[0].parameters():
            parameter.zero_()
    assert (hf / "model.safetensors").read_bytes() == before


# --------------------------------------------------------------------------------- what cannot be


def test_another_models_checkpoint_is_refused_by_name(build: Build, make_hf: HFFactory) -> None:
    chunks = build(make_hf())
    with pytest.raises(MappingError) as caught:
        load_weights(chunks, open_checkpoint(make_hf("other", intermediate_size=60)))
    assert str(caught.value) == (
        "decoder.layers.0.mlp.linear_fc1.weight has shape [100, 36] in the model, the config asks "
        "for [120, 36]"
    )
    assert all(parameter.isnan().all() for parameter in chunks[0].parameters())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        # The model would be the first three layers of another.
        ({"num_hidden_layers": 4}, "num_layers is 3 in the model, the config asks for 4"),
        # Every tensor has the same shape.
        ({"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 12},
         "num_attention_heads is 6 in the model, the config asks for 3"),
        ({"rms_norm_eps": 1e-5},
         "layernorm_epsilon is 1e-06 in the model, the config asks for 1e-05"),
    ],
)  # fmt: skip
def test_another_models_checkpoint_is_refused_where_the_shapes_agree(
    changes: dict[str, Any], message: str, build: Build, make_hf: HFFactory
) -> None:
    chunks = build(make_hf())
    with pytest.raises(MappingError) as caught:
        load_weights(chunks, open_checkpoint(make_hf("other", **changes)))
    assert str(caught.value) == message
    assert all(parameter.isnan().all() for parameter in chunks[0].parameters())


def opened(kind: str, make_hf: HFFactory, folder: Path) -> tuple[Path, Checkpoint, Path]:
    """A Hugging Face folder; itself or its import, opened; and the largest file of what is open."""
    hf = checkpoint = make_hf()
    if kind == "megatron":
        checkpoint = folder / "megatron"
        import_checkpoint(hf, checkpoint)
    source = open_checkpoint(checkpoint)
    return hf, source, max(source.path.iterdir(), key=lambda f: f.stat().st_size)


@pytest.mark.parametrize("kind", ["hf", "megatron"])
def test_a_file_that_was_cut_off_since_it_was_opened(
    kind: str, build: Build, make_hf: HFFactory, tmp_path: Path
) -> None:
    hf, source, file = opened(kind, make_hf, tmp_path)
    with file.open("r+b") as handle:
        handle.truncate(9000)
    with pytest.raises(FormatError) as caught:
        load_weights(build(hf), source)
    assert str(caught.value) == f"{file}: truncated at byte 9000"


@pytest.mark.parametrize("kind", ["hf", "megatron"])
def test_a_file_that_is_cut_off_while_it_is_read(
    kind: str, build: Build, make_hf: HFFactory, tmp_path: Path
) -> None:
    """An error: mapped into memory, the file would end the process with SIGBUS."""
    hf, source, file = opened(kind, make_hf, tmp_path)

    class Truncating(Reporter):
        def advance(self, done: int) -> None:
            os.truncate(file, 9000)

    with pytest.raises(FormatError, match=f"{file.name}: truncated at byte 9000"):
        load_weights(build(hf), source, Truncating())


def test_a_file_that_is_written_to_while_it_is_read(build: Build, make_hf: HFFactory) -> None:
    hf = make_hf()

    class Writing(Reporter):
        def advance(self, done: int) -> None:
            file = hf / "model.safetensors"
            with file.open("r+b") as handle:
                handle.seek(-1, os.SEEK_END)
                handle.write(b"x")

    with pytest.raises(InputError, match=r"model.safetensors: changed while"):
        load_weights(build(hf), open_checkpoint(hf), Writing())


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_a_value_that_is_too_large_for_float16_is_refused(
    stored: torch.dtype, build: Build, make_hf: HFFactory
) -> None:
    def enlarge(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.up_proj.weight"][7, 5] = -70000.0

    hf = make_hf(dtype=stored, change=enlarge)
    with pytest.raises(InputError) as caught:
        load_weights(build(hf, params_dtype=torch.float16), open_checkpoint(hf))
    assert str(caught.value) == (
        f"{hf / 'model.safetensors'}: values of decoder.layers.1.mlp.linear_fc1.weight are too "
        "large for float16 and would become infinite. Use bfloat16 or float32."
    )
    load_weights(build(hf, params_dtype=torch.bfloat16), open_checkpoint(hf))


def test_a_value_that_was_infinite_before_is_taken_as_it_is(
    build: Build, make_hf: HFFactory
) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.norm.weight"][:2] = torch.tensor([torch.inf, torch.nan])

    hf = make_hf(change=spoil)
    chunks = build(hf, params_dtype=torch.float16)
    load_weights(chunks, open_checkpoint(hf))
    loaded = dict(chunks[0].named_parameters())["module.decoder.final_layernorm.weight"]
    assert loaded[0] == torch.inf
    assert loaded[1].isnan()
    assert loaded[2:].isfinite().all()
