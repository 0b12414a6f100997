# SPDX-License-Identifier: Apache-2.0
"""
Runs the notebooks in docs/notebooks and keeps what they print and draw.

    python docs/run_notebooks.py                                          after a change of what they show
    python docs/run_notebooks.py --repository ME/modeling_vit_scratch     puts your GitHub address into the badges

All run in one process, so that torch is imported once. They need the extra `test`.
"""

import argparse
import os
import re
from pathlib import Path

import nbformat
from nbclient import NotebookClient


FOLDER = Path(__file__).parent / "notebooks"
NAMES = ("classify_your_photos", "what_a_vit_sees", "from_paper_to_code")


def run_all(folder: Path, timeout: int = 300) -> dict[str, nbformat.NotebookNode]:
    """The notebooks with their outputs, run in `folder`. Raises CellExecutionError with the traceback of a cell."""
    notebooks = {name: nbformat.read(FOLDER / f"{name}.ipynb", as_version=4) for name in NAMES}
    cells = []
    for notebook in notebooks.values():
        fresh = nbformat.v4.new_code_cell(f"%reset -f\nimport os\nos.chdir({str(folder)!r})")
        cells += [fresh, *notebook.cells]
    metadata = notebooks[NAMES[0]].metadata
    client = NotebookClient(nbformat.v4.new_notebook(cells=cells, metadata=metadata), timeout=timeout)
    os.environ.setdefault("TQDM_DISABLE", "1")
    client.execute()
    for cell in cells:
        cell.metadata.pop("execution", None)  # times
        # Warnings and bars are of this machine.
        cell["outputs"] = [output for output in cell.get("outputs", []) if output.get("name") != "stderr"]
        if cell.cell_type == "markdown":
            del cell["outputs"]
    for notebook in notebooks.values():
        for number, cell in enumerate((cell for cell in notebook.cells if cell.cell_type == "code"), start=1):
            cell.execution_count = number
            for output in cell.outputs:
                if "execution_count" in output:
                    output.execution_count = number
    return notebooks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repository", help="owner and name on GitHub, for the badges")
    arguments = parser.parse_args()
    if arguments.repository:
        for file in FOLDER.glob("*.ipynb"):
            text = file.read_text(encoding="utf-8")
            text = re.sub(r"(github(?:\.com)?/)[\w-]+/modeling_vit_scratch", rf"\g<1>{arguments.repository}", text)
            file.write_text(text, encoding="utf-8")
    for name, notebook in run_all(FOLDER).items():
        file = FOLDER / f"{name}.ipynb"
        nbformat.write(notebook, file)
        print(f"{file} ({file.stat().st_size:,} bytes)")


if __name__ == "__main__":
    main()
