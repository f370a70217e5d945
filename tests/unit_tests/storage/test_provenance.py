"""What is recorded of a conversion."""

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_olmo_bridge import __version__
from megatron_olmo_bridge.convert.options import ExportOptions, ImportOptions
from megatron_olmo_bridge.convert.to_hf import export_checkpoint
from megatron_olmo_bridge.convert.to_megatron import import_checkpoint
from megatron_olmo_bridge.errors import FormatError
from megatron_olmo_bridge.storage.execute import WriteOptions
from megatron_olmo_bridge.storage.provenance import PROVENANCE, read_provenance, sealed

HF = Callable[..., Path]


def test_an_import_records_where_it_came_from(make_hf: HF, tmp_path: Path) -> None:
    hf = make_hf()
    plan = import_checkpoint(
        hf, tmp_path / "m", ImportOptions(dtype="bfloat16", make_vocab_size_divisible_by=64)
    )
    folder = tmp_path / "m/iter_0000000"
    said = read_provenance(folder)
    assert said is not None
    files = said.pop("files")
    versions = said.pop("versions")
    assert said == {
        "operation": "import",
        "source": str(hf.resolve()),
        "revision": None,
        "options": {"dtype": "bfloat16", "padded_vocab_size": 128, "release": False},
        "plan_sha256": plan.digest,
        "source_digest": plan.source_digest,
    }
    assert versions["megatron-olmo-bridge"] == __version__
    assert versions.keys() == {"megatron-olmo-bridge", "python", "torch"}
    present = {p.relative_to(folder).as_posix(): {"bytes": p.stat().st_size}
               for p in folder.rglob("*") if p.is_file()}  # fmt: skip
    del present["olmo_bridge.json"]
    assert files == present


def test_an_export_records_its_iteration(make_hf: HF, tmp_path: Path) -> None:
    import_checkpoint(make_hf(), tmp_path / "m")
    export_checkpoint(tmp_path / "m", tmp_path / "back", ExportOptions(max_shard_size="50KB"))
    said = read_provenance(tmp_path / "back")
    assert said is not None
    assert said["operation"] == "export"
    assert said["source"] == str((tmp_path / "m/iter_0000000").resolve())
    assert said["options"] == {"dtype": "keep", "max_shard_bytes": 50_000}


def test_checksums_are_those_of_the_files(make_hf: HF, tmp_path: Path) -> None:
    import_checkpoint(make_hf(), tmp_path / "m", write=WriteOptions(checksum=True, workers=2))
    folder = tmp_path / "m/iter_0000000"
    said = read_provenance(folder)
    assert said is not None
    for name, entry in said["files"].items():
        digest = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        assert entry == {"bytes": (folder / name).stat().st_size, "sha256": digest}


def test_no_time_stamp_and_nothing_random(make_hf: HF, tmp_path: Path) -> None:
    hf = make_hf()
    for name in "ab":
        import_checkpoint(hf, tmp_path / name, write=WriteOptions(checksum=True))
    texts = [(tmp_path / n / "iter_0000000/olmo_bridge.json").read_text() for n in "ab"]
    assert texts[0] == texts[1]
    assert not re.search(r"20\d\d-\d\d|\d\d:\d\d:\d\d|time|date", texts[0].replace(str(hf), ""))
    assert json.loads(texts[0])


def test_nothing_recorded(tmp_path: Path) -> None:
    assert read_provenance(tmp_path) is None


FILES = {"model.safetensors": {"bytes": 3}}


def test_a_record_of_a_later_version_may_say_more(tmp_path: Path) -> None:
    record = {"source": "a/b", "files": FILES, "more": 1}
    (tmp_path / "olmo_bridge.json").write_text(json.dumps(record))
    assert read_provenance(tmp_path) == record


@pytest.mark.parametrize(
    "change",
    [
        {"source": None},
        {"source": ["a"]},
        {"revision": 3},
        {"versions": []},
        {"files": []},
        {"fingerprint": "| a row"},
        {"fingerprint": 3},
        {"files": {"a": 3}},
        {"files": {"a": {}}},
        {"files": {"a": {"bytes": "3"}}},
        {"files": {"a": {"bytes": 3, "sha256": 3}}},
        {"files": {"../secret": {"bytes": 3}}},
        {"files": {"/etc/passwd": {"bytes": 3}}},
    ],
)
def test_a_record_that_is_not_sound(tmp_path: Path, change: dict[str, Any]) -> None:
    record = {"source": "a/b", "files": FILES} | change
    (tmp_path / "olmo_bridge.json").write_text(json.dumps(record))
    with pytest.raises(FormatError, match=r"olmo_bridge\.json: not the record of a conversion"):
        read_provenance(tmp_path)


def test_a_change_of_any_byte_of_a_sealed_record_is_noticed(tmp_path: Path) -> None:
    """Those of a run's checkpoints are sealed."""
    files = {"a.distcp": {"bytes": 3, "sha256": "0" * 64}}
    record = {"operation": "train", "source": "a live model", "versions": {}, "files": files}
    data = sealed(record)
    file = tmp_path / PROVENANCE
    file.write_bytes(data)
    found = read_provenance(tmp_path)
    assert found is not None and found["files"] == files
    for place in range(len(data)):
        file.write_bytes(data[:place] + bytes([data[place] ^ 0x10]) + data[place + 1 :])
        with pytest.raises(FormatError, match=PROVENANCE):
            read_provenance(tmp_path)
