"""Archives of ``torch.save``: a zip with a pickle, and a record for each storage.

They are written without their payload, so that the kernel can copy it into place, and read by
headers, so that no payload is touched. Both ``torch.load`` and ``torch.load(mmap=True)`` read them.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_olmo_bridge.errors import FormatError, quote
from megatron_olmo_bridge.mapping.placement import Shape

from .files import PICKLE_LIMIT, open_regular, size_of
from .inert import Inert, inert, is_class
from .pickles import Persistent, dumps, loads
from .remote_path import AnyPath
from .stored_zip import Record, Window, encode_around, read_directory
from .tensors import ITEM_SIZE, StoredArray

MAX_DIMENSIONS = 64
"""Dimensions of a tensor, as in PyTorch."""
_STORAGE = {"float32": "FloatStorage", "bfloat16": "BFloat16Storage", "float16": "HalfStorage"}
_DTYPE = {f"torch.{storage}": dtype for dtype, storage in _STORAGE.items()}


def tensor_archive(shape: Shape, dtype: str) -> tuple[bytes, bytes]:
    """Return what stands before and after the elements in the archive of a contiguous tensor."""
    count = math.prod(shape)
    strides = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
    storage = Persistent(("storage", inert(f"torch.{_STORAGE[dtype]}"), "0", "cpu", count))
    hooks = inert("collections.OrderedDict")()
    tensor = inert("torch._utils._rebuild_tensor_v2")(storage, 0, shape, strides, False, hooks)
    return encode_around(_records(tensor, {"archive/data/0": None}), count * ITEM_SIZE[dtype])


def object_archive(value: Any) -> bytes:
    """Return the archive of a value without tensors."""
    return encode_around(_records(value, {}))[0]


def _records(value: Any, storage: dict[str, None]) -> dict[str, bytes | None]:
    return {
        "archive/data.pkl": dumps(value),
        "archive/byteorder": b"little",
        **storage,
        "archive/version": b"3\n",
    }


@dataclass(frozen=True)
class StoredStorage:
    """A storage of an archive, by where its bytes are."""

    dtype: str
    offset: int
    """Byte of the file at which it begins."""
    count: int
    """Elements."""


def read_archive(
    file: AnyPath, offset: int = 0, length: int | None = None, *, any_classes: bool = False
) -> Any:
    """Return the value of an archive, with a :class:`StoredStorage` for each storage.

    Args:
        file: the file.
        offset: byte at which the archive begins.
        length: bytes that it takes; None for the rest of the file.
        any_classes: see :func:`.pickles.loads`.

    Raises:
        FormatError: truncated, compressed, big-endian or not an archive.
        UnsafePickleError: its pickle names a class or function that is not allowed.
    """
    where = f"{file} at byte {offset}" if offset else str(file)
    with open_regular(file) as handle:
        size = size_of(handle)
        length = size - offset if length is None else length
        if offset + length > size:
            raise FormatError(f"{file}: truncated: {size} bytes, needs {offset + length}")
        try:
            window = Window(handle, offset, length)
            records = read_directory(window)
            pickled = _pickle_of(window, records)
        except (ValueError, struct.error) as error:
            raise FormatError(f"{where}: not an archive of torch.save ({error})") from error
    return loads(pickled, where, _storages(records, where), any_classes=any_classes)


def _pickle_of(window: Window, records: Mapping[str, Record]) -> bytes:
    # torch.load would run an archive with constants.pkl, as a TorchScript program.
    if "data.pkl" not in records or "constants.pkl" in records:
        raise ValueError("the archive has no data.pkl, or is a TorchScript program")
    byteorder = records.get("byteorder")
    if byteorder and window.content(byteorder, 16) != b"little":
        raise ValueError("big-endian tensors can't be read")
    return window.content(records["data.pkl"], PICKLE_LIMIT)


def _storages(
    records: Mapping[str, Record], where: str
) -> Callable[[tuple[Any, ...]], StoredStorage]:
    """Return the function that finds a storage by its persistent id."""
    found: dict[str, StoredStorage] = {}

    def storage(pid: tuple[Any, ...]) -> StoredStorage:
        match pid:
            case ("storage", kind, str() as key, _, int() as count) if is_class(kind):
                record = records.get(f"data/{key}".lower())
            case _:
                raise FormatError(f"{where}: {quote(pid)} is not a storage")
        if record is None:
            raise FormatError(f"{where}: has no record {quote(f'data/{key}')}")
        dtype = _DTYPE.get(kind.global_name, kind.global_name)
        if dtype in ITEM_SIZE and record.size != count * ITEM_SIZE[dtype]:
            raise FormatError(f"{where}: {record.size} bytes cannot hold {quote(count)} x {dtype}")
        new = StoredStorage(dtype, record.offset, count)
        if found.setdefault(key, new) != new:  # torch reads all as the first
            raise FormatError(f"{where}: storage {quote(key)} has two dtypes or sizes")
        return new

    return storage


def read_tensor(file: AnyPath, offset: int, length: int) -> StoredArray:
    """Return where the elements of the tensor in an archive are.

    Raises:
        FormatError: not a plain contiguous tensor of a dtype that weights have.
    """
    return array_of(read_archive(file, offset, length), file, f"{file} at byte {offset}")


def array_of(value: Any, file: AnyPath, where: str) -> StoredArray:
    """Return where the elements of a tensor are.

    Args:
        value: the tensor, as :func:`read_archive` returns it.
        file: the file that it was read from.
        where: what messages name.

    Raises:
        FormatError: not a plain contiguous tensor of a dtype that weights have.
    """
    if _is_result_of(value, "torch._utils._rebuild_parameter") and value.args:
        value = value.args[0]
    if not _is_result_of(value, "torch._utils._rebuild_tensor_v2"):
        raise FormatError(f"{where}: holds {_type_name(value)}, not a plain tensor")
    storage, start, shape, strides, _, _, metadata = (*value.args, *[None] * 7)[:7]
    if _is_result_of(shape, "torch.Size") and shape.args:
        shape = shape.args[0]
    tuples = isinstance(shape, tuple) and isinstance(strides, tuple)
    if not (tuples and isinstance(storage, StoredStorage)) or any(
        type(n) is not int or not 0 <= n < 2**63 for n in (start, *shape, *strides)
    ):
        raise FormatError(f"{where}: holds {_type_name(value)}, which is not a tensor")
    if metadata not in (None, {}) or len(value.args) > 7:
        raise FormatError(
            f"{where}: the tensor is a view that negates or conjugates its elements, or has other "
            f"metadata: {quote(metadata)}. Save it after tensor.resolve_neg().resolve_conj()."
        )
    if storage.dtype not in ITEM_SIZE:
        raise FormatError(f"{where}: tensors of {storage.dtype} are not converted")
    if len(shape) != len(strides) or len(shape) > MAX_DIMENSIONS:
        raise FormatError(f"{where}: shape {quote(shape)} and strides {quote(strides)} don't fit")
    step = 1
    for extent, stride in zip(reversed(shape), reversed(strides), strict=True):
        if extent > 1 and stride != step:
            raise FormatError(f"{where}: the tensor is not contiguous (strides {quote(strides)})")
        step *= extent
    if start + step > storage.count:
        raise FormatError(f"{where}: the tensor is larger than its storage")
    return StoredArray(
        file, storage.offset + start * ITEM_SIZE[storage.dtype], tuple(shape), storage.dtype
    )


def arrays_by_name(value: Any, file: AnyPath) -> dict[str, StoredArray] | None:
    """Return where the elements of the tensors in a dictionary are, by their names.

    None if the value is not a dictionary with names as keys.

    Args:
        value: part of what :func:`read_archive` returns.
        file: the file that it was read from.

    Raises:
        FormatError: see :func:`array_of`.
    """
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
        return None
    return {name: array_of(value[name], file, f"{file}: {name}") for name in value}


def read_number(array: StoredArray, where: str) -> float:
    """Return the value of a float32 tensor without dimensions.

    Args:
        array: where the tensor is.
        where: what the message names.

    Raises:
        FormatError: it has dimensions or another dtype.
    """
    if array.shape != () or array.dtype != "float32":
        raise FormatError(f"{where}: is {array.dtype} {list(array.shape)}, not a float32 number")
    with open_regular(array.file) as file:
        file.seek(array.offset)
        (value,) = struct.unpack("<f", file.read(4))
    return float(value)


def _is_result_of(value: Any, name: str) -> bool:
    """Return whether a value is the unchanged result of calling this global."""
    return (
        isinstance(value, Inert)
        and value.global_name == name
        and value.state is None
        and not value.items
        and not value.members
    )


def _type_name(value: Any) -> str:
    return value.global_name if isinstance(value, Inert) else quote(value, depth=0)
