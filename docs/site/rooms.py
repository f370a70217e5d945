"""The picture of the rooms: packages in rows, an arrow from each to what it imports below."""

from __future__ import annotations

import ast
from pathlib import Path

WIDTH, ROW, BOX, TALL, MARGIN = 760, 78, 136, 34, 130
"""Pixels: the picture's width, a row's height, a box's width and height, where long arrows go."""


def imports(package: Path) -> dict[str, set[str]]:
    """Return the rooms of a package, each with the rooms that its files import."""
    rooms = {p.name for p in package.iterdir() if p.is_dir() and any(p.glob("*.py"))}
    rooms -= {"recipes"}  # a link to the folder of recipes
    return {
        room: {name for file in (package / room).rglob("*.py") for name in imported(file, package)}
        & rooms - {room}
        for room in sorted(rooms)
    }


def imported(file: Path, package: Path) -> set[str]:
    """Return the rooms, and the modules beside them, that a file imports."""
    found = set()
    parts = file.relative_to(package).parts[:-1]
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            base = [package.name, *parts][: len(parts) + 2 - node.level] if node.level else []
            names = ".".join([*base, *([node.module] if node.module else [])]).split(".")
            if names[0] == package.name and len(names) > 1:
                found.add(names[1])
    return found


def rows(graph: dict[str, set[str]]) -> dict[str, int]:
    """Return the row of each room: 0 imports no other, each other stands above all it imports."""
    depth: dict[str, int] = {}

    def visit(room: str) -> int:
        if room not in depth:
            depth[room] = 1 + max((visit(below) for below in graph[room]), default=-1)
        return depth[room]

    for room in graph:
        visit(room)
    return depth


def direct(graph: dict[str, set[str]]) -> dict[str, set[str]]:
    """Return the arrows without those that follow from others."""

    def reached(room: str) -> set[str]:
        return graph[room].union(*(reached(below) for below in graph[room]))

    return {
        room: {b for b in below if not any(b in reached(other) for other in below - {b})}
        for room, below in graph.items()
    }


def svg(package: Path) -> str:
    """Return the picture, in the colors of the page that shows it."""
    graph = imports(package)
    depth = rows(graph)
    highest = max(depth.values())
    place: dict[str, tuple[float, float]] = {}
    for level in range(highest + 1):
        here = [room for room in graph if depth[room] == level]
        for i, room in enumerate(here):
            place[room] = (WIDTH * (i + 1) / (len(here) + 1), (highest - level) * ROW + TALL)
    arrows, boxes = [], []
    for room, below in direct(graph).items():
        x, y = place[room]
        for other in sorted(below):
            to_x, to_y = place[other]
            start, end = y + TALL / 2, to_y - TALL / 2 - 6
            middle = (start + end) / 2
            curve = f"C{x:.0f} {middle:.0f} {to_x:.0f} {middle:.0f}"
            if depth[room] - depth[other] > 1:  # around the boxes between
                side = MARGIN if to_x < WIDTH / 2 else WIDTH - MARGIN
                curve = f"C{x:.0f} {start + 20:.0f} {side} {start:.0f} {side} {middle:.0f}"
                curve += f"S{to_x:.0f} {end - 25:.0f}"
            arrows.append(f'<path d="M{x:.0f} {start:.0f}{curve} {to_x:.0f} {end:.0f}"/>')
        boxes.append(
            f'<rect x="{x - BOX / 2:.0f}" y="{y - TALL / 2:.0f}" width="{BOX}" height="{TALL}" '
            f'rx="6"/><text x="{x:.0f}" y="{y + 5:.0f}">{room}/</text>'
        )
    head = '<marker id="head" viewBox="0 0 8 8" refX="2" refY="4" markerWidth="7" '
    head += 'markerHeight="7" orient="auto"><path d="M0 0L8 4L0 8z"/></marker>'
    return (
        f'<svg class="rooms" viewBox="0 0 {WIDTH} {highest * ROW + 2 * TALL}" role="img" '
        f'aria-label="Packages and what they import"><defs>{head}</defs>'
        f'<g class="arrows">{"".join(arrows)}</g>{"".join(boxes)}</svg>'
    )
