"""Pages that the site takes from elsewhere in the repository, and links between all of them."""

from __future__ import annotations

import re
import sys
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "src"), str(Path(__file__).parent)]

from drawn import DRAWN  # noqa: E402

ELSEWHERE = {
    "index.md": "README.md",
    "changelog.md": "CHANGELOG.md",
    "classify.md": "examples/classification/README.md",
    "contributing.md": "CONTRIBUTING.md",
    "recipes.md": "recipes/README.md",
}
"""Page to the file of the repository that it shows."""
PAGES = {source: page for page, source in ELSEWHERE.items()}
LINK = re.compile(r"\]\((?!https?:|mailto:|#)([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are not files of docs/."""
    for page, source in ELSEWHERE.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text()))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, **_: Any) -> str:
    """Point links to files of the repository at the page that shows them, or at the repository."""
    path = page.file.src_uri
    source = PurePosixPath(ELSEWHERE.get(path, f"docs/{path}"))
    here = PurePosixPath(path).parent

    def link(match: re.Match[str]) -> str:
        file = (ROOT / source.parent / match[1]).resolve().relative_to(ROOT).as_posix()
        target = PAGES.get(file) or PAGES.get(f"{file}/README.md")
        if target is None and file.startswith("docs/") and file.endswith(".md"):
            target = file.removeprefix("docs/")
        if target is None:
            kind = "tree" if (ROOT / file).is_dir() else "blob"
            return f"]({config.repo_url}/{kind}/main/{file}{match[2] or ''})"
        up = "../" * len(here.parts)
        return f"]({up}{target}{match[2] or ''})"

    markdown = LINK.sub(link, markdown)
    for comment, drawn in DRAWN.items():
        if comment in markdown:
            markdown = markdown.replace(comment, drawn())
    return markdown


def on_page_content(html: str, **_: Any) -> str:
    """Leave out the roles of docstrings, such as ``:func:``, which Markdown doesn't know."""
    return re.sub(r":(attr|class|data|func|meth|mod):<code>", "<code>", html)
