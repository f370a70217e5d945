"""What a path holds."""

from pathlib import Path

import pytest

from megatron_olmo_bridge.checkpoints.hf import HFCheckpoint
from megatron_olmo_bridge.checkpoints.megatron import MegatronCheckpoint
from megatron_olmo_bridge.checkpoints.open import find_kind
from megatron_olmo_bridge.errors import InputError, UnsupportedError
from megatron_olmo_bridge.formats.hf_folder import HFFolder
from megatron_olmo_bridge.storage.stage import PARTIAL_MARKER

TORCH_DIST = '{"sharded_backend": "torch_dist"}'
TRACKER = "latest_checkpointed_iteration.txt"


def tree(root: Path, *names: str) -> Path:
    for name in names:
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(TORCH_DIST if file.name == "metadata.json" else "3")
    return root


def test_a_hugging_face_folder_is_found(tmp_path: Path) -> None:
    assert find_kind(tree(tmp_path, "config.json", "model.safetensors")) == (HFCheckpoint, tmp_path)


def test_an_iterations_folder_is_found(tmp_path: Path) -> None:
    folder = tree(tmp_path, "iter_0000003/metadata.json") / "iter_0000003"
    assert find_kind(folder) == (MegatronCheckpoint, folder)


def test_a_root_takes_the_trackers_iteration(tmp_path: Path) -> None:
    tree(tmp_path, "iter_0000003/metadata.json", "iter_0000002/metadata.json", TRACKER)
    assert find_kind(tmp_path) == (MegatronCheckpoint, tmp_path / "iter_0000003")
    assert find_kind(tmp_path, 2) == (MegatronCheckpoint, tmp_path / "iter_0000002")


def test_a_root_may_hold_a_config_as_well(tmp_path: Path) -> None:
    tree(tmp_path, "iter_0000003/metadata.json", TRACKER, "config.json")
    assert find_kind(tmp_path)[0] is MegatronCheckpoint


def test_a_root_without_a_tracker_was_interrupted(tmp_path: Path) -> None:
    tree(tmp_path, "iter_0000003/metadata.json")
    with pytest.raises(InputError, match="the save was interrupted"):
        find_kind(tmp_path)
    assert find_kind(tmp_path, 3)[0] is MegatronCheckpoint


@pytest.mark.parametrize("where", [".", "iter_0000003"])
def test_a_folder_that_is_being_written_is_refused(tmp_path: Path, where: str) -> None:
    tree(tmp_path, "iter_0000003/metadata.json", TRACKER, PARTIAL_MARKER)
    with pytest.raises(InputError, match="an interrupted conversion, not a checkpoint"):
        find_kind(tmp_path / where)


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (["iter_0000003/mp_rank_00/model_optim_rng.pt", TRACKER], "legacy format (mp_rank_00)"),
        (["mp_rank_00_001/model_optim_rng.pt"], "legacy format (mp_rank_00_001)"),
        (["iter_0000003/.metadata", TRACKER], "format torch_dcp or fsdp_dtensor"),
        (["iter_0000003/.metadata", "iter_0000003/train_state.pt", TRACKER],
         "format fsdp_dtensor"),
        ([".metadata"], "format torch_dcp or fsdp_dtensor"),
        (["adapter_config.json", "adapter_model.bin"], "LoRA"),
        (["pytorch_model.bin"], "PyTorch .bin weights"),
    ],
)  # fmt: skip
def test_other_kinds_are_refused_by_name(tmp_path: Path, names: list[str], says: str) -> None:
    with pytest.raises(UnsupportedError) as caught:
        find_kind(tree(tmp_path, *names))
    assert says in str(caught.value)


def test_another_backend_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "metadata.json").write_text('{"sharded_backend": "zarr"}')
    with pytest.raises(UnsupportedError, match="of format 'zarr', not torch_dist"):
        find_kind(tmp_path)


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (["README.md"], "not a checkpoint"),
        (["iter_0000003/x", TRACKER], "no metadata.json: an incomplete or foreign checkpoint"),
    ],
)
def test_what_is_not_a_checkpoint_is_refused(tmp_path: Path, names: list[str], says: str) -> None:
    with pytest.raises(InputError, match=says):
        find_kind(tree(tmp_path, *names))


def test_a_path_that_is_not_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file or folder"):
        find_kind(tmp_path / "absent")
    (tmp_path / "file").write_text("x")
    with pytest.raises(
        InputError,
        match="is a file, not a checkpoint: neither Hugging Face",
    ):
        find_kind(tmp_path / "file")


def hugging_face(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").touch()
    return folder


def test_the_root_of_a_trainers_run_names_its_checkpoints(tmp_path: Path) -> None:
    for step in (500, 1000, 9):
        hugging_face(tmp_path / f"checkpoint-{step}")
    (tmp_path / "runs").mkdir()
    with pytest.raises(InputError) as caught:
        find_kind(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path}: not a checkpoint itself. The checkpoints are in folders inside "
        "(checkpoint-9, checkpoint-500, checkpoint-1000): name one, "
        f"{tmp_path / 'checkpoint-1000'} for example."
    )


def test_the_root_of_a_trainers_run_with_a_config_names_its_checkpoints_too(tmp_path: Path) -> None:
    hugging_face(tmp_path / "checkpoint-9")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match=r"no safetensors files\. The checkpoints .*checkpoint-9"):
        HFFolder.read(tmp_path)


def test_a_models_folder_in_the_hubs_cache_names_its_snapshots(tmp_path: Path) -> None:
    cached = tmp_path / "models--allenai--OLMo-2--x"
    snapshot = hugging_face(cached / "snapshots" / ("a" * 40))
    (cached / "blobs").mkdir()
    with pytest.raises(InputError) as caught:
        find_kind(cached)
    assert str(caught.value) == (
        f"{cached}: not a checkpoint itself. The hub's cache: name {snapshot}, or "
        "allenai/OLMo-2--x."
    )
    with pytest.raises(InputError, match=f"name one, {snapshot} for example"):
        find_kind(cached / "snapshots")


def test_an_iteration_that_is_hugging_face_is_named(tmp_path: Path) -> None:
    """Folders as ``export --iteration all`` writes them."""
    folder = hugging_face(tmp_path / "iter_0000010")
    with pytest.raises(InputError, match=f"{folder}: a Hugging Face checkpoint; pass this folder"):
        find_kind(tmp_path, 10)
    assert find_kind(folder) == (HFCheckpoint, folder)
