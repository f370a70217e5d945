"""Weights are checked against a fingerprint or its leaves, all of them or a random sample."""

import math
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_olmo_bridge.checkpoints.checkpoint import ReadOptions
from megatron_olmo_bridge.checkpoints.open import open_checkpoint
from megatron_olmo_bridge.errors import InputError
from megatron_olmo_bridge.storage import fingerprint as tree
from megatron_olmo_bridge.tools.against import (
    ExpectedWeights,
    WeightVerification,
    changed_blocks_found,
    detection_probability,
    verify_against,
)
from megatron_olmo_bridge.tools.fingerprint import fingerprint, write_leaves

HF = Callable[..., Path]
Tensors = dict[str, torch.Tensor]
NAME = "model.layers.1.mlp.up_proj.weight"


def check(path: Path, **expected: Any) -> WeightVerification:
    return verify_against(path, ExpectedWeights(**expected))


def differences(result: WeightVerification) -> list[tuple[str, str, str]]:
    return [(d.kind, d.name, d.detail) for d in result.differences]


@pytest.fixture
def leaves(tiny_hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Leaves of the tiny model in blocks of 8 KiB, so that it has many."""
    monkeypatch.setattr(tree, "BLOCK_BYTES", 8192)
    write_leaves(tmp_path / "leaves.json", fingerprint(tiny_hf))
    return tmp_path / "leaves.json"


# ---------------------------------------------------------------------------------- a fingerprint


def test_the_expected_fingerprint(tiny_hf: Path, tiny_megatron: Path) -> None:
    root = fingerprint(tiny_hf).root
    result = check(tiny_megatron, fingerprint=root)
    assert (result.equal, result.checked, result.sample) == (True, "fingerprint", None)
    assert (result.compared, result.nbytes) == (47, 2_100_992)


def test_another_fingerprint_says_both(tiny_hf: Path) -> None:
    result = check(tiny_hf, fingerprint="0" * 64)
    detail = f"is {fingerprint(tiny_hf).root}, expected {'0' * 64}"
    assert differences(result) == [("fingerprint", "weights", detail)]


def test_a_folder_that_does_not_fit_its_config_is_different(make_hf: HF) -> None:
    root = fingerprint(make_hf("a")).root
    more = make_hf("b", change=lambda t: t.update({"extra": torch.zeros(2)}))
    assert not check(more, fingerprint=root).equal


# ----------------------------------------------------------------------------------- all blocks


def test_all_blocks_of_another_format(tiny_megatron: Path, leaves: Path) -> None:
    result = check(tiny_megatron, against=leaves)
    assert (result.equal, result.checked, result.sample) == (True, "blocks", None)
    assert (result.compared, result.nbytes) == (273, 2_100_992)


def test_the_blocks_that_differ_are_named(
    make_hf: HF, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tree, "BLOCK_BYTES", 4096)

    def change(tensors: Tensors) -> None:
        flat = tensors[NAME].view(-1)  # 7,200 bytes
        flat[0] += 1
        flat[-1] += 1
        tensors["model.norm.weight"][3] += 1

    write_leaves(tmp_path / "leaves.json", fingerprint(make_hf("a")))
    assert differences(check(make_hf("b", change=change), against=tmp_path / "leaves.json")) == [
        ("values", NAME, "block 0, bytes 0 to 4,095"),
        ("values", NAME, "block 1, bytes 4,096 to 7,199"),
        ("values", "model.norm.weight", "block 0, bytes 0 to 143"),
    ]


def test_names_shapes_and_dtypes_that_differ_are_named(make_hf: HF, tmp_path: Path) -> None:
    write_leaves(tmp_path / "leaves.json", fingerprint(make_hf("a")))

    def change(tensors: Tensors) -> None:
        tensors["extra"] = torch.zeros(2)
        del tensors["model.layers.0.mlp.up_proj.weight"]
        tensors["model.norm.weight"] = torch.zeros(37)
        tensors["lm_head.weight"] = tensors["lm_head.weight"].bfloat16()

    assert set(
        differences(check(make_hf("b", change=change), against=tmp_path / "leaves.json"))
    ) == {
        ("unexpected", "model.layers.0.mlp.up_proj.weight", "only in the second"),
        ("missing", "extra", "only in the first"),
        ("shape", "model.norm.weight", "[37] and [36]"),
        ("dtype", "lm_head.weight", "bfloat16 and float32"),
    }


# ------------------------------------------------------------------------------------ a sample


def test_a_sample_is_repeated_by_its_seed(
    tiny_megatron: Path, leaves: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = []
    real = tree.hash_blocks

    def spy(blocks: list[tree.BlockOf], *rest: Any) -> list[bytes]:
        chosen.append([(b.tensor.name, b.number) for b in blocks])
        return real(blocks, *rest)

    monkeypatch.setattr("megatron_olmo_bridge.tools.against.hash_blocks", spy)
    first = check(tiny_megatron, against=leaves, sample=20)
    assert first.sample is not None
    assert (first.compared, first.sample.blocks, first.sample.total) == (20, 20, 273)
    check(tiny_megatron, against=leaves, sample=20, seed=first.sample.seed)
    check(tiny_megatron, against=leaves, sample=20, seed=first.sample.seed + 1)
    assert chosen[0] == chosen[1] != chosen[2]
    assert len(set(chosen[0])) == 20


def test_a_sample_of_all_blocks_is_not_one(tiny_hf: Path, leaves: Path) -> None:
    result = check(tiny_hf, against=leaves, sample=273)
    assert (result.compared, result.sample) == (273, None)


def test_probabilities_by_counting() -> None:
    """C(total - changed, sample) of the C(total, sample) samples have no changed block."""
    for total in range(1, 12):
        for sample in range(1, total + 1):
            for changed in range(total + 1):
                missed = math.comb(total - changed, sample) / math.comb(total, sample)
                probability = detection_probability(sample, total, changed)
                assert probability == pytest.approx(1 - missed, abs=1e-12)
    assert detection_probability(100, 773, 1) == pytest.approx(100 / 773)


@pytest.mark.parametrize(("sample", "total"), [(1, 1), (1, 50), (7, 50), (49, 50), (50, 50)])
def test_the_number_of_changed_blocks_that_is_found_is_the_smallest(
    sample: int, total: int
) -> None:
    count = changed_blocks_found(sample, total, 0.99)
    assert detection_probability(sample, total, count) >= 0.99
    assert detection_probability(sample, total, count - 1) < 0.99


@pytest.mark.parametrize(("sample", "changed"), [(28, 1), (28, 5), (130, 1)])
def test_samples_find_changes_as_often_as_stated(
    tiny_hf: Path, leaves: Path, tmp_path: Path, sample: int, changed: int
) -> None:
    """Of 200 samples, so many find a difference as a binomial distribution of the stated
    probability allows: within three standard deviations."""
    folder = shutil.copytree(tiny_hf, tmp_path / "changed")
    tensors = open_checkpoint(folder).tensors.values()
    blocks = [block for view in tensors for block in tree.blocks_of(view)]
    for block in random.Random(7).sample(blocks, changed):
        (piece,) = block.tensor.stored[0].pieces
        assert piece.array is not None
        with piece.array.file.open("r+b") as file:
            file.seek(piece.array.offset + block.begin)
            file.write(bytes(8))
    runs = 200
    results = [check(folder, against=leaves, sample=sample, seed=seed) for seed in range(runs)]

    found = sum(not result.equal for result in results)

    stated = detection_probability(sample, len(blocks), changed)
    one = results[0].sample
    assert one is not None and one.finds_one_changed == pytest.approx(sample / len(blocks))
    if changed >= one.changed_for_99_percent:
        assert stated >= 0.99
    assert abs(found - runs * stated) <= 3 * math.sqrt(runs * stated * (1 - stated))


# ------------------------------------------------------------------------------------- arguments


def test_a_trusted_fingerprint_with_leaves_from_anywhere(tiny_hf: Path, leaves: Path) -> None:
    root = fingerprint(tiny_hf).root
    assert check(tiny_hf, against=leaves, sample=3, fingerprint=root).equal
    with pytest.raises(InputError, match=f"are leaves of {root}, not of {'0' * 64}"):
        check(tiny_hf, against=leaves, sample=3, fingerprint="0" * 64)


@pytest.mark.parametrize(
    ("expected", "message"),
    [
        ({"fingerprint": "abc"}, "--fingerprint 'abc': is not 64 digits of 0-9 and a-f"),
        ({"fingerprint": "A" * 64}, "is not 64 digits"),
        ({"sample": 3}, "--sample needs --against FILE"),
        ({"sample": 3, "fingerprint": "0" * 64}, "--sample needs --against FILE"),
        ({"seed": 3, "against": "leaves.json"}, "--seed needs --sample N"),
        ({"sample": 0, "against": "leaves.json"}, "--sample 0: check at least one block"),
        ({}, "nothing to compare with"),
    ],
)
def test_expectations_that_contradict_themselves(expected: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        check(Path("absent"), **expected)


def test_a_checkpoint_that_changes_meanwhile(
    tiny_hf: Path, leaves: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(tiny_hf, tmp_path / "hf")
    real = tree.hash_blocks

    def touching(*arguments: Any) -> list[bytes]:
        next(folder.glob("*.safetensors")).touch()
        return real(*arguments)

    monkeypatch.setattr("megatron_olmo_bridge.tools.against.hash_blocks", touching)
    with pytest.raises(InputError, match="changed while the checkpoint was read"):
        check(folder, against=leaves)


def test_options_that_the_checkpoint_does_not_record(
    make_hf: HF, save_torch_dist: Callable[..., Path], reference: Any
) -> None:
    hf = make_hf()
    tensors = reference.state_dict(reference.config, torch.float32, 0)
    parameters = reference.parameters(tensors, reference.config)
    megatron = save_torch_dist("m", reference.stacked(parameters, reference.config))
    expected = ExpectedWeights(fingerprint=fingerprint(hf).root)
    assert verify_against(megatron, expected, ReadOptions(hf_config=hf)).equal
