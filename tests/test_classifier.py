"""tests/classifier.py, another kind of experiment, goes the whole way."""
import difflib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jupytext
import pytest
from test_notebook import execute as execute_cells
from test_plot import execute as execute_plot
from test_sweep import TOP, write_sweep
from test_train import ROOT, TWO_PROCESSES, has_rows, kill, metrics, wait_until
from test_train import workdir  # noqa: F401 (a fixture)

FLAGS = "--steps 60 --eval-every 5 --log-every 1 --noise 0.05 --dtype float32".split()
FLAGS += ["--device", "cpu", "--wandb", "disabled"]

@pytest.fixture
def mine(workdir):  # noqa: F811
    """mine.py beside config.py, without any data."""
    shutil.copy(ROOT / "config.py", ".")
    shutil.copy(ROOT / "tests/classifier.py", "mine.py")
    Path("data.txt").unlink()

def start(*flags, launcher=()):
    command = [sys.executable, *launcher, "mine.py", *FLAGS, *flags]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

def train(*flags, code=0, **options):
    process = start(*flags, **options)
    out, _ = process.communicate(timeout=200)
    assert process.returncode == code, out
    return out

def test_it_is_four_hunks_and_each_of_its_fields_is_read():
    script = (ROOT / "train.py").read_text()
    text = (ROOT / "tests/classifier.py").read_text()
    lines = difflib.unified_diff(script.splitlines(), text.splitlines(), n=3)
    assert sum(line.startswith("@@") for line in lines) <= 4
    assert len(text.splitlines()) <= 300
    record = (ROOT / "config.py").read_text()
    own = text[text.index("class Config(Record)") : text.index("cfg, run = open_run")]
    shared = record[record.index("class Record") : record.index("def __setattr__")]
    for line in (own + shared).splitlines():
        if line.startswith("    ") and ": " in line and " = " in line:
            name = line.split(":")[0].strip()
            assert f"cfg.{name}" in text + record, name

def test_it_trains_resumes_exactly_and_equals_itself_in_two_processes(mine):
    help_text = train("--help")
    assert "--noise" in help_text and "--vocab-size" not in help_text
    out = train("--run-dir", "one")
    assert "note:" not in out
    result = json.loads(Path("one/result.json").read_text())
    assert list(result)[:2] == ["accuracy", "val_loss"]
    assert metrics("one")[0]["accuracy"] < 0.5 < result["accuracy"]
    assert metrics("one")[-1]["points"] == 60 * 64
    assert "step 40/60, train_loss " in out and ", accuracy 0." in out
    config = json.loads(Path("one/config.json").read_text())
    assert config["noise"] == 0.05 and "seq_len" not in config
    assert Path("one/code/0/mine.py").read_text() == Path("mine.py").read_text()
    assert f"one is finished: accuracy: {result['accuracy']:.5g}" in train("--run-dir", "one")
    refused = train("--run-dir", "one", "--classes", "3", code=1)
    assert "classes is 5 there, 3 here" in refused

    killed = start("--run-dir", "killed")
    wait_until(killed, lambda: has_rows("killed", 22))
    kill(killed)
    train("--run-dir", "killed")
    assert metrics("killed") == metrics("one")

    train("--run-dir", "two", launcher=TWO_PROCESSES)
    for row, other in zip(metrics("two"), metrics("one"), strict=True):
        # rounding, which training amplifies, and which moves some of the 2,000 points
        assert row == pytest.approx(other, rel=1e-3, abs=4e-3)

def test_its_notebook_form_and_a_sweep_and_its_figure_by_edits_of_first_lines(mine, monkeypatch):
    fields = "steps=60, eval_every=5, log_every=1, noise=0.05, dtype='float32', wandb='disabled'"
    cells = [cell.source for cell in jupytext.read("mine.py").cells if cell.cell_type == "code"]
    cells[0] = cells[0].replace("open_run(Config())", f"open_run(Config({fields}, run_dir='a'))")
    execute_cells(cells)
    train("--run-dir", "script")
    assert metrics("a") == metrics("script")

    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    top = TOP
    for old, new in [
        ("python train.py", "python mine.py"),
        ("best=min", "best=max"),
        ("(--sample-tokens 0)", "()"),
        ("in muon adamw;", "in adamw;"),
        ('--optimizer "$optimizer" ', ""),
        ("in 1e-3 3e-3 1e-2 3e-2 1e-1;", "in 1e-4 1e-2;"),
        ("in 1 2;", "in 1;"),
    ]:
        assert old in top
        top = top.replace(old, new)
    write_sweep(top)
    sweep = subprocess.run(["bash", "sweep.sh", *FLAGS], capture_output=True, text=True)
    assert sweep.returncode == 0, sweep.stdout + sweep.stderr
    results = {}
    for path in Path("runs/muon-or-adamw").glob("*/result.json"):
        results[path.parent.name] = json.loads(path.read_text())["accuracy"]
    first, second = "adamw-lr1e-2-seed1", "adamw-lr1e-4-seed1"
    assert results[first] > results[second]
    heading, *rows = sweep.stdout.splitlines()[-3:]
    assert heading.startswith("accuracy") and first in rows[0] and second in rows[1]

    printed, table, figures = execute_plot("print(axis.get_ylabel())", best="max")
    assert figures == 2 and "accuracy" in printed
    assert f"{results[first]:.3f}"[:4] in " ".join(table[1])
