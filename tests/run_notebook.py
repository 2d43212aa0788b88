"""Runs a notebook's code cells in IPython, in a process of its own.

    python tests/run_notebook.py NOTEBOOK PARAMETERS

PARAMETERS is a file of Python that runs after the cell tagged `parameters`. What a cell shows as
HTML is written to `CELL_ID.html` in the current folder. Stops at the first cell that fails.
"""

import json
import pathlib
import sys

from IPython.core.interactiveshell import InteractiveShell


def main(notebook: str, parameters: str) -> None:
    """Run all code cells, in order."""
    shell = InteractiveShell.instance(colors="NoColor")
    cells = json.loads(pathlib.Path(notebook).read_text(encoding="utf-8"))["cells"]
    for cell in cells:
        if cell["cell_type"] != "code":
            continue
        source = "".join(cell["source"])
        if "parameters" in cell["metadata"].get("tags", []):
            source += "\n" + pathlib.Path(parameters).read_text(encoding="utf-8")
        found = shell.run_cell(source)
        if not found.success:
            sys.exit(f"cell {cell['id']} failed")
        if hasattr(found.result, "_repr_html_"):
            text = found.result._repr_html_()
            pathlib.Path(f"{cell['id']}.html").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
