"""Functions that damage a checkpoint, for the tables of bad inputs."""

import json
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from megatron_olmo_bridge.formats.pickles import dumps, loads

ITERATION = "iter_0000000"


def edit_json(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the object in a JSON file."""
    value = json.loads(file.read_text())
    change(value)
    file.write_text(json.dumps(value))


def edit_header(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the header of a safetensors file and leave the tensors' bytes as they are."""
    header = json.loads(header_text(file))
    change(header)
    replace_header(file, json.dumps(header))


def header_text(file: Path) -> str:
    data = file.read_bytes()
    return data[8 : 8 + struct.unpack("<Q", data[:8])[0]].decode()


def replace_header(file: Path, text: str) -> None:
    data = file.read_bytes()
    tensors = data[8 + struct.unpack("<Q", data[:8])[0] :]
    file.write_bytes(struct.pack("<Q", len(text)) + text.encode() + tensors)


def edit_tensors(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the tensors of a safetensors file, which stays valid."""
    tensors = load_file(file)
    change(tensors)
    save_file({n: t.contiguous() for n, t in tensors.items()}, file, {"format": "pt"})


def edit_metadata(root: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the attributes of ``Metadata`` in a Megatron checkpoint's ``.metadata``."""
    file = root / ITERATION / ".metadata"
    metadata = loads(file.read_bytes(), file)
    change(metadata.state)
    file.write_bytes(dumps(metadata))


def edit_tensor_metadata(root: Path, key: str, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the entry of one tensor in ``.metadata``: properties, size, chunks."""
    edit_metadata(root, lambda metadata: change(metadata["state_dict_metadata"][key].state))


def edit_stored(root: Path, key: str, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the storage location of a tensor's first chunk in ``.metadata``."""

    def in_metadata(metadata: dict[str, Any]) -> None:
        storage = metadata["storage_data"]
        change(storage[next(index for index in storage if index.state["fqn"] == key)].state)

    edit_metadata(root, in_metadata)


def rename_key(root: Path, old: str, new: str) -> None:
    """Store a tensor under another key."""

    def in_metadata(metadata: dict[str, Any]) -> None:
        described = metadata["state_dict_metadata"]
        described[new] = described.pop(old)
        for index in metadata["storage_data"]:
            if index.state["fqn"] == old:
                index.state["fqn"] = new

    edit_metadata(root, in_metadata)


def calling(name: str, *args: str) -> bytes:
    """Return a pickle that calls a global, which need not exist on this machine."""
    module, _, function = name.rpartition(".")
    called = "".join(f"V{arg}\n" for arg in args)
    return f"c{module}\n{function}\n({called}tR.".encode()


def write_archive(file: Path, pickled: bytes, compression: int = zipfile.ZIP_STORED) -> None:
    """Write an archive like one of ``torch.save`` with this pickle."""
    with zipfile.ZipFile(file, "w", compression) as out:
        out.writestr("archive/data.pkl", pickled)
        out.writestr("archive/version", b"3\n")


def write(file: Path, content: str | bytes | dict[str, Any] = "") -> None:
    """Write a file and create its parent folders."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, dict):
        content = json.dumps(content)
    file.write_bytes(content.encode() if isinstance(content, str) else content)
