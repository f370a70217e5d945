"""Several processes on one conversion, started as torchrun starts them."""

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_olmo_bridge import verify
from megatron_olmo_bridge.convert.to_megatron import import_checkpoint

HF = Callable[..., Path]

IMPORT = """
import sys
import megatron_olmo_bridge.convert.to_megatron as to_megatron
from megatron_olmo_bridge.errors import BridgeError
from megatron_olmo_bridge.storage.execute import WriteOptions
to_megatron.FILE_BYTES = 20_000
try:
    to_megatron.import_checkpoint(sys.argv[1], sys.argv[2], write=WriteOptions(checksum=True))
except BridgeError as error:
    print(error)
"""


def together(count: int, *args: object, code: str = IMPORT) -> list[str]:
    """What each of some processes prints that convert at the same time."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = os.environ | {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)
    }  # fmt: skip
    running = [
        subprocess.Popen([sys.executable, "-c", code, *map(str, args)],
                         env=common | {"RANK": str(i)}, stdout=subprocess.PIPE, text=True)
        for i in range(count)
    ]  # fmt: skip
    said = [process.communicate(timeout=900)[0] for process in running]
    assert [process.returncode for process in running] == [0] * count
    return said


def files(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def test_together_they_write_what_one_writes(make_hf: HF, tmp_path: Path) -> None:
    hf = make_hf()
    together(1, hf, tmp_path / "one")
    together(3, hf, tmp_path / "three")
    assert len(list((tmp_path / "one").rglob("*.distcp"))) > 5
    assert files(tmp_path / "one") == files(tmp_path / "three")


ONE_SOURCE_EACH = IMPORT.replace("sys.argv[1], ", 'sys.argv[1] + os.environ["RANK"], ').replace(
    "import sys", "import os, sys"
)
CHANGING = """
import os, sys
from megatron_olmo_bridge import import_checkpoint
from megatron_olmo_bridge.storage.progress import Reporter
from megatron_olmo_bridge.errors import BridgeError

class Writing(Reporter):
    def begin(self, what, total):
        if os.environ["RANK"] == "1":
            os.utime(f"{sys.argv[1]}/model.safetensors")

try:
    import_checkpoint(sys.argv[1], sys.argv[2], reporter=Writing())
except BridgeError as error:
    print(error)
"""


def test_processes_that_read_different_files_are_refused(make_hf: HF, tmp_path: Path) -> None:
    """The source was replaced after some processes had read its headers."""
    make_hf("hf0")
    make_hf("hf1", seed=1)

    said = together(2, tmp_path / "hf", tmp_path / "dst", code=ONE_SOURCE_EACH)

    assert all("the processes read different headers or files" in line for line in said), said
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf0", "hf1"]


def test_a_source_that_changes_meanwhile_is_refused_by_each(make_hf: HF, tmp_path: Path) -> None:
    said = together(2, make_hf(), tmp_path / "dst", code=CHANGING)

    assert all("model.safetensors: changed while" in line for line in said), said
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


TWICE = """
import sys
from megatron_olmo_bridge import export_checkpoint, import_checkpoint
import_checkpoint(sys.argv[1], sys.argv[2])
export_checkpoint(sys.argv[2], sys.argv[3])
import torch.distributed as dist
assert not dist.is_initialized()  # that is the caller's
dist.init_process_group("gloo")
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_one_conversion_after_another(make_hf: HF, tmp_path: Path) -> None:
    """And the caller can still set up process groups of its own."""
    hf = make_hf()
    together(3, hf, tmp_path / "m", tmp_path / "back", code=TWICE)
    assert verify(hf, tmp_path / "back").equal


def test_all_refuse_what_exists(make_hf: HF, tmp_path: Path) -> None:
    hf = make_hf()
    import_checkpoint(hf, tmp_path / "m")
    before = files(tmp_path / "m")
    said = together(2, hf, tmp_path / "m")
    assert all("exists already" in text for text in said)
    assert files(tmp_path / "m") == before
