"""Live models load and export every bit of their weights, by every method and at any layout."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

pytest.importorskip("megatron.core")

from live_layouts import LAYOUTS, digest, hf_tensors, reload_step, run_live, stored_names
from transformers import Olmo2ForCausalLM

pytest_plugins = ["live_runs"]


def digests_of(folder: Path) -> dict[str, str]:
    """Return a digest of every tensor of a Hugging Face folder by name."""
    return {name: digest(tensor) for name, tensor in hf_tensors(folder).items()}


def read(file: Path) -> dict[str, str]:
    """Return the digests of a recorded stream of weights by name; no name may occur twice."""
    pairs = json.loads(file.read_text())
    assert len(dict(pairs)) == len(pairs)
    return dict(pairs)


def size(tensors: Iterable[str], folder: Path) -> int:
    found = hf_tensors(folder)
    return sum(found[name].nbytes for name in tensors)


# ------------------------------------------------------------------------ Hugging Face and back


def test_an_exported_model_equals_the_loaded_one(models: Path, layout: str, results: Path) -> None:
    assert read(results / layout / "exported.json") == digests_of(models / LAYOUTS[layout].model)


def test_a_saved_folder_equals_the_loaded_one(models: Path, layout: str, results: Path) -> None:
    hf = models / LAYOUTS[layout].model
    assert digests_of(results / layout / "hf") == digests_of(hf)
    saved, config = (
        json.loads((f / "config.json").read_text()) for f in (results / layout / "hf", hf)
    )
    assert saved == config
    _, report = Olmo2ForCausalLM.from_pretrained(results / layout / "hf", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]


def test_each_process_reads_only_its_own_shards(models: Path, layout: str, results: Path) -> None:
    """Together they read every byte once, plus the bytes of which several processes hold copies."""
    hf = models / LAYOUTS[layout].model
    names = list(hf_tensors(hf))
    everything = size(names, hf)
    norms = size((name for name in names if "norm" in name), hf)
    copies = norms * (LAYOUTS[layout].tensor - 1) + everything * (LAYOUTS[layout].data - 1)
    if layout == "pp2-tied":  # the last stage uses the embedding as its output layer
        copies += size(["model.embed_tokens.weight"], hf)
    ranks = json.loads((results / layout / "bytes_read.json").read_text())
    print(f"{layout}: {sum(ranks)} bytes read by {len(ranks)}, of {everything}, copies {copies}")
    assert len(ranks) == LAYOUTS[layout].processes
    assert everything <= sum(ranks) <= 1.05 * everything + copies


# --------------------------------------------------------------------------- Megatron and back


@pytest.mark.parametrize("by", ["by_bridge", "by_megatron"])
def test_saved_checkpoint_loads_at_another_layout(
    models: Path, layout: str, results: Path, by: str
) -> None:
    """``save_megatron_model`` saves; ``load_megatron_model`` or stock dist_checkpointing.load
    loads."""
    then = LAYOUTS[layout].then
    loaded = read(results / layout / f"in-{then}" / f"{by}.json")
    assert loaded == digests_of(models / LAYOUTS[layout].model)


def test_one_process_loads_what_several_saved(models: Path, with_2: Path, with_4: Path) -> None:
    saved = [with_4 / "tp2-pp2", with_2 / "pp2-vpp2"]
    run_live([reload_step(models, folder, "tp1") for folder in saved], processes=1)
    for folder in saved:
        for by in ("by_bridge", "by_megatron"):
            assert read(folder / "in-tp1" / f"{by}.json") == digests_of(models / "plain")


def test_two_processes_load_what_one_saved(models: Path, with_1: Path) -> None:
    layouts = ("tp2-sp", "pp2")
    run_live([reload_step(models, with_1 / "tp1", layout) for layout in layouts], processes=2)
    for layout in layouts:
        for by in ("by_bridge", "by_megatron"):
            found = read(with_1 / "tp1" / f"in-{layout}" / f"{by}.json")
            assert found == digests_of(models / "plain")


@pytest.mark.parametrize("strict", ["assume_ok_unexpected", "raise_unexpected"])
@pytest.mark.parametrize("layout", ["tp1", "tp2", "pp2"])
def test_stock_megatron_loads_a_hugging_face_folder(
    models: Path, layout: str, strict: str, results: Path
) -> None:
    """Unmodified dist_checkpointing.load reads the folder through ``hf_as_megatron``."""
    assert read(results / f"stock-{layout}" / f"{strict}.json") == digests_of(models / "plain")


# ------------------------------------------------------------------------ the stream of weights

RANKS = 4


def streams(root: Path, name: str) -> list[list[list[str]]]:
    """Return name, digest and device of each tensor that each rank received at TP 2 x PP 2."""
    found = json.loads((root / "export" / f"{name}.json").read_text())
    assert len(found) == RANKS
    return found


def test_the_stream_has_every_tensor(models: Path, with_4: Path) -> None:
    for stream in streams(with_4, "all"):
        assert len(stream) == len(stored_names(models / "plain"))
        assert {name: found for name, found, _ in stream} == digests_of(models / "plain")


def test_the_stream_has_the_order_of_the_files(models: Path, with_4: Path) -> None:
    assert len(list((models / "plain").glob("*.safetensors"))) > 1
    for stream in streams(with_4, "all"):
        assert [name for name, _, _ in stream] == stored_names(models / "plain")


def test_the_stream_can_go_to_the_first_rank_only(with_4: Path) -> None:
    first, *others = streams(with_4, "rank 0")
    assert first == streams(with_4, "all")[0]
    assert others == [[]] * (RANKS - 1)


def test_the_stream_can_be_on_the_cpu(with_4: Path) -> None:
    everybody = streams(with_4, "cpu")
    assert {device for stream in everybody for _, _, device in stream} == {"cpu"}
    assert [[t[:2] for t in stream] for stream in everybody] == [
        [t[:2] for t in stream] for stream in streams(with_4, "all")
    ]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_stream_holds_one_tensor_at_a_time(models: Path, with_4: Path) -> None:
    """Memory grows by at most three times the largest tensor if the consumer keeps one at a
    time."""
    wide = models / "wide"
    names = stored_names(wide)
    large = [names.index("lm_head.weight"), names.index("model.embed_tokens.weight")]
    assert max(large) - min(large) == 1, "the hardest case: the largest two in a row"
    memory = json.loads((with_4 / "export" / "memory.json").read_text())
    assert memory["largest"] >= 64 << 20
    assert size(names, wide) >= 5 * memory["largest"], "holding all of it at once must show"
    factors = [grown / memory["largest"] for grown in memory["grown"]]
    print("grown, in largest tensors:", [f"{factor:.2f}" for factor in factors])
    assert min(factors) >= 1, "each rank is given whole tensors: less can't be right"
    assert max(factors) <= 3
