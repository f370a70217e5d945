"""One fingerprint for a model in every format, and another for every change of its weights."""

import json
import os
import random
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_olmo_bridge.checkpoints.checkpoint import ReadOptions
from megatron_olmo_bridge.checkpoints.open import open_checkpoint
from megatron_olmo_bridge.convert.average import average_checkpoints
from megatron_olmo_bridge.convert.options import ExportOptions, ImportOptions
from megatron_olmo_bridge.convert.to_hf import export_checkpoint
from megatron_olmo_bridge.convert.to_megatron import import_checkpoint
from megatron_olmo_bridge.errors import MappingError, OutputError
from megatron_olmo_bridge.storage.fingerprint import hash_tensors, read_leaves, root_of
from megatron_olmo_bridge.tools.fingerprint import check_leaves_file, fingerprint, write_leaves
from megatron_olmo_bridge.tools.synth import synth

HF = Callable[..., Path]
Tensors = dict[str, torch.Tensor]
EXAMPLE = Path(__file__).parents[3] / "examples" / "fingerprint.py"


def root(path: Path, **options: Any) -> str:
    return fingerprint(path, ReadOptions(**options)).root


def by_example(folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The fingerprint that the example computes, with nothing of this package."""
    runpy.run_path(str(EXAMPLE))["main"](folder)
    return capsys.readouterr().out.strip()


# ---------------------------------------------------------------------- the same in every format


@pytest.mark.parametrize(
    "name",
    ["olmo-tiny", "olmo2-tiny", "olmo3-tiny", "olmoe-tiny", "flex-olmo-tiny", "gpt2-tiny"],
)
def test_every_family_in_every_format(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hf = synth(name, tmp_path / "hf", dtype="float32")
    shards = synth(name, tmp_path / "shards", dtype="float32", max_shard_size="200KB")
    assert len(list(shards.glob("*.safetensors"))) >= 7
    import_checkpoint(hf, tmp_path / "megatron", ImportOptions(make_vocab_size_divisible_by=1000))
    export_checkpoint(tmp_path / "megatron", tmp_path / "back")

    expected = by_example(hf, capsys)

    found = {p.name: root(p) for p in tmp_path.iterdir()}
    if name in ("olmo2-tiny", "olmo3-tiny", "olmoe-tiny"):  # OLMo-core has no such other model
        export_checkpoint(hf, tmp_path / "step0", ExportOptions(to="olmo-core"))
        found["step0"] = root(tmp_path / "step0")
    assert found == dict.fromkeys(found, expected)


def test_the_example_has_at_most_50_lines_and_imports_the_standard_library_alone() -> None:
    lines = EXAMPLE.read_text().splitlines()
    assert len(lines) <= 50
    assert [line.split()[1] for line in lines if line.startswith(("import ", "from "))] == [
        "hashlib", "json", "sys", "pathlib",
    ]  # fmt: skip


@pytest.mark.parametrize("seed", range(3))
def test_chunks_cut_anywhere(
    make_hf: HF, save_torch_dist: Callable[..., Path], reference: Any, seed: int
) -> None:
    hf = make_hf()
    tensors = load_file(hf / "model.safetensors")
    parameters = reference.stacked(
        reference.parameters(tensors, reference.config), reference.config
    )
    megatron = save_torch_dist("m", parameters, seed=seed)
    assert root(megatron, hf_config=hf) == root(hf)


def test_a_tied_head_counts_only_if_it_is_one_of_its_own(
    make_hf: HF, capsys: pytest.CaptureFixture[str]
) -> None:
    def head(change: float) -> Callable[[Tensors], object]:
        return lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + change})

    tied = make_hf("tied", tie_word_embeddings=True)
    stored = make_hf("stored", tie_word_embeddings=True, change=head(0))
    other = make_hf("other", tie_word_embeddings=True, change=head(1))
    untied = make_hf("untied", change=head(1))
    equal = make_hf("equal", change=head(0))
    assert root(tied) == root(stored) != root(other) == root(untied)
    assert root(equal) not in (root(tied), root(other))
    for folder in (tied, stored, other, untied, equal):
        assert by_example(folder, capsys) == root(folder)


def test_buffers_are_not_part_of_it(make_hf: HF, capsys: pytest.CaptureFixture[str]) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    plain = make_hf("a")
    with_buffer = make_hf("b", change=lambda t: t.update({name: torch.zeros(2)}))
    assert root(plain) == root(with_buffer) == by_example(with_buffer, capsys)


def test_config_and_tokenizer_are_not_part_of_it(make_hf: HF) -> None:
    other = make_hf("b", rope_theta=10000)
    (other / "tokenizer.json").write_text("{}")
    assert root(make_hf("a")) == root(other)


def test_an_average_has_the_fingerprint_of_what_was_written(make_hf: HF, tmp_path: Path) -> None:
    a, b = make_hf("a", seed=1), make_hf("b", seed=2)
    average_checkpoints([a, b], tmp_path / "mean")
    tensors = [load_file(folder / "model.safetensors") for folder in (a, b)]
    mean = {n: (tensors[0][n].double() + tensors[1][n]).div(2).float() for n in tensors[0]}
    by_hand = make_hf("by-hand", change=lambda t: t.update(mean))
    assert root(tmp_path / "mean") == root(by_hand)
    assert root(tmp_path / "mean") not in (root(a), root(b))


def test_a_model_whose_tensors_are_not_those_of_its_config_has_none(make_hf: HF) -> None:
    with pytest.raises(MappingError, match="extra"):
        root(make_hf(change=lambda t: t.update({"extra": torch.zeros(2)})))


# ------------------------------------------------------------------------ another for every change


def test_a_thousand_changed_bytes_give_a_thousand_other_fingerprints(make_hf: HF) -> None:
    """The first and the last byte of every tensor are among them."""
    views = list(open_checkpoint(make_hf()).tensors.values())
    ends = {(i, at) for i, view in enumerate(views) for at in (0, view.nbytes - 1)}
    others = [(i, at) for i, view in enumerate(views) for at in range(1, view.nbytes - 1)]
    rng = random.Random(0)
    places = [*ends, *rng.sample(others, 1000 - len(ends))]
    roots = {before := root_of(hash_tensors(views))}
    for number, at in places:
        (piece,) = views[number].pieces
        assert piece.array is not None
        with piece.array.file.open("r+b", buffering=0) as file:
            value = os.pread(file.fileno(), 1, piece.array.offset + at)[0]
            changed = bytes([value ^ rng.randrange(1, 256)])
            os.pwrite(file.fileno(), changed, piece.array.offset + at)
            roots.add(root_of(hash_tensors(views, workers=1)))
            os.pwrite(file.fileno(), bytes([value]), piece.array.offset + at)
    assert root_of(hash_tensors(views)) == before
    assert len(roots) == 1001


def test_exchanged_tensors_and_another_dtype(make_hf: HF) -> None:
    def exchange(tensors: Tensors) -> None:
        names = [f"model.layers.{i}.mlp.up_proj.weight" for i in (0, 1)]
        tensors[names[0]], tensors[names[1]] = tensors[names[1]], tensors[names[0]]

    whole = make_hf("a", change=lambda t: [x.copy_(x.bfloat16()) for x in t.values()])
    exchanged = make_hf("b", change=exchange)
    cast = make_hf("c", dtype=torch.bfloat16)
    assert len({root(whole), root(make_hf("d")), root(exchanged), root(cast)}) == 4


# ------------------------------------------------------------------------------- files of leaves


def test_leaves_are_the_same_for_every_format(
    tiny_hf: Path, tiny_megatron: Path, tmp_path: Path
) -> None:
    for name, path in (("a", tiny_hf), ("b", tiny_megatron)):
        write_leaves(tmp_path / name, fingerprint(path))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert root_of(read_leaves(tmp_path / "a")) == root(tiny_hf)
    assert json.loads((tmp_path / "a").read_text())["fingerprint"] == root(tiny_hf)


def test_no_file_is_replaced_by_leaves(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(OutputError, match="exists already"):
        check_leaves_file(tmp_path / "config.json")
    with pytest.raises(OutputError, match="no such folder"):
        check_leaves_file(tmp_path / "absent" / "leaves.json")
    check_leaves_file(tmp_path / "leaves.json")
    check_leaves_file(None)


def test_leaves_that_cannot_be_written(tiny_hf: Path, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="can't be written"):
        write_leaves(tmp_path / "absent" / "leaves.json", fingerprint(tiny_hf))
