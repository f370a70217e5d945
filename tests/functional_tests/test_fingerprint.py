"""The fingerprint of one model: published, imported, saved by stock Megatron, and exported."""

import subprocess
import sys
from pathlib import Path

from launching import olmo_bridge, stock

from megatron_olmo_bridge import (
    ExportOptions,
    ImportOptions,
    ReadOptions,
    WriteOptions,
    export_checkpoint,
    fingerprint,
    import_checkpoint,
    inspect,
    synth,
)

EXAMPLE = Path(__file__).parents[2] / "examples" / "fingerprint.py"


def by_example(folder: Path) -> str:
    """The fingerprint by the example, in a process that has nothing of this package."""
    command = [sys.executable, "-I", EXAMPLE, folder]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_one_fingerprint_in_every_format(tmp_path: Path) -> None:
    hf = synth("olmo2-tiny", tmp_path / "seed", dtype="float32")
    layout = ("--tp", 2, "--pp", 2, "--optimizer")
    stock("save", "--hf", hf, "--out", tmp_path / "run", *layout, processes=4)
    stock_save = ReadOptions(hf_config=hf)
    assert "optimizer state" in inspect(tmp_path / "run", stock_save).layout
    export = ExportOptions(hf_config=hf, max_shard_size="700KB")
    export_checkpoint(tmp_path / "run", tmp_path / "8 shards", export)
    assert len(list((tmp_path / "8 shards").glob("*.safetensors"))) == 8
    import_checkpoint(
        tmp_path / "8 shards", tmp_path / "import", ImportOptions(make_vocab_size_divisible_by=768)
    )
    export_checkpoint(tmp_path / "import", tmp_path / "1 shard", write=WriteOptions(checksum=True))
    export_checkpoint(tmp_path / "import", tmp_path / "step0", ExportOptions(to="olmo-core"))

    root = by_example(tmp_path / "8 shards")

    found = {n: fingerprint(tmp_path / n).root for n in ("8 shards", "import", "1 shard", "step0")}
    found["stock"] = fingerprint(tmp_path / "run", stock_save).root
    found["1 shard, by the example"] = by_example(tmp_path / "1 shard")
    found["1 shard, as recorded"] = inspect(tmp_path / "1 shard").provenance["fingerprint"]
    assert found == dict.fromkeys(found, root)
    assert fingerprint(hf).root != root
    done = olmo_bridge("verify", tmp_path / "run", "--fingerprint", root, "--hf-config", hf)
    assert done.exit_code == 0
    done = olmo_bridge("verify", hf, "--fingerprint", root)
    assert done.exit_code == 1
