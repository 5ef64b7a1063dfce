"""train.ipynb: the cells of train.py, in a kernel of Jupyter, with the detours that people take."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jupytext
import nbformat
from test_train import ROOT, TINY, files, metrics, workdir  # noqa: F401 (a fixture)


def code_cells():
    notebook = nbformat.read(ROOT / "train.ipynb", 4)
    return [cell.source for cell in notebook.cells if cell.cell_type == "code"]


def find(cells, text):
    """The only cell with this text in it."""
    (index,) = [i for i, source in enumerate(cells) if text in source]
    return index


def execute(sources):
    """Run these cells in a kernel, those that begin with `# fails` may raise; return its output."""
    notebook = nbformat.v4.new_notebook()
    for source in sources:
        cell = nbformat.v4.new_code_cell(source)
        if source.startswith("# fails"):
            cell.metadata["tags"] = ["raises-exception"]
        notebook.cells.append(cell)
    nbformat.write(notebook, "cells.ipynb")
    command = [sys.executable, "-m", "nbconvert", "--to", "notebook", "--execute", "--inplace"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}  # for config.py
    done = subprocess.run(
        [*command, "cells.ipynb"], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    return str(nbformat.read("cells.ipynb", 4))


def test_notebook_is_the_script_and_shows_a_run():
    def cells(notebook):
        return [(cell.cell_type, cell.source.strip()) for cell in notebook.cells]

    notebook = nbformat.read(ROOT / "train.ipynb", 4)
    assert cells(notebook) == cells(jupytext.read(ROOT / "train.py"))
    figures = 0
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            figures += "image/png" in output.get("data", {})
    assert figures == 1


def test_runs_interrupts_errors_and_a_finished_run_opened_again():
    cells = code_cells()
    config, loop = find(cells, "open_run(Config())"), find(cells, "for step in todo:")
    flags = {}
    for flag, value in zip(TINY[::2], TINY[1::2]):
        flags[flag[2:].replace("-", "_")] = int(value) if value.isdigit() else value

    def cells_of(run_dir):
        values = flags | {"run_dir": run_dir}
        copy = list(cells)
        copy[config] = copy[config].replace("Config()", f"Config(**{values})")
        return copy

    stopped = "# fails\n" + cells[loop].replace("stop_signal = 0", "stop_signal = signal.SIGINT")
    typo = "# fails\n" + cells[loop].replace('text = f"loss', 'text = "" + typo + f"loss')
    assert cells[loop] not in (stopped[8:], typo[8:])
    whole = execute(
        # run all; edit the config cell, run all, but interrupt the loop and run it again
        cells_of("one")
        + cells_of("two")[:loop]
        + [stopped]
        + cells_of("two")[loop:]
        # interrupted, then all cells again
        + cells_of("three")[:loop]
        + [stopped]
        + cells_of("three")
        # an error in the loop, mended, and only its cell again
        + cells_of("four")[:loop]
        + [typo]
        + cells_of("four")[loop:]
        # a script inside the notebook has its own flags
        + [f"%run {ROOT}/train.py {' '.join(TINY)} --run-dir five"]
    )
    for run_dir in ("two", "three", "four", "five"):
        assert metrics(run_dir) == metrics("one"), run_dir
        assert Path(run_dir, "sample.txt").exists()
        assert Path(run_dir, "result.json").exists()
    assert "this cell again" in whole
    assert json.loads(Path("five/meta.json").read_text())["script"] == "train.py"

    # the record of a notebook trains when it is run as a script
    recorded = Path("one/train.py").read_text()
    assert recorded.count("for step in todo:") == 1
    Path("again.py").write_text(recorded.replace("'run_dir': 'one'", "'run_dir': 'six'"))
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "again.py"], env=environment, check=True)
    assert metrics("six") == metrics("one")

    # opened again: the weights are there, nothing is trained or written
    before = files("one")
    cells[config] = cells[config].replace("Config()", 'Config.load("one")')
    look = "sum(p.numel() for p in model.parameters()), evaluate()['val_loss']"
    opened = execute([*cells, look])
    assert str(metrics("one")[-1]["val_loss"]) in opened
    assert files("one") == before
