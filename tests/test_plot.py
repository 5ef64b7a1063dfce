"""plot.ipynb over run directories of every kind."""

import json
import os
import subprocess
import sys
from pathlib import Path

import nbformat

ROOT = Path(__file__).parent.parent


def run(name, steps=20, until=20, final=None, script="train.py", **config):
    """A run directory as train.py leaves it."""
    folder = Path("runs/a-sweep", name)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(dict(steps=steps, run_dir=str(folder), n_layer=4, **config)))
    (folder / "meta.json").write_text(json.dumps(dict(command=f"{script} --lr 1")))
    rows = [dict(step=i, tokens=i * 10, seconds=i * 0.5, train_loss=3 - i / 10, lr=config["lr"]) for i in range(until + 1)]
    for row in rows[::10]:
        row["val_loss"] = final if final and row["step"] == until else 3 - row["step"] / 20
    if not final:
        rows[-1]["train_loss"] = None
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if until == steps and final:
        (folder / "sample.txt").write_text("text")
    return folder


def execute(x="lr"):
    """What the notebook prints and how many figures it draws."""
    notebook = nbformat.read(ROOT / "plot.ipynb", 4)
    notebook.cells[1].source = notebook.cells[1].source.replace('x = "lr"', f'x = "{x}"')
    nbformat.write(notebook, "plot.ipynb")
    command = [sys.executable, "-m", "nbconvert", "--to", "notebook", "--execute", "--inplace", "plot.ipynb"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})  # for config.py
    assert done.returncode == 0, done.stderr
    outputs = [output for cell in nbformat.read("plot.ipynb", 4).cells for output in cell.get("outputs", [])]
    assert not [output for output in outputs if output.get("name") == "stderr"]
    text = "".join(output.get("text", "") + output.get("data", {}).get("text/plain", "") for output in outputs)
    return text, sum("image/png" in output.get("data", {}) for output in outputs)


def test_no_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text, figures = execute()
    assert "0 runs" in text and "no figure: lr does not vary" in text


def test_a_run_that_ends_worse_than_it_began(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run("worse", lr=3.0, seed=1, final=283.0)
    text, figures = execute()
    assert figures == 1 and "1 runs; what varies: nothing" in text


def test_runs_of_every_kind(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed in (1, 2):
        run(f"muon-1-{seed}", optimizer="muon", lr=0.01, seed=seed, final=1.5 + seed / 10)
        run(f"muon-2-{seed}", optimizer="muon", lr=0.1, seed=seed, final=1.9 + seed / 10)
        run(f"adamw-1-{seed}", optimizer="adamw", lr=0.01, seed=seed, final=2.0 + seed / 10)
    run("adamw-2-1", optimizer="adamw", lr=0.1, seed=1, until=7)  # diverged
    going = run("adamw-3-1", optimizer="adamw", lr=0.001, seed=1, until=9, final=2.5)
    with open(going / "metrics.jsonl", "a") as f:
        f.write('{"step": 10, "tok')  # torn
    (run("half", optimizer="muon", lr=0.5, seed=1, final=1.0) / "config.json").write_text('{"steps"')
    (run("begun", optimizer="muon", lr=0.5, seed=1, final=1.0) / "metrics.jsonl").write_text("")
    text, figures = execute()
    assert figures == 2 and "8 runs; what varies: optimizer, lr, seed" in text
    assert "adamw-3-1: a torn line" in text and "adamw-3-1: stands at step 9 of 20" in text
    assert "half: " in text and "begun: nothing measured yet" in text
    table = text[text.index("seeds") :].splitlines()[1:]
    rows = [line.split()[1:] for line in table if "muon" in line or "adamw" in line]
    assert rows[0][:3] == ["muon", "0.01", "1.65"] and len(rows) == 4 and rows[0][-2:] == ["2", "0"]  # best first, seeds folded in
    assert rows[-1][:3] == ["adamw", "0.10", "NaN"] and rows[-1][-1] == "1"
    for name in ("curves", "summary"):
        assert Path(f"runs/{name}.png").stat().st_size > 5000 and Path(f"runs/{name}.pdf").exists()
    run("mine", optimizer="muon", lr=0.01, seed=1, final=1.55, script="mine.py", batch_size=32)  # 32 is what the others have by default
    text, figures = execute(x="optimizer")  # a field of words
    assert figures == 2 and "9 runs; what varies: optimizer, lr, script, seed" in text
