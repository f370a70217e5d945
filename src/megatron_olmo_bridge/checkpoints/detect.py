"""What kind of checkpoint a path is, and by name the kinds that are not converted."""

from __future__ import annotations

from enum import Enum
from pathlib import Path

from megatron_olmo_bridge.errors import InputError, UnsupportedError, quote
from megatron_olmo_bridge.formats.dcp_metadata import METADATA
from megatron_olmo_bridge.formats.files import refuse_pointer
from megatron_olmo_bridge.formats.hf_folder import (
    hint_at_folders_inside,
    is_hf_folder,
    refuse_other_weights,
)
from megatron_olmo_bridge.formats.iterations import TRACKER, iteration_folder, iteration_folders
from megatron_olmo_bridge.formats.torch_dist import FORMAT_FILE, read_format
from megatron_olmo_bridge.storage.stage import PARTIAL_MARKER

_CONVERT_WITH_MEGATRON = (
    "Load it with the Megatron that wrote it and save it with --ckpt-format torch_dist "
    "(Megatron-LM: --ckpt-convert-format torch_dist), then export that."
)


class Kind(Enum):
    """The kinds of checkpoint that are converted into each other."""

    HF = "Hugging Face"
    MEGATRON = "Megatron torch_dist"
    OLM = "OLM"


def detect(path: Path, iteration: int | str | None = None) -> tuple[Kind, Path]:
    """What a path holds, and the very folder (of OLM: file) with the weights.

    Args:
        path: a Hugging Face folder, a Megatron checkpoint root or an iteration's folder, or a
            ``.pt`` file of OLM's trainer.
        iteration: for a root, the iteration; None takes the tracker's.

    Raises:
        InputError: nothing there, an interrupted conversion, or no checkpoint.
        UnsupportedError: a checkpoint of a kind that is not converted.
    """
    if not path.exists():
        raise InputError(f"{path}: no such file or folder")
    if path.is_file() and path.suffix == ".pt":
        refuse_pointer(path)
        return Kind.OLM, path
    if not path.is_dir():
        raise InputError(
            f"{path}: is a file; name the folder that holds the checkpoint (of OLM's trainer alone "
            "the file, step_N.pt)"
        )
    for folder in (path, path.resolve().parent):
        if (folder / PARTIAL_MARKER).exists():
            raise InputError(
                f"{folder}: an interrupted conversion, not a checkpoint. Run the same command "
                "again with --resume, or delete the folder."
            )
    if (path / FORMAT_FILE).is_file():
        _refuse_unless_torch_dist(path)
        return Kind.MEGATRON, path
    if (path / TRACKER).exists() or iteration is not None or iteration_folders(path):
        folder = iteration_folder(path, iteration)
        _refuse_other_megatron(folder)
        _refuse_unless_torch_dist(folder)
        return Kind.MEGATRON, folder
    _refuse_other_megatron(path)
    if is_hf_folder(path):
        return Kind.HF, path
    refuse_other_weights(path)
    if hint := hint_at_folders_inside(path):
        raise InputError(f"{path}: not a checkpoint itself. {hint}")
    raise InputError(
        f"{path}: not a checkpoint: neither Hugging Face (config.json and safetensors) nor "
        f"Megatron ({TRACKER}, or an iter_ folder with {FORMAT_FILE})"
    )


def _refuse_unless_torch_dist(path: Path) -> None:
    if not (path / FORMAT_FILE).is_file():
        if is_hf_folder(path):
            raise InputError(f"{path}: a Hugging Face checkpoint; name this very folder")
        raise InputError(f"{path}: no {FORMAT_FILE}: an incomplete or foreign checkpoint")
    for file in (f for f in path.rglob("*") if f.is_file()):
        refuse_pointer(file)
    if (name := read_format(path)) != "torch_dist":
        raise UnsupportedError(f"{path}: a Megatron checkpoint of format {quote(name)}, "
                               f"not torch_dist. {_CONVERT_WITH_MEGATRON}")  # fmt: skip


def _refuse_other_megatron(path: Path) -> None:
    if ranks := [p for p in (path, *sorted(path.iterdir())) if p.name.startswith("mp_rank_")]:
        raise UnsupportedError(
            f"{path}: a Megatron checkpoint of the legacy format ({ranks[0].name}), which has one "
            f"pickle for each parallel rank. {_CONVERT_WITH_MEGATRON}"
        )
    if (path / METADATA).is_file() and not (path / FORMAT_FILE).is_file():
        name = "fsdp_dtensor" if (path / "train_state.pt").exists() else "torch_dcp or fsdp_dtensor"
        raise UnsupportedError(
            f"{path}: a Megatron checkpoint of format {name} ({METADATA} without {FORMAT_FILE}), "
            f"not torch_dist. {_CONVERT_WITH_MEGATRON}"
        )
