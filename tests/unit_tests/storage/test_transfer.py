"""Copying: every way gives the same bytes, falls back where the kernel says so, never loops."""

import errno
import itertools
import os
import random
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megatron_olmo_bridge.errors import FormatError, InputError
from megatron_olmo_bridge.formats.tensors import Piece, StoredArray, TensorView
from megatron_olmo_bridge.mapping.placement import Region
from megatron_olmo_bridge.storage import runs
from megatron_olmo_bridge.storage import transfer as module
from megatron_olmo_bridge.storage.transfer import (
    CopyMethod,
    Interrupted,
    Transfer,
    copy_methods,
    write_all,
)

METHODS = {m.__name__.strip("_"): m for m in copy_methods()}
DTYPES = ("float32", "bfloat16", "float16")


def store(file: Path, tensor: torch.Tensor, offset: int = 0) -> StoredArray:
    """Put a tensor into a file, behind ``offset`` other bytes."""
    data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    file.write_bytes(os.urandom(offset) + data)
    dtype = str(tensor.dtype).removeprefix("torch.")
    return StoredArray(file, offset, tuple(tensor.shape), dtype)


def cut(tensor: torch.Tensor, folder: Path, seed: int) -> TensorView:
    """The tensor in blocks of rows and columns, each in an array of its own with a margin."""
    rng = random.Random(seed)
    rows, columns = tensor.shape
    pieces = []
    tops = [0, *sorted(rng.sample(range(1, rows), 3)), rows]
    lefts = [0, *sorted(rng.sample(range(1, columns), 2)), columns]
    for top, bottom in itertools.pairwise(tops):
        for left, right in itertools.pairwise(lefts):
            block = tensor[top:bottom, left:right]
            around = torch.randn(block.shape[0] + 2, block.shape[1] + 3).to(tensor.dtype)
            around[1:-1, 2:-1] = block
            array = store(folder / f"{top}-{left}", around, rng.randrange(50))
            source = Region(1, 1 + block.shape[0], 2, 2 + block.shape[1])
            pieces.append(Piece(array, source, Region(top, bottom, left, right)))
    return TensorView.assembled("cut", tuple(tensor.shape), pieces)


def written(
    file: Path, view: TensorView, dtype: str, methods: list[CopyMethod] | None = None
) -> torch.Tensor:
    """The tensor that a transfer leaves in a new file, behind 13 bytes."""
    target = os.open(file, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    try:
        with Transfer(methods=methods) as transfer:
            transfer.write(view, dtype, target, 13)
    finally:
        os.close(target)
    data = bytearray(file.read_bytes()[13:])
    return torch.frombuffer(data, dtype=getattr(torch, dtype)).view(view.shape)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks and steps so small that small tensors take many."""
    monkeypatch.setattr(module, "BLOCK", 512)
    monkeypatch.setattr(module, "STEP", 300)
    monkeypatch.setattr(runs, "SHORT_RUN", 64)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("method", METHODS)
def test_each_method_copies(tmp_path: Path, method: str) -> None:
    tensor = torch.randn(40, 17)
    view = TensorView.of_array("t", store(tmp_path / "s", tensor, 21))
    assert torch.equal(written(tmp_path / "t", view, "float32", [METHODS[method]]), tensor)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("method", METHODS)
def test_each_method_copies_pieces_cut_by_rows_and_columns(
    tmp_path: Path, method: str, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "SHORT_RUN", 0)  # each run by the method, however short
    tensor = torch.randn(23, 19)
    view = cut(tensor, tmp_path, seed)
    assert torch.equal(written(tmp_path / "t", view, "float32", [METHODS[method]]), tensor)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("shape", [(23, 19), (200, 5), (4, 400)])
def test_the_way_through_memory_gives_the_same_bytes(
    tmp_path: Path, shape: tuple[int, int], seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "SHORT_RUN", 1 << 30)  # never by the kernel

    def never(*_: int) -> int:
        raise AssertionError("by the kernel")

    tensor = torch.randn(shape).bfloat16()
    view = cut(tensor, tmp_path, seed)
    assert torch.equal(written(tmp_path / "t", view, "bfloat16", [never]), tensor)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_transposed_tensor(tmp_path: Path, dtype: str) -> None:
    """Whole, and beside another: two blocks of columns, of which one is transposed."""
    tensor = torch.randn(40, 30).to(getattr(torch, dtype))
    array = store(tmp_path / "array", tensor, 7)
    whole = Region.whole((40, 30))
    view = TensorView.assembled("t", (30, 40), [Piece(array, whole, whole.transposed, True)])
    assert torch.equal(written(tmp_path / "out", view, dtype), tensor.T)

    both = [
        Piece(array, Region(2, 12, 3, 28), Region(0, 10, 0, 25)),
        Piece(array, Region(5, 20, 1, 11), Region(0, 10, 25, 40), True),
    ]
    view = TensorView.assembled("t", (10, 40), both)
    expected = torch.cat([tensor[2:12, 3:28], tensor[5:20, 1:11].T], dim=1)
    assert torch.equal(written(tmp_path / "both", view, dtype), expected)


@pytest.mark.usefixtures("small_blocks")
def test_a_view_of_a_transposed_view(tmp_path: Path) -> None:
    """A tensor that is turned twice is where it was; a region of one that is turned is found."""
    tensor = torch.randn(40, 20)
    array = store(tmp_path / "array", tensor)
    whole = Region.whole((40, 20))
    turned = TensorView.assembled("t", (20, 40), [Piece(array, whole, whole.transposed, True)])
    back = turned.pieces_of(whole.transposed, whole, transposed=True)
    assert list(back) == [Piece(array, whole, whole)]
    part = turned.region(Region(3, 9, 10, 25), (6, 15))
    assert torch.equal(written(tmp_path / "out", part, "float32"), tensor.T[3:9, 10:25])


@pytest.mark.usefixtures("small_blocks")
def test_zeros_are_zeros_either_way(tmp_path: Path) -> None:
    tensor = torch.randn(30, 10)
    stored = Piece(store(tmp_path / "s", tensor), Region(0, 30, 0, 10), Region(0, 30, 0, 10))
    padding = Region(30, 35, 0, 10)
    view = TensorView.assembled("t", (35, 10), [stored, Piece.zeros(padding)])
    expected = torch.cat([tensor, torch.zeros(5, 10)])
    done: list[int] = []
    target = os.open(tmp_path / "t", os.O_RDWR | os.O_CREAT)
    os.posix_fallocate(target, 0, 35 * 40)
    with Transfer(done.append) as transfer:
        transfer.write(view, "float32", target, 0)
    os.close(target)
    read = torch.frombuffer(bytearray((tmp_path / "t").read_bytes()), dtype=torch.float32)
    assert torch.equal(read.view(35, 10), expected)
    assert sum(done) == view.nbytes
    assert torch.equal(written(tmp_path / "u", view, "float16"), expected.half())


@pytest.mark.parametrize(
    "code", [errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP], ids=errno.errorcode.get
)
def test_falls_back_once_for_each_pair_of_files(tmp_path: Path, code: int) -> None:
    tried: list[tuple[int, int]] = []

    def refuses(src: int, src_at: int, dst: int, dst_at: int, count: int) -> int:
        tried.append((src, dst))
        raise OSError(code, os.strerror(code))

    calls: list[int] = []

    def copies(src: int, src_at: int, dst: int, dst_at: int, count: int) -> int:
        calls.append(count)
        return METHODS["through_memory"](src, src_at, dst, dst_at, min(count, 100))

    a, b = torch.randn(100), torch.randn(100)
    views = [
        TensorView.of_array("a", store(tmp_path / "a", a)),
        TensorView.of_array("b", store(tmp_path / "b", b)),
    ]
    target = os.open(tmp_path / "t", os.O_RDWR | os.O_CREAT)
    with Transfer(methods=[refuses, refuses, copies]) as transfer:
        for i, view in enumerate([*views, *views]):
            transfer.write(view, "float32", target, i * 400)
    os.close(target)
    read = torch.frombuffer(bytearray((tmp_path / "t").read_bytes()), dtype=torch.float32)
    assert torch.equal(read, torch.cat([a, b, a, b]))
    # Two refusals for each of the two pairs, and none the second time.
    assert len(tried) == 4
    assert len(set(tried)) == 2
    assert len(calls) == 16


def test_the_last_methods_error_is_raised(tmp_path: Path) -> None:
    def refuses(*_: int) -> int:
        raise OSError(errno.EXDEV, "another device")

    view = TensorView.of_array("a", store(tmp_path / "a", torch.randn(3)))
    with pytest.raises(OSError, match="another device"):
        written(tmp_path / "t", view, "float32", [refuses, refuses])


def test_other_errors_are_raised_at_once(tmp_path: Path) -> None:
    def full(*_: int) -> int:
        raise OSError(errno.ENOSPC, "full")

    def never(*_: int) -> int:
        raise AssertionError

    view = TensorView.of_array("a", store(tmp_path / "a", torch.randn(3)))
    with pytest.raises(OSError, match="full"):
        written(tmp_path / "t", view, "float32", [full, never])


@pytest.fixture
def memory_folder(tmp_path: Path) -> Iterator[Path]:
    folder = Path("/dev/shm")
    if not folder.is_dir() or folder.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("no second file system here")
    made = folder / tmp_path.name / str(os.getpid())
    made.mkdir(parents=True)
    yield made
    for file in made.iterdir():
        file.unlink()
    made.rmdir()
    made.parent.rmdir()


def test_across_file_systems(tmp_path: Path, memory_folder: Path) -> None:
    tensor = torch.randn(1000, 1000)
    view = TensorView.of_array("t", store(memory_folder / "s", tensor, 5))
    assert torch.equal(written(tmp_path / "t", view, "float32"), tensor)
    back = TensorView.of_array("t", StoredArray(tmp_path / "t", 13, (1000, 1000), "float32"))
    assert torch.equal(written(memory_folder / "t", back, "float32"), tensor)


@pytest.mark.parametrize("method", METHODS)
def test_a_source_that_ends_too_soon_is_named(tmp_path: Path, method: str) -> None:
    array = store(tmp_path / "short", torch.randn(100))
    os.truncate(array.file, 300)
    view = TensorView.of_array("t", array)
    with pytest.raises(FormatError, match=r"short: truncated at byte 300"):
        written(tmp_path / "t", view, "float32", [METHODS[method]])


def test_a_source_that_ends_too_soon_is_named_through_memory(tmp_path: Path) -> None:
    array = store(tmp_path / "short", torch.randn(100))
    os.truncate(array.file, 300)
    with pytest.raises(FormatError, match=r"short: truncated at byte 300"):
        written(tmp_path / "t", TensorView.of_array("t", array), "float16")


def test_short_reads_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.preadv

    def short(fd: int, buffers: list[memoryview], offset: int) -> int:
        return real(fd, [buffers[0][:7]], offset)

    monkeypatch.setattr(os, "preadv", short)
    tensor = torch.randn(50, 3)
    view = TensorView.of_array("t", store(tmp_path / "s", tensor))
    assert torch.equal(written(tmp_path / "t", view, "float16"), tensor.half())


def test_without_the_newer_system_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("preadv", "copy_file_range", "sendfile"):
        monkeypatch.delattr(os, name)
    assert [m.__name__ for m in copy_methods()] == ["_through_memory"]
    tensor = torch.randn(50, 3)
    view = TensorView.of_array("t", store(tmp_path / "s", tensor))
    assert torch.equal(written(tmp_path / "t", view, "float32"), tensor)
    assert torch.equal(written(tmp_path / "t", view, "float16"), tensor.half())


def test_write_all_continues_short_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: real(fd, data[:3], at))
    fd = os.open(tmp_path / "t", os.O_RDWR | os.O_CREAT)
    assert write_all(fd, b"0123456789", 2) == 10
    os.close(fd)
    assert (tmp_path / "t").read_bytes() == b"\0\x000123456789"


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_stops_when_told_to(tmp_path: Path, dtype: str) -> None:
    stop = threading.Event()
    stop.set()
    view = TensorView.of_array("t", store(tmp_path / "s", torch.randn(5)))
    target = os.open(tmp_path / "t", os.O_RDWR | os.O_CREAT)
    with Transfer(stop=stop) as transfer, pytest.raises(Interrupted):
        transfer.write(view, dtype, target, 0)
    os.close(target)


# ------------------------------------------------------------------------------------------ casts


def special(dtype: str) -> torch.Tensor:
    """Values that round up, down and to even, the smallest, NaN and infinities."""
    exact = torch.tensor(
        [
            0.0,
            -0.0,
            1.0,
            -1.0,
            65504.0,
            -65504.0,
            2**-24,
            1e-40,
            1 / 3,
            1 + 2**-8,
            1 + 3 * 2**-8,
            1 + 2**-11,
            1 + 3 * 2**-11,
            torch.nan,
            torch.inf,
            -torch.inf,
        ]
    )
    values = torch.cat([exact, torch.randn(500), torch.randn(500) * 1e-6])
    return values.to(getattr(torch, dtype))


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.int32 if tensor.element_size() == 4 else torch.int16)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(("source", "target"), itertools.product(DTYPES, DTYPES))
def test_a_cast_is_torchs_cast_bit_for_bit(tmp_path: Path, source: str, target: str) -> None:
    tensor = special(source)
    if target == "float16":  # what would overflow is tried below
        tensor = torch.where(tensor.abs() > 60000, torch.inf, tensor.float()).to(tensor.dtype)
    view = TensorView.of_array("t", store(tmp_path / "s", tensor))
    found = written(tmp_path / "t", view, target)
    assert torch.equal(bits(found), bits(tensor.to(getattr(torch, target))))
    assert int(found.isnan().sum()) == 1


@pytest.mark.parametrize(
    ("source", "target", "value"),
    [
        ("float32", "float16", 65520.0),
        ("float32", "float16", -1e6),
        ("bfloat16", "float16", 65536.0),
        ("float32", "bfloat16", 3.4028235e38),
    ],
)
@pytest.mark.parametrize("beside", [0.0, torch.nan, torch.inf])
def test_a_value_that_would_become_infinite_is_refused(
    tmp_path: Path, source: str, target: str, value: float, beside: float
) -> None:
    tensor = torch.tensor([1.0, beside, value, 2.0, value]).to(getattr(torch, source))
    view = TensorView.of_array("model.w", store(tmp_path / "s", tensor))
    with pytest.raises(InputError, match=f"model.w: 2 values are too large for {target}") as e:
        written(tmp_path / "t", view, target)
    assert f"({tensor[2].item():g} is the first)" in str(e.value)


def test_the_largest_value_that_rounds_down_is_kept(tmp_path: Path) -> None:
    tensor = torch.tensor([65519.0, -65519.0])
    view = TensorView.of_array("t", store(tmp_path / "s", tensor))
    assert written(tmp_path / "t", view, "float16").tolist() == [65504.0, -65504.0]


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("shape", [(), (1000,), (3, 1000), (0, 4)])
def test_progress_is_told_in_bytes_of_the_source(tmp_path: Path, shape: tuple[int, ...]) -> None:
    for dtype in ("float32", "bfloat16"):
        done: list[int] = []
        view = TensorView.of_array("t", store(tmp_path / "s", torch.randn(shape)))
        target = os.open(tmp_path / "t", os.O_RDWR | os.O_CREAT)
        with Transfer(done.append) as transfer:
            transfer.write(view, dtype, target, 0)
        os.close(target)
        assert sum(done) == view.nbytes


def test_few_files_are_open_at_a_time(tmp_path: Path) -> None:
    """However many the tensors are in: a process may open 256 on some systems."""
    tensors = [torch.randn(8) for _ in range(3 * module.OPEN_FILES)]
    views = [
        TensorView.of_array(f"t{i}", store(tmp_path / f"s{i}", t)) for i, t in enumerate(tensors)
    ]
    target = os.open(tmp_path / "t", os.O_RDWR | os.O_CREAT)
    opened = lambda: len(list(Path("/proc/self/fd").iterdir()))  # noqa: E731
    before = opened()
    with Transfer() as transfer:
        for turn in range(2):
            for i, view in enumerate(views):
                transfer.write(view, "float32" if turn else "bfloat16", target, 32 * i)
        assert opened() == before + module.OPEN_FILES
    assert opened() == before
    os.close(target)
    assert (tmp_path / "t").read_bytes() == torch.cat(tensors).numpy().tobytes()


def test_errors_of_reading_name_the_file(tmp_path: Path) -> None:
    """A folder can be opened, but not read."""
    array = StoredArray(tmp_path, 0, (4,), "float32")
    with pytest.raises(IsADirectoryError) as caught:
        written(tmp_path / "t", TensorView.of_array("t", array), "bfloat16")
    assert caught.value.filename == str(tmp_path)
