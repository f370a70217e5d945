"""With checksums, a conversion records the fingerprint of what it wrote, as read from there."""

from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_olmo_bridge.convert.average import average_checkpoints
from megatron_olmo_bridge.convert.options import ExportOptions, ImportOptions
from megatron_olmo_bridge.convert.to_hf import export_checkpoint
from megatron_olmo_bridge.convert.to_megatron import import_checkpoint
from megatron_olmo_bridge.storage.execute import WriteOptions
from megatron_olmo_bridge.storage.provenance import read_provenance
from megatron_olmo_bridge.storage.transfer import Transfer
from megatron_olmo_bridge.tools.fingerprint import fingerprint

HF = Callable[..., Path]
CHECKSUM = WriteOptions(checksum=True)


def recorded(folder: Path) -> object:
    return (read_provenance(folder) or {}).get("fingerprint")


def test_every_conversion_records_the_fingerprint_of_its_output(
    make_hf: HF, tmp_path: Path
) -> None:
    hf = make_hf()
    import_checkpoint(hf, tmp_path / "m", write=CHECKSUM)
    import_checkpoint(hf, tmp_path / "r", ImportOptions(release=True), CHECKSUM)
    import_checkpoint(hf, tmp_path / "bf16", ImportOptions(dtype="bfloat16"), CHECKSUM)
    export_checkpoint(tmp_path / "m", tmp_path / "back", write=CHECKSUM)
    export_checkpoint(tmp_path / "m", tmp_path / "s0", ExportOptions(to="olmo-core"), CHECKSUM)
    average_checkpoints([hf, make_hf("other", seed=5)], tmp_path / "mean", write=CHECKSUM)
    found = {
        name: recorded(tmp_path / name)
        for name in ("m/iter_0000000", "r/release", "bf16/iter_0000000", "back", "s0", "mean")
    }
    assert found == {name: fingerprint(tmp_path / name).root for name in found}
    same = {found[name] for name in ("m/iter_0000000", "r/release", "back", "s0")}
    assert same == {fingerprint(hf).root}
    assert len(set(found.values())) == 3


def test_without_checksums_nothing_is_recorded_or_read_again(
    make_hf: HF, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_olmo_bridge.storage.execute.hash_tensors", None)
    import_checkpoint(make_hf(), tmp_path / "m")
    assert recorded(tmp_path / "m/iter_0000000") is None


def test_it_is_that_of_the_output_and_not_of_the_source(
    make_hf: HF, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy that went wrong would be seen by comparing the two."""

    def lose(*_: object) -> None:
        pass

    hf = make_hf()
    monkeypatch.setattr(Transfer, "write", lose)
    import_checkpoint(hf, tmp_path / "m", write=CHECKSUM)
    assert recorded(tmp_path / "m/iter_0000000") != fingerprint(hf).root
