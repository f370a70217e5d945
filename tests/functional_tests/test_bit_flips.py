"""One flipped bit anywhere in the weights is found, and the tensor is named.

These tests locate a tensor's bytes without this package: in the safetensors header, through torch's
own reader of ``.metadata``, and in the zip records of the archives.
"""

import io
import json
import os
import pickle
import random
import re
import shutil
import struct
import zipfile
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from trees import contents

from megatron_olmo_bridge import export_checkpoint, import_checkpoint, verify
from megatron_olmo_bridge.convert.options import ExportOptions, ImportOptions
from megatron_olmo_bridge.errors import BridgeError
from megatron_olmo_bridge.storage.execute import WriteOptions
from megatron_olmo_bridge.storage.stage import Stage

FLIPS = 50
ITEM = 2
"""Bytes per element: the weights are bfloat16."""
VOCAB, PADDED = 1024, 1280

HF_NAMES = {
    "embedding.word_embeddings.weight": ["model.embed_tokens.weight"],
    "decoder.layers.self_attention.linear_qkv.weight": [
        f"model.layers.*.self_attn.{x}_proj.weight" for x in "qkv"
    ],
    "decoder.layers.self_attention.q_layernorm.weight": ["model.layers.*.self_attn.q_norm.weight"],
    "decoder.layers.self_attention.k_layernorm.weight": ["model.layers.*.self_attn.k_norm.weight"],
    "decoder.layers.self_attention.linear_proj.weight": ["model.layers.*.self_attn.o_proj.weight"],
    "decoder.layers.self_attention.linear_proj.post_layernorm.weight": [
        "model.layers.*.post_attention_layernorm.weight"
    ],
    "decoder.layers.mlp.linear_fc1.weight": [
        f"model.layers.*.mlp.{x}_proj.weight" for x in ("gate", "up")
    ],
    "decoder.layers.mlp.linear_fc2.weight": ["model.layers.*.mlp.down_proj.weight"],
    "decoder.layers.mlp.linear_fc2.post_layernorm.weight": [
        "model.layers.*.post_feedforward_layernorm.weight"
    ],
    "decoder.final_layernorm.weight": ["model.norm.weight"],
    "output_layer.weight": ["lm_head.weight"],
}
"""Hugging Face tensors that make up each Megatron key."""
KINDS = sorted(name for names in HF_NAMES.values() for name in names)


@dataclass(frozen=True)
class Bytes:
    """Location of some rows of a tensor."""

    named: frozenset[str]
    """Names under which a difference in these bytes may be reported."""
    file: Path
    begin: int
    end: int
    columns: int


def kind(name: str) -> str:
    return re.sub(r"\.\d+\.", ".*.", name)


def flips(places: list[Bytes], rng: random.Random) -> Iterator[tuple[Bytes, int]]:
    """Yield bytes to damage in every kind of tensor: in its last row, its first row, then
    anywhere."""
    kinds: dict[frozenset[str], list[Bytes]] = defaultdict(list)
    for place in places:
        kinds[frozenset(map(kind, place.named))].append(place)
    for turn in range(FLIPS):
        for group in sorted(kinds, key=sorted):
            place = rng.choice(kinds[group]) if turn else kinds[group][-1]
            row = place.columns * ITEM
            first, last = {
                0: (place.end - row, place.end),
                1: (place.begin, place.begin + row),
            }.get(turn, (place.begin, place.end))
            yield place, rng.randrange(first, last)


def flip(file: Path, at: int, bit: int) -> None:
    with file.open("r+b") as handle:
        handle.seek(at)
        (value,) = handle.read(1)
        handle.seek(at)
        handle.write(bytes([value ^ 1 << bit]))


def check_all_are_found(good: Path, damaged: Path, places: list[Bytes]) -> set[str]:
    """Flip a bit, verify and flip it back, FLIPS times; return the kinds of tensor reported."""
    rng = random.Random(0)
    seen: set[str] = set()
    touched: set[Path] = set()
    assert verify(good, damaged).equal
    for place, at in islice(flips(places, rng), FLIPS):
        bit = rng.randrange(8)
        flip(place.file, at, bit)
        result = verify(good, damaged)
        flip(place.file, at, bit)
        assert [d.kind for d in result.differences] == ["values"], (place, at, bit)
        assert result.differences[0].name in place.named
        assert result.differences[0].detail.startswith("1 of ")
        seen.add(kind(result.differences[0].name))
        touched.add(place.file)
    assert verify(good, damaged).equal
    assert touched == {place.file for place in places}, "every file must be damaged at least once"
    return seen


def test_a_flipped_bit_in_an_export_is_found(megatron: Path, sharded: Path, tmp_path: Path) -> None:
    export_checkpoint(megatron, tmp_path / "hf", ExportOptions(max_shard_size="1MB"))
    places = []
    for file in sorted((tmp_path / "hf").glob("*.safetensors")):
        (length,) = struct.unpack("<Q", file.read_bytes()[:8])
        header = json.loads(file.read_bytes()[8 : 8 + length])
        for name, entry in header.items():
            if name != "__metadata__":
                begin, end = (8 + length + offset for offset in entry["data_offsets"])
                columns = (entry["shape"] + [1])[1]
                places.append(Bytes(frozenset([name]), file, begin, end, columns))
    assert len({place.file for place in places}) > 2

    assert check_all_are_found(sharded, tmp_path / "hf", places) == set(KINDS)


def test_a_flipped_bit_in_an_import_with_padded_rows_is_found(
    sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_olmo_bridge.convert.to_megatron.FILE_BYTES", 1 << 20)
    import_checkpoint(
        sharded, tmp_path / "megatron", ImportOptions(make_vocab_size_divisible_by=PADDED)
    )

    places = list(megatron_places(tmp_path / "megatron" / "iter_0000000"))

    padding = {f"{k} padding rows" for k, names in HF_NAMES.items() if "layers" not in names[0]}
    padding -= {"decoder.final_layernorm.weight padding rows"}
    seen = check_all_are_found(sharded, tmp_path / "megatron", places)
    assert padding <= seen
    # In a fused tensor the flips hit some of its parts; the test above covers every part.
    assert {kinds for place in places for kinds in map(kind, place.named)} == set(KINDS) | padding
    assert all(seen & set(names) for names in HF_NAMES.values())


def megatron_places(folder: Path) -> Iterator[Bytes]:
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    for index, info in metadata.storage_data.items():
        if index.fqn not in HF_NAMES:
            continue
        file = folder / info.relative_path
        begin, end = payload(file, info.offset, info.length)
        chunk = next(
            c for c in metadata.state_dict_metadata[index.fqn].chunks if c.offsets == index.offset
        )
        columns = 1 if len(chunk.sizes) == (2 if "layers" in index.fqn else 1) else chunk.sizes[-1]
        names = HF_NAMES[index.fqn]
        if "layers" in index.fqn:
            names = [name.replace("*", str(index.offset[0])) for name in names]
        if "linear_fc1" in index.fqn:
            names = [names[1 if index.offset[1] else 0]]
        if chunk.sizes[0] == PADDED:
            middle = begin + VOCAB * columns * ITEM
            yield Bytes(frozenset([f"{index.fqn} padding rows"]), file, middle, end, columns)
            end = middle
        yield Bytes(frozenset(names), file, begin, end, columns)


def payload(file: Path, offset: int, length: int) -> tuple[int, int]:
    """Return the position of an archive's tensor in the file that contains the archive."""
    archive = file.read_bytes()[offset : offset + length]
    with zipfile.ZipFile(io.BytesIO(archive)) as zipped:
        info = next(i for i in zipped.infolist() if i.filename.endswith("/data/0"))
    name, extra = struct.unpack_from("<HH", archive, info.header_offset + 26)
    begin = offset + info.header_offset + 30 + name + extra
    return begin, begin + info.file_size


@pytest.mark.parametrize("name", ["__0_0.distcp", "common.pt", "hf/config.json"])
def test_a_flipped_bit_is_found_by_checksum(sharded: Path, tmp_path: Path, name: str) -> None:
    """With recorded checksums, the checkpoint alone is enough, and every byte of it is covered."""
    import_checkpoint(sharded, tmp_path / "megatron", write=WriteOptions(checksum=True))
    assert verify(tmp_path / "megatron").equal
    file = tmp_path / "megatron" / "iter_0000000" / name

    flip(file, file.stat().st_size - 1, bit=3)

    differences = verify(tmp_path / "megatron").differences
    assert [(d.kind, d.name) for d in differences] == [("checksum", name)]


def test_lost_and_added_files_are_found_without_checksums(megatron: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(megatron, tmp_path / "megatron")) / "iter_0000000"
    (folder / "hf" / "generation_config.json").unlink()
    (folder / "__0_9.distcp").write_bytes(b"")
    (folder / "common.pt").write_bytes((folder / "common.pt").read_bytes() + b"more")

    differences = verify(folder).differences

    assert [(d.kind, d.name) for d in differences] == [
        ("file", "common.pt"), ("missing", "hf/generation_config.json"),
        ("unexpected", "__0_9.distcp"),
    ]  # fmt: skip


# ----------------------------------------------------------------- of what an interrupted run left


@pytest.mark.parametrize("count", [25, pytest.param(1000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("operation", ["import", "export"])
def test_a_damaged_file_of_an_interrupted_run_is_written_again(
    operation: str, count: int, sharded: Path, megatron: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Resetting the file's times doesn't hide the damage: the journal has times that only the
    kernel sets."""
    monkeypatch.setattr("megatron_olmo_bridge.convert.to_megatron.FILE_BYTES", 1 << 20)
    dst, partial = tmp_path / "dst", tmp_path / "dst.partial"

    def convert(**write: Any) -> None:
        if operation == "import":
            import_checkpoint(sharded, dst, write=WriteOptions(**write))
        else:
            options = ExportOptions(max_shard_size="1MB")
            export_checkpoint(megatron, dst, options, WriteOptions(**write))

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    convert()
    whole = contents(dst)
    shutil.rmtree(dst)
    rng = random.Random(count)
    for turn in range(count):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Stage, "write_text", interrupt)  # by then all weights are journaled
            convert()
        files = sorted(f for f in partial.rglob("*") if f.suffix in (".safetensors", ".distcp"))
        file = rng.choice(files)
        status = file.stat()
        kept = {f.relative_to(partial): f.stat().st_mtime_ns for f in files if f != file}
        flip(file, rng.randrange(status.st_size), rng.randrange(8))
        if turn % 2:
            os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))

        convert(resume=True)

        assert contents(dst) == whole, (turn, file)
        assert {name: (dst / name).stat().st_mtime_ns for name in kept} == kept
        shutil.rmtree(dst)


@pytest.mark.slow
def test_a_thousand_flipped_bits_of_a_finished_output_are_found(
    sharded: Path, tmp_path: Path
) -> None:
    """The recorded checksums alone reveal a flip in any byte of any file."""
    import_checkpoint(sharded, tmp_path / "megatron", write=WriteOptions(checksum=True))
    folder, rng = tmp_path / "megatron" / "iter_0000000", random.Random(0)
    files = sorted(f for f in folder.rglob("*") if f.is_file() and f.name != "olmo_bridge.json")
    for _ in range(1000):
        file = rng.choice(files)
        at, bit = rng.randrange(file.stat().st_size), rng.randrange(8)
        flip(file, at, bit)
        try:
            found = [(d.kind, d.name) for d in verify(folder).differences]
        except BridgeError:  # no longer a checkpoint
            assert file.name == "metadata.json"
            found = None
        flip(file, at, bit)
        assert found in (None, [("checksum", file.relative_to(folder).as_posix())])
