"""Write no_magic.ipynb from the cells of train_and_convert.py, which ``# %%`` lines begin.

usage: python make_notebook.py
"""

from pathlib import Path

import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

HERE = Path(__file__).parent
SCRIPT, NOTEBOOK = HERE / "train_and_convert.py", HERE / "no_magic.ipynb"


def notebook() -> nbformat.NotebookNode:
    """The script's cells as a notebook without outputs: the same bytes each time."""
    cells = []
    for i, part in enumerate(("\n" + SCRIPT.read_text()).split("\n# %%")[1:]):
        kind, _, text = part.partition("\n")
        if kind == " [markdown]":
            lines = text.strip().splitlines()
            text = "\n".join(line.removeprefix("#").removeprefix(" ") for line in lines)
            cells.append(new_markdown_cell(text, id=f"cell-{i}"))
        else:
            cells.append(new_code_cell(text.strip(), id=f"cell-{i}"))
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return new_notebook(cells=cells, metadata={"kernelspec": kernel})


if __name__ == "__main__":
    nbformat.write(notebook(), NOTEBOOK)
