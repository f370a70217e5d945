"""Write a model card, the README.md of a Hugging Face checkpoint."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from megatron_olmo_bridge._version import __version__
from megatron_olmo_bridge.formats.hf_folder import CONFIG, read_config
from megatron_olmo_bridge.models.bridge import ModelBridge
from megatron_olmo_bridge.models.families import bridge_for
from megatron_olmo_bridge.storage.provenance import FINGERPRINT, LIVE, read_provenance
from megatron_olmo_bridge.storage.remote import HUB_ID

MODEL_CARD = "README.md"
PACKAGE = "megatron-olmo-bridge"
_VERBS = {"export": "Converted", "average": "Averaged"}
_SHOWN_LABELS = 20
_MOST_ORIGINS = 8
"""Maximum number of provenance records to follow, since they may form a circle."""


def model_card(
    hf_config: dict[str, Any],
    *,
    name: str,
    base: str | None = None,
    license: str | None = None,
    training: dict[str, Any] | None = None,
    made_from: str | None = None,
    fingerprint: str | None = None,
) -> str:
    """Return the text of a model card: YAML front matter for the hub, then Markdown.

    Args:
        hf_config: values of the model's ``config.json``.
        name: name for ``from_pretrained``: ``owner/name``, or the folder's name.
        base: hub id of the base model.
        license: the hub's name of the license, for example ``apache-2.0``.
        training: facts on the training by label: ``{"steps": 1000, "final loss": 2.31}``. A dict as
            a value becomes a table of its own.
        made_from: a sentence on how the folder was written, and from what.
        fingerprint: fingerprint of the weights.

    Raises:
        BridgeError: no family handles the config.
    """
    from huggingface_hub import ModelCardData

    bridge = bridge_for(hf_config, CONFIG)
    task = "text-classification" if bridge.num_labels else "text-generation"
    data = ModelCardData(
        library_name="transformers", pipeline_tag=task, license=license, base_model=base
    )
    sections = [
        f"---\n{data.to_yaml().strip()}\n---",
        f"# {name.rpartition('/')[2]}",
        _table(_facts(bridge, base)),
        *_training(training or {}),
        "## How to load it",
        f"```python\n{_usage(bridge, name)}\n```",
        "## Where it is from",
        made_from or f"Written by {PACKAGE} {__version__}.",
    ]
    if fingerprint is not None:
        sections += [
            "The fingerprint of the weights, which is the same in every format. To check a copy:",
            f"```\nolmo-bridge verify {name} --fingerprint {fingerprint}\n```",
        ]
    return "\n\n".join(sections) + "\n"


def write_model_card(
    folder: Path,
    *,
    name: str | None = None,
    base: str | None = None,
    license: str | None = None,
    training: dict[str, Any] | None = None,
) -> bool:
    """Write the card of a Hugging Face folder, unless there is a README.md already.

    The origin is read from provenance records, and so is the fingerprint, if it was recorded. The
    card has only the names of local paths.

    Args:
        folder: folder with config.json.
        name: ``owner/name`` on the hub; by default the folder's name.
        base: hub id of the base model; by default the recorded one.
        license, training: as for :func:`model_card`.

    Returns:
        True if a card was written.
    """
    file = folder / MODEL_CARD
    if file.exists():
        return False
    recorded_base, made_from = _origin(folder)
    record = read_provenance(folder) or {}
    text = model_card(
        read_config(folder),
        name=name or folder.resolve().name,
        base=base or recorded_base,
        license=license,
        training=training,
        made_from=made_from,
        fingerprint=record.get(FINGERPRINT),
    )
    file.write_text(text, encoding="utf-8")
    return True


def _facts(bridge: ModelBridge, base: str | None) -> dict[str, Any]:
    config = bridge.hf_config
    labels = list((config.get("id2label") or {}).values())
    facts = {
        "family": getattr(bridge.config, "label", bridge.family),
        "size": bridge.size_name(),
        "parameters": sum(map(math.prod, bridge.hf_shapes.values())),
        "dtype": config.get("dtype", config.get("torch_dtype")),
        "layers": bridge.num_layers,
        "hidden size": bridge.config.hidden_size,
        "vocabulary": bridge.vocab_size,
        "positions": bridge.config.max_position_embeddings,
        "classes": bridge.num_labels,
        "labels": labels if bridge.num_labels and len(labels) <= _SHOWN_LABELS else None,
        "made from": base,
    }
    return {label: value for label, value in facts.items() if value is not None}


def _training(facts: dict[str, Any]) -> list[str]:
    if not facts:
        return []
    tables = {label: value for label, value in facts.items() if isinstance(value, dict)}
    single = {label: value for label, value in facts.items() if label not in tables}
    sections = ["## How it was trained", *([_table(single)] if single else [])]
    for label, value in tables.items():
        sections += [f"### {label[:1].upper()}{label[1:]}", _table(value)]
    return sections


def _table(rows: dict[str, Any]) -> str:
    lines = [f"| {_cell(label)} | {_cell(value)} |" for label, value in rows.items()]
    return "\n".join(["| | |", "|---|---|", *lines])


def _cell(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list | tuple):
        return ", ".join(map(_cell, value))
    return str(value).replace("|", "\\|").replace("\n", " ")


def _usage(bridge: ModelBridge, name: str) -> str:
    if bridge.num_labels:
        auto, task = "AutoModelForSequenceClassification", "text-classification"
        text = "A text to classify"
    else:
        auto, task, text = "AutoModelForCausalLM", "text-generation", "Language models are"
    return (
        f"from transformers import {auto}, AutoTokenizer, pipeline\n\n"
        f'model = {auto}.from_pretrained("{name}")\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{name}")\n'
        f'run = pipeline("{task}", model=model, tokenizer=tokenizer)\n'
        f'print(run("{text}"))'
    )


def _origin(folder: Path) -> tuple[str | None, str | None]:
    """Return the hub id that a folder was made from, and a sentence on its origin, if recorded."""
    record = read_provenance(folder)
    if record is None:
        return None, None
    version = (record.get("versions") or {}).get(PACKAGE, __version__)
    source = str(record["source"])
    if source == LIVE:
        return None, f"Written by {PACKAGE} {version} out of a running model."
    verb = _VERBS.get(str(record.get("operation")), "Written")
    names = ", ".join(f"`{_without_path(name)}`" for name in source.split(", "))
    text = f"{verb} by {PACKAGE} {version} from {names}"
    for _ in range(_MOST_ORIGINS):
        if not Path(source).is_absolute():
            break
        record = read_provenance(Path(source))
        if record is None:
            return None, f"{text}."
        source, commit = str(record["source"]), record.get("revision")
        text += f", which was made from `{_without_path(source)}`"
        text += f" at {commit}" if commit else ""
    return (source if HUB_ID.fullmatch(source) else None), f"{text}."


def _without_path(source: str) -> str:
    """Return a path's last name, with the name of its root for an iteration; hub ids unchanged."""
    path = Path(source)
    if not path.is_absolute():
        return source
    is_part = path.name.startswith("iter_") or path.name == "release"
    return "/".join(path.parts[-2:] if is_part else path.parts[-1:])
