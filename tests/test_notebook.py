"""train.ipynb: the cells of train.py, in a kernel of Jupyter, with the detours that people take."""
import json
import os
import subprocess
import sys
from pathlib import Path

import jupytext
import nbformat
import pytest
from test_train import ROOT, TINY, copy_code, files, metrics, trained, workdir  # noqa: F401

# as if Ctrl-C came in the first step
INTERRUPT = """
import os, signal
from torch.optim.optimizer import register_optimizer_step_post_hook

def interrupt(*_):
    hook.remove()
    os.kill(os.getpid(), signal.SIGINT)

hook = register_optimizer_step_post_hook(interrupt)
"""
# what somebody may write between the cells
SCRATCH = """
import torch

rank = world_size = 1
n_val = 3
cos = sin = None
dtype = torch.bfloat16
step = 3
seconds = 5.0
measures = {"foo": 1.0}
"""

def code_cells():
    notebook = nbformat.read(ROOT / "train.ipynb", 4)
    return [cell.source for cell in notebook.cells if cell.cell_type == "code"]

def find(cells, text):
    """The only cell with this text in it."""
    (index,) = [i for i, source in enumerate(cells) if text in source]
    return index

def cells_of(run_dir):
    """The cells of a tiny run in this directory."""
    values = {"run_dir": run_dir, "dtype": "float32"}
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
    command += ["cells.ipynb"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
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
    config = find(cells, "open_run(Config())")
    device = find(cells, "device_name = cfg.device")
    model = find(cells, "class GPT")
    optimizers = find(cells, "class Muon")
    loop = find(cells, "for step in range(begun")
    result = find(cells, "run.finish(")
    typo = fails(cells[loop], "        optimizer.step()", "        optimizer.step(); typo")
    one, two, three, four = (cells_of(name) for name in ("one", "two", "three", "four"))
    scratched = []
    for cell in cells_of("scratched"):
        scratched += [cell, SCRATCH]
    opened = [cells[config].replace("Config()", 'Config.load("one")'), *cells[config + 1 :]]
    gelu = [cell.replace("F.relu(h).square()", "F.gelu(h)") for cell in opened]
    assert gelu != opened
    printed = execute(
        # run all; scratch cells between
        one
        + scratched
        # interrupt the loop, and run it again
        + two[:loop]
        + [INTERRUPT, fails(cells[loop]), "cfg = None; model.eval()"]
        + [fails(cells[loop]), "cfg = run.cfg", two[loop]]
        # and at its end a typo: what is saved has no measures
        + [fails(cells[loop], "dict(val_loss=", "dict(val_loss=typo * "), fails(cells[result])]
        + two[loop:]
        # interrupted, then all cells again
        + three[:loop]
        + [INTERRUPT, fails(cells[loop])]
        + three
        # an error between two optimizers; the model's cell alone again; its optimizers', too
        + four[:loop]
        + [typo, four[model], fails(four[loop]), four[optimizers]]
        + four[loop:]
        # the config cell, and then one below, without those between
        + [cells_of("five")[config], fails(four[loop]), fails(four[model])]
        + [four[device], four[model], four[optimizers], fails(four[loop])]
        # a run that is not trained to its end; a field that is set too late
        + cells_of("six")[:loop]
        + [INTERRUPT, fails(cells[loop]), fails(cells[result])]
        + [fails("cfg.n_layer = 3")]
        # a script inside the notebook has its own flags
        + [f"%run {ROOT}/train.py {' '.join(TINY)} --dtype float32 --run-dir seven"]
        # opened again
        + opened
        + ["looked = sum(p.numel() for p in model.parameters())"]
        + gelu
    )
    for run_dir in ("scratched", "two", "three", "four", "seven"):
        assert metrics(run_dir) == metrics("one"), run_dir
        assert Path(run_dir, "sample.txt").read_bytes() == Path("one/sample.txt").read_bytes()
        result = json.loads(Path(run_dir, "result.json").read_text())
        assert result["val_loss"] == metrics("one")[-1]["val_loss"]
        assert result["steps"] == 40
    assert os.listdir("five") == ["lock"]
    assert not Path("six/result.json").exists()
    assert "error: optimizers is of another model: run its cell again" in printed
    for name in ("model", "device", "fingerprint"):
        assert f"name '{name}' is not defined" in printed
    assert printed.count("error: steps are left: run the loop") == 4
    assert "write Config(n_layer=3) in the config cell" in printed
    assert "cfg was replaced: set cfg = run.cfg" in printed
    value = metrics("one")[-1]["val_loss"]
    assert f"val_loss: {value:.5g} here, {value:.5g} recorded" in printed
    assert printed.count("note: other code, data or device; see one/code") == 1

    # the record of a notebook trains when it is run as a script
    recorded = Path("three/code/1/notebook.py").read_text()
    Path("again.py").write_text(recorded.replace("'run_dir': 'three'", "'run_dir': 'again'"))
    subprocess.run([sys.executable, "again.py"], check=True)
    assert metrics("again") == metrics("one")
    assert Path("three/code/1/config.py").read_bytes() == (ROOT / "config.py").read_bytes()

def test_resumed_in_a_new_kernel_and_by_the_script_and_opened_untouched():
    cells = cells_of("run")
    loop = find(cells, "for step in range(begun")
    execute([*cells[:loop], INTERRUPT, fails(cells[loop])])
    assert Path("run/checkpoint.pt").exists() and not Path("run/result.json").exists()
    copy_code()
    Path("train.py").rename("mine.py")
    trained("--run-dir", "run", "--dtype", "float32", script="mine.py")
    assert sorted(os.listdir("run/code")) == ["0", "1"]
    before = files("run")
    cells[0] = code_cells()[0].replace("Config()", 'Config.load("run")')
    printed = execute([*cells, "print(evaluate())"])
    assert f"{metrics('run')[-1]['val_loss']:.5g} recorded" in printed
    assert files("run") == before

# Whatever starts the kernel, sets __file__ or leaves flags: a cell is of no file.
@pytest.mark.parametrize(
    "names",
    [
        dict(file="<ipython-input-1-0>", argv=["colab_kernel_launcher.py", "-f", "x.json"]),
        dict(file="/tmp/ipykernel_1/2.py", argv=["-m", "--f=x.json"], name="exp.py"),  # VS Code
        dict(file="<input>", argv=["", "1", "2"], name="/opt/pycharm/pydevconsole.py"),
        dict(file="<stdin>", argv=[""]),  # python
        dict(file="/tmp/ipykernel_7/3.py", argv=["positron_language_server.py", "--port=1"]),
    ],
)
def test_every_front_end_is_a_notebook(names, monkeypatch):
    monkeypatch.setattr(sys, "argv", names["argv"])
    variables = {"__name__": "__main__"}
    if "name" in names:
        variables["__file__"] = names["name"]
    cells = cells_of("run")
    cells[0] = cells[0].replace("'steps': 40", "'steps': 2")
    for source in cells[:-1]:
        exec(compile(source, names["file"], "exec"), variables)
    assert variables["run"].notebook
    assert json.loads(Path("run/meta.json").read_text())["script"] == "notebook.py"
    assert len(metrics("run")) == 3

def test_ipython_runs_the_script_with_its_flags():
    command = [sys.executable, "-m", "IPython", str(ROOT / "train.py"), "--", *TINY, "--steps", "2"]
    done = subprocess.run([*command, "--run-dir", "run"], capture_output=True, text=True)
    assert "val_loss: " in done.stdout, done.stdout + done.stderr
    assert json.loads(Path("run/meta.json").read_text())["script"] == "train.py"
