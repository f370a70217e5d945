"""What pages show that is drawn from the source, when the site is built.

Needs neither torch nor megatron-core: the registry of mappings is plain Python.
"""

from __future__ import annotations

from pathlib import Path

import rooms

import megatron_olmo_bridge
from megatron_olmo_bridge.models.families import bridges

CONFIG_SECTIONS = """::: megatron_olmo_bridge.training.config
    options:
      filters: ["!^_", "!^TrainingConfig$"]
      show_root_heading: false
      show_root_toc_entry: false
"""
"""What mkdocstrings needs to show the dataclasses that TrainingConfig is made of."""


def picture_of_rooms() -> str:
    """Return the picture of the packages and what they import."""
    return rooms.svg(Path(str(megatron_olmo_bridge.__file__)).parent)


def public_names() -> str:
    """Return what mkdocstrings needs to show the public names, in the package's two groups."""
    groups = {
        "Without megatron-core": megatron_olmo_bridge._OFFLINE,
        "With megatron-core": megatron_olmo_bridge._WITH_MEGATRON,
    }
    text = ""
    for heading, names in groups.items():
        text += f"\n## {heading}\n"
        for name in sorted(names, key=str.lower):
            text += f"\n::: megatron_olmo_bridge.{names[name]}.{name}\n"
    return f"{text}\n## The sections of a training config\n\n{CONFIG_SECTIONS}"


def mapping_tables() -> str:
    """Return each family's table, with the shapes of its tiny model."""
    text = ""
    for bridge in bridges():
        name = next(size for size in bridge.sizes if size.endswith("-tiny"))
        registry = bridge(bridge.sizes[name]).mapping_registry()
        text += f"\n## {bridge.family}\n\nShapes of `{name}`.\n\n"
        text += "| Megatron | shape | Hugging Face | shape | rule |\n|---|---|---|---|---|\n"
        for row in registry.mappings:
            shapes = row.hf_shapes()
            hf = "<br>".join(map(code, shapes))
            hf_shapes = "<br>".join(str(list(shape)) for shape in shapes.values())
            cells = [code(row.megatron_param), str(list(row.megatron_shape)), hf, hf_shapes]
            text += f"| {' | '.join([*cells, type(row).__name__])} |\n"
        for pattern, reason in registry.ignored.items():
            text += f"| | | {code(pattern)} | | not converted: {reason} |\n"
    return text


def code(name: str) -> str:
    """Return a tensor's name that may break after each dot."""
    return "<code>" + name.replace("*", "&#42;").replace(".", ".<wbr>") + "</code>"


DRAWN = {
    "<!-- rooms -->": picture_of_rooms,
    "<!-- public names -->": public_names,
    "<!-- mapping tables -->": mapping_tables,
}
"""Comments in pages, each with what takes its place."""
