"""The fingerprint: which bytes are hashed and how, and files with the hashes of all blocks."""

import hashlib
import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from megatron_olmo_bridge.errors import FormatError
from megatron_olmo_bridge.formats.tensors import (
    ITEM_SIZE,
    MeanView,
    MixedView,
    Piece,
    StoredArray,
    TensorView,
)
from megatron_olmo_bridge.mapping.placement import Region
from megatron_olmo_bridge.storage import fingerprint
from megatron_olmo_bridge.storage.fingerprint import (
    HashedTensor,
    encode_leaves,
    hash_tensors,
    is_fingerprint,
    read_leaves,
    root_of,
    tree_hash,
)
from megatron_olmo_bridge.storage.progress import Reporter

Store = Callable[..., TensorView]


def sha256(*parts: bytes) -> bytes:
    return hashlib.sha256(b"".join(parts)).digest()


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Writes a tensor into a file of its own, as bytes that count upwards."""

    def write(name: str, shape: tuple[int, ...], dtype: str = "float32") -> TensorView:
        file = tmp_path / name.replace("/", "_")
        file.write_bytes(bytes(i % 251 for i in range(math.prod(shape) * ITEM_SIZE[dtype])))
        return TensorView.of_array(name, StoredArray(file, 0, shape, dtype))

    return write


# ------------------------------------------------------------------------------- the specification

RFC_6962_INPUTS = ("", "00", "10", "2021", "3031", "40414243", "5051525354555657",
                   "606162636465666768696a6b6c6d6e6f")  # fmt: skip
RFC_6962_ROOTS = (
    "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
    "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
    "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
    "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
)
"""Roots of the trees over the first inputs: test vectors of Certificate Transparency."""


def test_the_tree_is_that_of_certificate_transparency() -> None:
    leaves = [sha256(b"\0", bytes.fromhex(text)) for text in RFC_6962_INPUTS]
    roots = tuple(tree_hash(leaves[:count]).hex() for count in range(1, 9))
    assert roots == RFC_6962_ROOTS
    assert tree_hash([]) == sha256()


def test_a_model_of_two_tensors_by_hand(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks are bytes of the row-major stream, wherever rows end; tensors are sorted by name."""
    monkeypatch.setattr(fingerprint, "BLOCK_BYTES", 16)
    matrix, vector = store("model.b", (3, 3)), store("model.a", (5,), "bfloat16")

    root = root_of(hash_tensors([matrix, vector]))

    data = [bytes(range(36)), bytes(range(10))]
    leaves = [sha256(b"\0", data[0][at : at + 16]) for at in (0, 16, 32)]
    left = sha256(b"\1", leaves[0], leaves[1])
    b = sha256(b"\2", sha256(b"\1", left, leaves[2]), b"float32 3,3 model.b")
    a = sha256(b"\2", sha256(b"\0", data[1]), b"bfloat16 5 model.a")
    assert root == sha256(b"\1", a, b).hex()
    assert is_fingerprint(root)


def test_scalars_and_empty_tensors(store: Store) -> None:
    scalar, empty = hash_tensors([store("s", ()), store("e", (0, 7))])
    assert scalar.hash == sha256(b"\2", sha256(b"\0", bytes(range(4))), b"float32  s")
    assert empty.blocks == ()
    assert empty.hash == sha256(b"\2", sha256(), b"float32 0,7 e")


def test_names_are_sorted_as_bytes() -> None:
    """In UTF-16, which some languages sort by, the second would come first."""
    names = ["\N{HALFWIDTH KATAKANA LETTER A}", "\N{GRINNING FACE}"]
    tensors = [HashedTensor(name, (0,), "float32", ()) for name in names]
    expected = sha256(b"\1", *(tensor.hash for tensor in tensors)).hex()
    assert root_of(tensors) == root_of(reversed(tensors)) == expected


def test_name_dtype_and_shape_are_part_of_it(store: Store) -> None:
    """All of these have the same bytes."""
    views = [store(name, shape, dtype) for name, shape, dtype in (
        ("a", (2, 6), "bfloat16"), ("b", (2, 6), "bfloat16"), ("a", (6, 2), "bfloat16"),
        ("a", (12,), "bfloat16"), ("a", (2, 6), "float16"), ("a", (2, 3), "float32"),
    )]  # fmt: skip
    assert len({root_of(hash_tensors([view])) for view in views}) == len(views)
    one, two = store("c", (4,)), store("d", (4,))
    assert root_of(hash_tensors([one])) != root_of(hash_tensors([one, two]))


# -------------------------------------------------------------- how the bytes are stored is not


def pieces(view: TensorView) -> Iterable[tuple[str, TensorView]]:
    """Return the same tensor stored otherwise: by halves of its rows or columns, or transposed."""
    rows, columns = view.shape
    (whole,) = view.pieces
    assert whole.array is not None
    data = whole.array.file.read_bytes()
    item = len(data) // rows // columns
    cells = [data[at : at + item] for at in range(0, len(data), item)]
    for how, regions in (
        ("rows", [Region(0, 2, 0, columns), Region(2, rows, 0, columns)]),
        ("columns", [Region(0, rows, 0, 3), Region(0, rows, 3, columns)]),
        ("transposed", [Region(0, rows, 0, columns)]),
    ):
        parts = []
        for region in regions:
            file = whole.array.file.with_name(f"{how}-{region.top}-{region.left}")
            shape = region.bottom - region.top, region.right - region.left
            places = [(r, c) for r in range(region.top, region.bottom)
                      for c in range(region.left, region.right)]  # fmt: skip
            if how == "transposed":
                shape, places = shape[::-1], sorted(places, key=lambda place: place[::-1])
            file.write_bytes(b"".join(cells[r * columns + c] for r, c in places))
            array = StoredArray(file, 0, shape, view.dtype)
            parts.append(Piece(array, Region.whole(shape), region, how == "transposed"))
        yield how, TensorView.assembled(view.name, view.shape, parts)


@pytest.mark.parametrize("block", [4, 12, 20, 64, 1 << 20])
def test_pieces_and_block_size_in_any_relation(
    store: Store, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr(fingerprint, "BLOCK_BYTES", block)
    monkeypatch.setattr(fingerprint, "SPAN", 2)
    whole = store("w", (7, 5))
    data = bytes(range(140))
    (expected,) = hash_tensors([whole])
    leaves = tuple(sha256(b"\0", data[at : at + block]) for at in range(0, 140, block))
    assert expected.blocks == leaves
    for how, view in pieces(whole):
        for workers in (1, 3):
            assert hash_tensors([view], workers) == [expected], how


def test_computed_tensors_are_hashed_as_they_are_read(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    halves = torch.tensor([[1.5], [2.25]])
    (tmp_path / "f").write_bytes(halves[:1].numpy().tobytes() + b"\x10\x40")  # 2.25 as bfloat16
    row = Region(0, 1, 0, 1)
    stored = [StoredArray(tmp_path / "f", 0, (1, 1), "float32"),
              StoredArray(tmp_path / "f", 4, (1, 1), "bfloat16")]  # fmt: skip
    mixed = MixedView("w", (2, 1), "float32", (
        Piece(stored[0], row, Region(0, 1, 0, 1)), Piece(stored[1], row, Region(1, 2, 0, 1)),
    ))  # fmt: skip
    mean = MeanView.of([(1.0, mixed), (3.0, mixed)], "float32")
    leaf = sha256(b"\0", halves.numpy().tobytes())
    assert [t.blocks for t in hash_tensors([mixed])] == [(leaf,)]
    assert [t.blocks for t in hash_tensors([mean])] == [(leaf,)]


def test_progress_counts_every_byte(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprint, "BLOCK_BYTES", 16)
    seen: list[int] = []

    class Counting(Reporter):
        def advance(self, done: int) -> None:
            seen.append(done)

    hash_tensors([store("a", (9,)), store("b", (3,))], reporter=Counting())
    assert sorted(seen) == [4, 12, 16, 16]


# --------------------------------------------------------------------------------- files of leaves


@pytest.fixture
def leaves(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(fingerprint, "BLOCK_BYTES", 16)
    hashed = hash_tensors([store("b", (3, 3)), store("a", (4,)), store("empty", (0,))])
    (tmp_path / "leaves.json").write_bytes(encode_leaves(hashed))
    return tmp_path / "leaves.json"


def test_leaves_are_read_as_they_were_written(leaves: Path) -> None:
    tensors = read_leaves(leaves)
    assert [(t.name, t.shape, t.dtype, len(t.blocks)) for t in tensors] == [
        ("a", (4,), "float32", 1), ("b", (3, 3), "float32", 3), ("empty", (0,), "float32", 0),
    ]  # fmt: skip
    written = json.loads(leaves.read_text())
    assert written["fingerprint"] == root_of(tensors)
    assert (written["version"], written["block_bytes"]) == (1, 16)
    assert encode_leaves(tensors) == leaves.read_bytes()


def test_the_block_size_is_a_power_of_two_and_part_of_the_specification() -> None:
    assert fingerprint.BLOCK_BYTES == 4 * 1024 * 1024


WRONG: dict[str, Callable[[dict[str, Any]], object]] = {
    "another version": lambda v: v.update(version=2),
    "another block size": lambda v: v.update(block_bytes=32),
    "no tensors": lambda v: v.pop("tensors"),
    "a list of tensors": lambda v: v.update(tensors=[]),
    "a tensor that is no object": lambda v: v["tensors"].update(a=3),
    "no dtype": lambda v: v["tensors"]["a"].pop("dtype"),
    "an unknown dtype": lambda v: v["tensors"]["a"].update(dtype="float8"),
    "a dtype that is a list": lambda v: v["tensors"]["a"].update(dtype=[]),
    "a negative shape": lambda v: v["tensors"]["a"].update(shape=[-4]),
    "a shape that is true": lambda v: v["tensors"]["a"].update(shape=[True]),
    "an enormous shape": lambda v: v["tensors"]["a"].update(shape=[1 << 62] * 64),
    "a fractional shape": lambda v: v["tensors"]["a"].update(shape=[4.0]),
    "a missing block": lambda v: v["tensors"]["b"]["blocks"].pop(),
    "a block too many": lambda v: v["tensors"]["a"]["blocks"].append("0" * 64),
    "a short hash": lambda v: v["tensors"]["a"].update(blocks=["00"]),
    "a hash in capitals": lambda v: v["tensors"]["a"].update(blocks=["A" * 64]),
    "a hash that is a number": lambda v: v["tensors"]["a"].update(blocks=[5]),
    "another hash": lambda v: v["tensors"]["a"].update(blocks=["0" * 64]),
    "another fingerprint": lambda v: v.update(fingerprint="0" * 64),
    "a fingerprint that is a list": lambda v: v.update(fingerprint=[]),
    "another name": lambda v: v["tensors"].update(c=v["tensors"].pop("a")),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_invalid_leaves_are_refused_in_one_sentence(leaves: Path, wrong: str) -> None:
    value = json.loads(leaves.read_text())
    WRONG[wrong](value)
    leaves.write_text(json.dumps(value))
    with pytest.raises(FormatError) as caught:
        read_leaves(leaves)
    assert str(caught.value).startswith(f"{leaves}: ")
    assert "\n" not in str(caught.value)


def test_leaves_larger_than_the_limit_are_neither_read_nor_written(
    leaves: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = read_leaves(leaves)
    monkeypatch.setattr(fingerprint, "LEAVES_LIMIT", leaves.stat().st_size - 1)
    with pytest.raises(FormatError, match="is read up to"):
        read_leaves(leaves)
    with pytest.raises(FormatError, match="the limit is"):
        encode_leaves(tensors)
