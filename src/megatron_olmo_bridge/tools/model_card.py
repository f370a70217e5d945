"""README.md of a Hugging Face checkpoint: what the model is, where it is from, how it is loaded."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from megatron_olmo_bridge._version import __version__
from megatron_olmo_bridge.formats.hf_folder import CONFIG, read_config
from megatron_olmo_bridge.models.bridge import ModelBridge
from megatron_olmo_bridge.models.families import bridge_for
from megatron_olmo_bridge.storage.hub import HUB_ID
from megatron_olmo_bridge.storage.provenance import LIVE, read_provenance

MODEL_CARD = "README.md"
PACKAGE = "megatron-olmo-bridge"
_MADE_BY = {"export": "Converted", "average": "Averaged"}
_SHOWN_LABELS = 20
_MOST_ORIGINS = 8
"""Records that are followed, each naming what it was made from: they may name each other."""


def model_card(
    hf_config: dict[str, Any],
    *,
    name: str,
    base: str | None = None,
    license: str | None = None,
    training: dict[str, Any] | None = None,
    made_from: str | None = None,
) -> str:
    """The text of a model card: YAML front matter for the hub, then Markdown.

    Args:
        hf_config: the model's ``config.json``.
        name: what ``from_pretrained`` takes: ``owner/name``, or the folder's name.
        base: hub id of the model that this one was made from.
        license: as the hub names it, ``apache-2.0``; never guessed, so absent by default.
        training: how it was trained, by label: ``{"steps": 1000, "final loss": 2.31}``. A label
            whose value is a dict becomes a table of its own.
        made_from: a sentence that says by what the folder was written, and from what.

    Raises:
        BridgeError: the config is not of a model that this package knows.
    """
    from huggingface_hub import ModelCardData

    bridge = bridge_for(hf_config, CONFIG)
    task = "text-classification" if bridge.num_labels else "text-generation"
    data = ModelCardData(
        library_name="transformers", pipeline_tag=task, license=license, base_model=base
    )
    title = name.rpartition("/")[2]
    sections = [
        f"---\n{data.to_yaml().strip()}\n---",
        f"# {title}",
        _table(_facts(bridge, base)),
        *_training(training or {}),
        "## How to load it",
        f"```python\n{_usage(bridge, name)}\n```",
        "## Where it is from",
        made_from or f"Written by {PACKAGE} {__version__}.",
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

    What the folder was made from is read from the records beside its weights, and those beside what
    it was made from; of a local path only the name is told.

    Args:
        folder: with config.json.
        name: ``owner/name`` on the hub; by default the folder's name.
        base: hub id of the model that training began with; by default what the records say.
        license, training: as for :func:`model_card`.

    Returns:
        Whether a card was written.
    """
    file = folder / MODEL_CARD
    if file.exists():
        return False
    recorded, made_from = _origin(folder)
    text = model_card(
        read_config(folder),
        name=name or folder.resolve().name,
        base=base or recorded,
        license=license,
        training=training,
        made_from=made_from,
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
    simple = {label: value for label, value in facts.items() if not isinstance(value, dict)}
    tables = {label: value for label, value in facts.items() if isinstance(value, dict)}
    out = ["## How it was trained", *([_table(simple)] if simple else [])]
    for label, value in tables.items():
        out += [f"### {label[:1].upper()}{label[1:]}", _table(value)]
    return out


def _table(rows: dict[str, Any]) -> str:
    return "\n".join(
        ["| | |", "|---|---|", *(f"| {_cell(k)} | {_cell(v)} |" for k, v in rows.items())]
    )


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
    auto, task, text = "AutoModelForCausalLM", "text-generation", "Language models are"
    if bridge.num_labels:
        auto, task, text = (
            "AutoModelForSequenceClassification",
            "text-classification",
            "A text to classify",
        )
    return (
        f"from transformers import {auto}, AutoTokenizer, pipeline\n\n"
        f'model = {auto}.from_pretrained("{name}")\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{name}")\n'
        f'run = pipeline("{task}", model=model, tokenizer=tokenizer)\n'
        f'print(run("{text}"))'
    )


def _origin(folder: Path) -> tuple[str | None, str | None]:
    """The hub id that a folder was made from, if it was, and the sentence that says it all."""
    recorded = read_provenance(folder)
    if recorded is None:
        return None, None
    version = (recorded.get("versions") or {}).get(PACKAGE, __version__)
    source = str(recorded["source"])
    how = "Written" if source == LIVE else _MADE_BY.get(str(recorded.get("operation")), "Written")
    if source == LIVE:
        return None, f"{how} by {PACKAGE} {version} out of a running model."
    names = ", ".join(f"`{_without_path(name)}`" for name in source.split(", "))
    text = f"{how} by {PACKAGE} {version} from {names}"
    for _ in range(_MOST_ORIGINS):
        if not Path(source).is_absolute():
            break
        before = read_provenance(Path(source))
        if before is None:
            return None, f"{text}."
        source, commit = str(before["source"]), before.get("revision")
        text += f", which was made from `{_without_path(source)}`"
        text += f" at {commit}" if commit else ""
    return (source if HUB_ID.fullmatch(source) else None), f"{text}."


def _without_path(source: str) -> str:
    """A hub id as it is; of a path the name, of an iteration's folder its root's name too."""
    path = Path(source)
    if not path.is_absolute():
        return source
    is_part = path.name.startswith("iter_") or path.name == "release"
    return "/".join(path.parts[-2:] if is_part else path.parts[-1:])
