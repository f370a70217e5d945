"""Conversions under ``AutoBridge``'s names that build no model."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from megatron_olmo_bridge.checkpoints.megatron import MegatronCheckpoint
from megatron_olmo_bridge.checkpoints.megatron_config import RUN_CONFIG, model_section
from megatron_olmo_bridge.checkpoints.open import find_kind
from megatron_olmo_bridge.convert.options import ExportOptions, ImportOptions
from megatron_olmo_bridge.convert.to_hf import export_checkpoint
from megatron_olmo_bridge.convert.to_megatron import import_checkpoint
from megatron_olmo_bridge.errors import InputError
from megatron_olmo_bridge.models.megatron_bridge import LOADING, check_options
from megatron_olmo_bridge.storage.execute import WriteOptions
from megatron_olmo_bridge.storage.provenance import LIVE, read_provenance


class OfflineMethods:
    """Static methods of ``AutoBridge`` that read and write checkpoint files only."""

    @staticmethod
    def import_ckpt(
        hf_model_id: str | Path,
        megatron_path: str | Path,
        *,
        torch_dtype: str | torch.dtype | None = None,
        **options: Any,
    ) -> None:
        """Convert Hugging Face to Megatron without building the model.

        Args:
            hf_model_id: a folder or a hub id.
            megatron_path: the checkpoint root to create.
            torch_dtype: Megatron-Bridge's name for ``dtype``.
            options: fields of ``ImportOptions`` and ``WriteOptions``.
        """
        if torch_dtype not in (None, "auto"):
            options["dtype"] = torch_dtype
        read, write = _split("import_ckpt", ImportOptions, options)
        import_checkpoint(hf_model_id, megatron_path, ImportOptions(**read), WriteOptions(**write))

    @staticmethod
    def export_ckpt(megatron_path: str | Path, hf_path: str | Path, **options: Any) -> None:
        """Convert Megatron to Hugging Face without building the model.

        Args:
            megatron_path: a checkpoint root or an iteration's folder.
            hf_path: the folder to create.
            options: fields of ``ExportOptions`` and ``WriteOptions``.
        """
        read, write = _split("export_ckpt", ExportOptions, options)
        export_checkpoint(megatron_path, hf_path, ExportOptions(**read), WriteOptions(**write))

    @staticmethod
    def get_hf_model_id_from_checkpoint(path: str | Path) -> str | None:
        """Return the folder or hub id that a Megatron checkpoint was made from, if recorded.

        Raises:
            BridgeError: there is no checkpoint at ``path``.
        """
        kind, folder = find_kind(Path(path).expanduser())
        if kind is not MegatronCheckpoint:
            raise InputError(f"{path}: is not a Megatron checkpoint")
        recorded = read_provenance(folder)
        if recorded is not None and recorded["source"] != LIVE:
            return str(recorded["source"])
        run_config = folder / RUN_CONFIG
        section = model_section(run_config) if run_config.exists() else None
        identifier = (section or {}).get("hf_model_id")
        return None if identifier is None else str(identifier)


def _split(
    function: str, reading: type[ImportOptions | ExportOptions], options: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the keywords that are fields of an options class, and those of ``WriteOptions``."""
    names = {f.name for f in fields(WriteOptions)}
    known = check_options(function, names | {f.name for f in fields(reading)}, options, LOADING)
    write = {name: value for name, value in known.items() if name in names}
    return {name: value for name, value in known.items() if name not in names}, write
