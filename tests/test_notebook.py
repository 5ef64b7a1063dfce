"""train.ipynb: the cells of train.py, in a kernel of Jupyter, with the detours that people take."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jupytext
import nbformat
import pytest
from test_train import (  # noqa: F401 (workdir is a fixture)
    ROOT,
    TINY,
    copy_code,
    files,
    metrics,
    trained,
    workdir,
)


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
        cell = nbformat.v4.new_code_cell(source.removeprefix("# fails\n"))
        if source.startswith("# fails"):
            cell.metadata["tags"] = ["raises-exception"]
        notebook.cells.append(cell)
    nbformat.write(notebook, "cells.ipynb")
    command = [sys.executable, "-m", "nbconvert", "--to", "notebook", "--execute", "--inplace"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}  # for config.py
    environment["JPY_SESSION_NAME"] = "/somewhere/mine.ipynb"  # as JupyterLab sets it
    done = subprocess.run(
        [*command, "cells.ipynb"], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    return str(nbformat.read("cells.ipynb", 4))


def cells_of(run_dir):
    """The cells of a tiny run in this directory."""
    values = {"run_dir": run_dir}
    for flag, value in zip(TINY[::2], TINY[1::2]):
        values[flag[2:].replace("-", "_")] = int(value) if value.isdigit() else value
    cells = code_cells()
    config = find(cells, "open_run(Config())")
    cells[config] = cells[config].replace("Config()", f"Config(**{values})")
    return cells


def fails(cell, old="", new=""):
    """The cell, edited; it may raise."""
    assert old in cell
    return "# fails\n" + cell.replace(old, new)


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
    config = find(cells, "open_run(Config())")
    model = find(cells, "class GPT")
    optimizers = find(cells, "class Muon")
    record = find(cells, "def resume():")
    loop = find(cells, "for step in todo:")
    result = find(cells, "# the result")
    stopped = fails(cells[loop], "stop_signal = 0", "stop_signal = signal.SIGINT")
    typo = fails(cells[loop], "        optimizer.step()", "        optimizer.step(); typo")
    one, two, three, four = (cells_of(name) for name in ("one", "two", "three", "four"))
    printed = execute(
        # run all; then the record's cell and all below it, without the config cell
        one
        + [fails(cells[record])]
        # edit the config cell, run all, but interrupt the loop and run it again
        + two[:loop]
        + [stopped]
        + two[loop:]
        # interrupted, then all cells again
        + three[:loop]
        + [stopped]
        + three
        # an error between two optimizers; the model's cell alone again; its optimizers', too
        + four[:loop]
        + [typo, four[model], fails(four[loop]), four[optimizers]]
        + four[loop:]
        # the config cell, and then the loop's
        + [cells_of("five")[config], fails(four[loop])]
        # another run, without the cells of the data, the model and the optimizers
        + cells_of("seven")[: config + 1]
        + [fails(cells[record])]
        # another run, without the loop
        + cells_of("eight")[:loop]
        + [fails(cells[result])]
        # a script inside the notebook has its own flags
        + [f"%run {ROOT}/train.py {' '.join(TINY)} --run-dir six"]
    )
    for run_dir in ("two", "three", "four", "six"):
        assert metrics(run_dir) == metrics("one"), run_dir
        assert Path(run_dir, "sample.txt").exists()
        assert Path(run_dir, "result.json").exists()
    assert os.listdir("five") == os.listdir("seven") == ["lock"]
    assert "run this cell again" in printed
    assert "error: this run has begun already" in printed
    assert "error: some weights of the model are in no optimizer" in printed
    assert "error: this is a new run" in printed
    assert "error: device is not of this config" in printed
    assert "error: this run is not trained" in printed and not Path("eight/result.json").exists()
    assert json.loads(Path("six/meta.json").read_text())["script"] == "train.py"

    # the record of a notebook trains when it is run as a script
    assert json.loads(Path("three/meta.json").read_text())["script"] == "mine.ipynb"
    recorded = Path("three/mine.py").read_text()
    assert recorded.count("for step in todo:") == 1
    Path("again.py").write_text(recorded.replace("'run_dir': 'three'", "'run_dir': 'again'"))
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "again.py"], env=environment, check=True)
    assert metrics("again") == metrics("one")

    # opened again: the weights are there, nothing is trained or written
    before = files("one")
    cells[config] = cells[config].replace("Config()", 'Config.load("one")')
    look = "sum(p.numel() for p in model.parameters()), evaluate()['val_loss']"
    opened = execute([*cells, look])
    assert str(metrics("one")[-1]["val_loss"]) in opened
    assert files("one") == before


# as if the first step were interrupted
STOP = """
import signal
from torch.optim.optimizer import register_optimizer_step_post_hook

register_optimizer_step_post_hook(lambda *_: globals().update(stop_signal=signal.SIGINT))
"""


@pytest.mark.parametrize("by", ["the same cells", "edited cells", "the script"])
def test_resumed_in_a_new_kernel_or_by_the_script(by):
    cells = cells_of("run")
    config = find(cells, "open_run(Config(")
    model = find(cells, "class GPT")
    loop = find(cells, "for step in todo:")
    stopping = list(cells[: loop + 1])
    stopping[config] += STOP
    stopping[loop] = fails(cells[loop])
    execute(stopping)
    assert Path("run/checkpoint.pt").exists() and not Path("run/result.json").exists()
    if by == "edited cells":
        assert "F.relu(h).square()" in cells[model]
        cells[model] = cells[model].replace("F.relu(h).square()", "F.relu(h)")
    if by == "the script":
        copy_code()
        Path("train.py").rename("mine.py")
        printed = trained("--run-dir", "run", script="mine.py").out
        assert "note:" not in printed
    else:
        printed = execute(cells)
    meta = json.loads(Path("run/meta.json").read_text())
    assert [start["step"] for start in meta["starts"]] == [0, 1]
    assert ("edited" in meta) == (by == "edited cells")
    noted = r"note: other cells ran than before in this run\n" in printed
    assert noted == (by == "edited cells")
