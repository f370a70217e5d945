"""Record of where a checkpoint came from: a small JSON file, without a time stamp."""

from __future__ import annotations

import contextlib
import hashlib
import json
import platform
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from megatron_olmo_bridge._version import __version__
from megatron_olmo_bridge.errors import FormatError
from megatron_olmo_bridge.formats.files import read_json
from megatron_olmo_bridge.formats.remote_path import AnyPath

from .fingerprint import is_fingerprint
from .plan import CopyPlan

PROVENANCE = "olmo_bridge.json"
FINGERPRINT = "fingerprint"
"""Key of the fingerprint of the weights, in the record of a conversion with checksums."""
TRAIN = "train"
"""Operation in the records of a run's checkpoints, which are sealed."""
_SEAL = "record_sha256"
"""Key of the SHA-256 of the record without this entry."""
LIVE = "a live model"
"""Source recorded for a checkpoint saved from a live model."""


@dataclass(frozen=True)
class Provenance:
    """What a record says about a conversion."""

    source: str
    """Folder or hub id."""
    revision: str | None = None
    """Commit on the hub."""
    options: dict[str, Any] = field(default_factory=dict)
    """Options that affect the output."""

    def encode(
        self, plan: CopyPlan, files: dict[str, dict[str, int | str]], fingerprint: str | None = None
    ) -> bytes:
        """Return the JSON file: the same bytes for the same conversion.

        Args:
            plan: plan of the conversion.
            files: size, and SHA-256 if it was computed, of each file by name.
            fingerprint: fingerprint of the weights, if it was computed.
        """
        value = {
            "operation": plan.operation,
            "source": self.source,
            "revision": self.revision,
            "options": self.options,
            "plan_sha256": plan.digest,
            "source_digest": plan.source_digest,
            "versions": versions(),
            **({FINGERPRINT: fingerprint} if fingerprint else {}),
            "files": files,
        }
        return json.dumps(value, indent=2).encode() + b"\n"


def sealed(record: dict[str, Any]) -> bytes:
    """Return the JSON of a record with its own SHA-256, which detects any change."""
    digest = hashlib.sha256(json.dumps(record).encode()).hexdigest()
    return json.dumps(record | {_SEAL: digest}, indent=2).encode() + b"\n"


def versions() -> dict[str, str]:
    """Return the versions of packages that affect the bytes of the output."""
    found = {"megatron-olmo-bridge": __version__, "python": platform.python_version()}
    with contextlib.suppress(PackageNotFoundError):
        found["torch"] = version("torch")
    return found


def read_provenance(folder: AnyPath) -> dict[str, Any] | None:
    """Return the record in a folder; None if there is none.

    Raises:
        FormatError: the record is damaged, or names a file outside the folder.
    """
    file = folder / PROVENANCE
    if not file.exists():
        return None
    value = read_json(file)
    files = value.get("files")
    if not (
        isinstance(value.get("source"), str)
        and isinstance(value.get("revision"), str | None)
        and isinstance(value.get("versions", {}), dict)
        and (FINGERPRINT not in value or is_fingerprint(value[FINGERPRINT]))
        and isinstance(files, dict)
        and all(_is_described(name, entry) for name, entry in files.items())
    ):
        raise FormatError(f"{file}: not the record of a conversion")
    if _SEAL in value or value.get("operation") == TRAIN:
        unsealed = {key: item for key, item in value.items() if key != _SEAL}
        if sealed(unsealed) != file.read_bytes():
            raise FormatError(f"{file}: damaged since it was written")
    return value


def _is_described(name: str, entry: Any) -> bool:
    """Return whether an entry is valid and names a file inside the folder."""
    path = Path(name)
    return (
        not path.is_absolute()
        and ".." not in path.parts
        and isinstance(entry, dict)
        and type(entry.get("bytes")) is int
        and isinstance(entry.get("sha256", ""), str)
    )
