"""Plans: files packed to a limit, and a digest that tells one plan from another."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_olmo_bridge.formats.tensors import Piece, StoredArray, TensorView
from megatron_olmo_bridge.mapping.placement import Region
from megatron_olmo_bridge.storage.plan import (
    CopyPlan,
    Literal,
    OutputFile,
    Packer,
    Payload,
)


def view(elements: int, name: str = "t", folder: str = "/a") -> TensorView:
    return TensorView.of_array(name, StoredArray(Path(folder) / "s", 8, (elements,), "bfloat16"))


def plan(folder: str = "/a") -> CopyPlan:
    file = OutputFile("f", 12, (Literal(0, b"head"), Payload(4, view(4, folder=folder), "float16")))
    return CopyPlan("import", Path(folder), (file,), {"t.json": b"{}"}, "iter_0000000")


def pack(packer: Packer, sizes: list[int]) -> list[tuple[str, int, int]]:
    return [packer.add(b"<<", view(size), "bfloat16", b">>>") for size in sizes]


def test_parts_stand_one_after_the_other_aligned() -> None:
    packer = Packer("file{}".format, 1000, 64)
    assert pack(packer, [10, 40, 1]) == [("file0", 0, 25), ("file0", 64, 85), ("file0", 192, 7)]
    (file,) = packer.files()
    assert (file.name, file.size) == ("file0", 199)
    assert [(type(p).__name__, p.offset) for p in file.parts] == [
        ("Literal", 0), ("Payload", 2), ("Literal", 22),
        ("Literal", 64), ("Payload", 66), ("Literal", 146),
        ("Literal", 192), ("Payload", 194), ("Literal", 196),
    ]  # fmt: skip


def test_a_new_file_begins_where_the_limit_would_be_passed() -> None:
    packer = Packer("file{}".format, 128, 64)
    # 25 and, from 64 on, exactly up to 128; then one more; then one larger than any file.
    at = pack(packer, [10, 29 + 1, 1, 500, 1])
    assert at == [
        ("file0", 0, 25),
        ("file1", 0, 65),
        ("file2", 0, 7),
        ("file3", 0, 1005),
        ("file4", 0, 7),
    ]
    exact = Packer("file{}".format, 129, 64)
    assert [name for name, _, _ in pack(exact, [10, 30])] == ["file0", "file0"]
    assert [f.size for f in packer.files()] == [25, 65, 7, 1005, 7]


def test_a_dtype_change_is_reckoned_with() -> None:
    packer = Packer("file{}".format, 1000, 1)
    assert packer.add(b"", view(10), "float32", b"") == ("file0", 0, 40)
    assert packer.add(b"x", None, "", b"") == ("file0", 40, 1)


def test_nothing_packed_is_no_file() -> None:
    assert Packer("file{}".format, 10, 1).files() == ()


def test_bytes_of_a_plan() -> None:
    made = plan()
    assert made.source_bytes == 8
    assert made.output_bytes == 12 + 2
    assert made.source_files == [Path("/a/s")]


def test_the_digest_is_of_the_plan_and_not_of_its_folders() -> None:
    assert plan().digest == plan().digest == plan("/elsewhere").digest


def with_view(change: Callable[[TensorView], TensorView]) -> Callable[[CopyPlan], CopyPlan]:
    def changed(old: CopyPlan) -> CopyPlan:
        head, payload = old.files[0].parts
        assert isinstance(payload, Payload)
        payload = replace(payload, view=change(payload.view))
        return replace(old, files=(replace(old.files[0], parts=(head, payload)),))

    return changed


def other_array(**changes: object) -> Callable[[CopyPlan], CopyPlan]:
    def change(old: TensorView) -> TensorView:
        piece = old.pieces[0]
        assert piece.array is not None
        return replace(old, pieces=(replace(piece, array=replace(piece.array, **changes)),))

    return with_view(change)


BLOCK = Region(0, 4, 0, 1)
CHANGES: dict[str, Callable[[CopyPlan], CopyPlan]] = {
    "operation": lambda p: replace(p, operation="export"),
    "a file's name": lambda p: replace(p, files=(replace(p.files[0], name="g"),)),
    "a file's size": lambda p: replace(p, files=(replace(p.files[0], size=13),)),
    "a header": lambda p: replace(
        p, files=(replace(p.files[0], parts=(Literal(0, b"hxad"), p.files[0].parts[1])),)
    ),
    "a text": lambda p: replace(p, texts={"t.json": b"{ }"}),
    "a text's name": lambda p: replace(p, texts={"u.json": b"{}"}),
    "a source offset": other_array(offset=10),
    "a source file": other_array(file=Path("/a/other")),
    "a source shape": other_array(shape=(5,)),
    "a dtype": with_view(lambda v: replace(v, dtype="float16")),
    "zeros": with_view(lambda v: replace(v, pieces=(Piece.zeros(BLOCK),))),
    "a block": with_view(
        lambda v: replace(v, pieces=(replace(v.pieces[0], array_region=Region(1, 5, 0, 1)),))
    ),
}


@pytest.mark.parametrize("what", CHANGES)
def test_the_digest_changes_with(what: str) -> None:
    assert CHANGES[what](plan()).digest != plan().digest
