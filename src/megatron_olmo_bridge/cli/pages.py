"""What the HTML pages of ``inspect --html`` and ``compare --html`` share."""

from __future__ import annotations

from pathlib import Path

from megatron_olmo_bridge.errors import InputError, OutputError
from megatron_olmo_bridge.storage.atomic import replace_file

STYLE = """<style>
:root { --c0: #2557c7; --c1: #d97706; --c2: #0f8a5f; --c3: #7a3fc0; --c4: #c4262e; --c5: #667085 }
@media (prefers-color-scheme: dark) {
  :root { --c0: #84abff; --c1: #ffb45c; --c2: #5fd3a4; --c3: #c59bff; --c4: #ff8b85; --c5: #97a1b3 }
}
.parameters { display: grid; gap: 1.5rem 1.25rem; margin-top: .9rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 19rem), 1fr)); }
article { min-width: 0; }
h3 { font: 600 .85rem ui-monospace, monospace; margin: 0; overflow-wrap: anywhere; }
article p, article li { color: var(--muted); font-size: .82rem; }
svg { display: block; width: 100%; height: 11rem; margin: .5rem 0; }
svg.whole { height: 3rem; }
svg.vector { height: 1rem; }
rect { vector-effect: non-scaling-stroke; }
svg.outlined rect { stroke: var(--card); stroke-width: 1px; }
rect:hover { opacity: .7; }
ul { list-style: none; margin: 0; padding: 0; }
li { display: flex; align-items: baseline; gap: .45em; overflow-wrap: anywhere; }
.errors { display: grid; grid-template-columns: auto minmax(4rem, 1fr) auto; gap: .3rem .9rem;
  align-items: center; margin-top: .9rem; font-size: .88rem; font-variant-numeric: tabular-nums; }
.errors svg { height: .8rem; margin: 0; }
.errors span { overflow-wrap: anywhere; }
.errors svg.cells { height: 1.1rem; }
.cells rect { stroke: var(--card); stroke-width: 1px; }
@media (max-width: 640px) {
  .errors { grid-template-columns: 1fr auto; }
  .errors span:nth-child(3n + 1) { grid-column: 1 / -1; }
}
.blocks, .blocks div { display: grid; gap: .4rem; }
.blocks { margin: .9rem auto 0; max-width: 30rem; }
.blocks div { border: 1px solid var(--line); border-radius: 8px; padding: .6rem .8rem; }
.blocks b { font-size: .82rem; font-weight: 600; }
.blocks p { color: var(--muted); font-size: .78rem; text-align: right; }
.blocks a { display: flex; justify-content: space-between; gap: 1rem; padding: .35rem .7rem;
  border: 1px solid var(--c0); border-radius: 6px; color: inherit; text-decoration: none;
  font: .82rem ui-monospace, monospace; }
.blocks a.vector { border: 1px dashed var(--muted); }
.blocks a:hover { background: var(--page); }
.blocks small { color: var(--muted); white-space: nowrap; }
i { flex: none; width: .8em; height: .8em; border-radius: 2px; }
</style>"""


def write_page(file: Path, text: str) -> None:
    """Write a page whole, in place of one of the same name.

    Raises:
        OutputError: The file can't be written.
    """
    try:
        replace_file(file, text)
    except OSError as error:
        raise OutputError(f"{file}: can't be written: {error.strerror}") from error


def check_page(file: Path | None) -> None:
    """Refuse a page's name before any work is done.

    Raises:
        InputError: the name doesn't end in ``.html``, so it may be a checkpoint's file.
        OutputError: There is no such folder.
    """
    if file is None:
        return
    if file.suffix != ".html":
        raise InputError(f"--html {file}: a page's name ends in .html")
    if not file.parent.is_dir():
        raise OutputError(f"--html {file}: no such folder: {file.parent}")
