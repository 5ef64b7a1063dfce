"""plot.ipynb over run directories of every kind."""
import contextlib
import io
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import pytest

ROOT = Path(__file__).parent.parent

def run(name, final=None, until=20, y="val_loss", tokens="tokens", code="a", meta=None, **config):
    """A run directory as train.py leaves it: finished, unfinished, or diverged without `final`."""
    folder = Path("runs", name)
    (folder / "code/0").mkdir(parents=True)
    (folder / "lock").touch()
    config = dict(steps=20, lr=0.01, seed=1) | config | dict(run_dir=str(folder))
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code/0/train.py").write_text(code)
    made = dict(began=1.0, script="train.py", data=[100, 7], start=0, torch="2", device="cpu")
    made |= dict(dtype="float32") | (meta or {})
    (folder / "meta.json").write_text(json.dumps(made))
    text = ""
    for step in range(until + 1):
        row = {"step": step, tokens: 10 * step, "lr": 0.1}
        if step % 10 == 0:
            row[y] = 3 - step / 20
        if step == 20:
            row[y] = final
        else:
            row["train_loss"] = 3 - step / 20
        text += json.dumps(row | dict(seconds=step / 2)) + "\n"
    if final is None:
        text += json.dumps(dict(step=until, train_loss=None)) + "\n"
    (folder / "metrics.jsonl").write_text(text)
    if final is not None and until == 20:
        result = {y: final, "steps": 20, "l0": 10 * final, "device": "cpu"}
        (folder / "result.json").write_text(json.dumps(result))
    return folder

def draw(**first_cell):
    """The cells in this process: what they print, the rows of the table, the second axis."""
    plt.switch_backend("Agg")
    plt.close("all")
    names, printed = {}, io.StringIO()
    cells = nbformat.read(ROOT / "plot.ipynb", 4).cells
    sources = [cell.source for cell in cells if cell.cell_type == "code"]
    sources[0] += "".join(f"\n{name} = {value!r}" for name, value in first_cell.items())
    with contextlib.redirect_stdout(printed), warnings.catch_warnings():
        warnings.simplefilter("error")
        # Of libraries among themselves, which no reader sees.
        libraries = "matplotlib|pyparsing"
        warnings.filterwarnings("ignore", category=DeprecationWarning, module=libraries)
        for source in sources:
            exec(source, names)
    rows = names["table"].round(4).astype(object).values.tolist()
    table = [" ".join(map(str, row)) for row in rows]
    return printed.getvalue(), table, names["axis"]

def crosses(axis):
    return axis.collections[-1].get_offsets().data[:, 0].tolist()

def execute(probe="", **first_cell):
    """Run all, as a reader would: what the cells print, the table, how many figures there are."""
    notebook = nbformat.read(ROOT / "plot.ipynb", 4)
    edits = [f"{name} = {value!r}" for name, value in first_cell.items()]
    notebook.cells[1].source += "\n" + "\n".join(edits)
    notebook.cells.append(nbformat.v4.new_code_cell(probe))
    nbformat.write(notebook, "plot.ipynb")
    command = [sys.executable, "-m", "nbconvert", "--to", "notebook", "--execute", "--inplace"]
    environment = os.environ | {"PYTHONPATH": f".{os.pathsep}{ROOT}"}  # for config.py
    done = subprocess.run([*command, "plot.ipynb"], capture_output=True, text=True, env=environment)
    if done.returncode != 0:
        return done.stderr, [], 0
    text, table, figures = "", [], 0
    for cell in nbformat.read("plot.ipynb", 4).cells:
        for output in cell.get("outputs", []):
            assert output.get("name") != "stderr", output
            data = output.get("data", {})
            text += output.get("text", "")
            figures += "image/png" in data
            if "text/html" in data:
                table = [line.split() for line in data["text/plain"].splitlines()]
    return text, table, figures

@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(ROOT)

def test_a_sweep_as_a_reader_runs_it():
    for seed in [1, 2]:
        run(f"muon-{seed}", 1.5 + seed / 10, optimizer="muon", seed=seed)
        run(f"adamw-{seed}", 2.0 + seed / 10, optimizer="adamw", seed=seed)
    text, table, figures = execute()
    assert figures == 2 and "note:" not in text
    assert [row[1:] for row in table[1:]] == [
        ["muon", "1.65", "1.6", "1.7", "2", "0"],
        ["adamw", "2.15", "2.1", "2.2", "2", "0"],
    ]
    for name in ["curves.png", "curves.pdf", "summary.png", "summary.pdf"]:
        assert Path("runs", name).stat().st_size > 5000

def test_what_is_not_drawn_is_named_and_the_rest_drawn():
    for seed in [1, 2]:
        run(f"good-{seed}", 1.5 + seed / 10, seed=seed)
    run("high-1", 1.1, lr=0.1)
    run("high-2", until=7, lr=0.1, seed=2)
    going = run("going", 2.5, until=9, lr=0.001)
    with open(going / "metrics.jsonl", "a") as f:
        f.write('{"step": 10, "tok')
    (run("torn", 1.0) / "config.json").write_text('{"steps"')
    (run("missing", 1.0) / "meta.json").unlink()
    run("accuracy", 0.9, y="accuracy")
    run("again", 1.9, meta=dict(began=2.0))  # the later of one config and seed
    run("good-2/inner", 1.2, lr=0.03)
    text, table, axis = draw()
    assert "runs/going: unfinished at step 9 of 20" in text
    assert "runs/high-2: diverged at step 7 of 20" in text
    assert "runs/torn: left out: " in text and "runs/missing: left out: " in text
    assert "left out, without val_loss: runs/accuracy" in text
    assert "a later run has its config and seed: runs/good-1\n" in text
    assert "runs/good-2 is a run, and holds: runs/good-2/inner\n" in text
    assert table == ["0.03 1.2 1.2 1.2 1 0", "0.01 1.8 1.7 1.9 2 0", "0.1 1.1 1.1 1.1 2 1"]
    assert crosses(axis) == pytest.approx([0.1])
    assert axis.lines[-1].get_xydata().tolist() == [[0.03, 1.2]]  # the ring

def test_nothing_finished_is_a_line_and_no_second_figure():
    run("going", 2.5, until=9, tokens="samples")
    text, table, axis = draw(y="val_loss")
    assert "no second figure: no run is finished\n" in text and table == []
    assert Path("runs/curves.png").exists() and not Path("runs/summary.png").exists()
    for cell in [dict(y="val_los"), dict(x="lrr"), dict(folder="rnus")]:
        with pytest.raises(SystemExit, match="error: "):
            draw(**cell)

def test_the_measure_is_the_results_first_and_fields_are_in_order():
    for clip, accuracy in [(None, 0.6), ("auto", 0.5), (10, 0.9), (2.0, 0.8)]:
        for flag in [None, True]:
            bonus = 0.05 if flag else 0
            fields = dict(clip=clip, flag=flag, betas=[1, 2])
            run(f"{clip}-{flag}", accuracy + bonus, y="accuracy", tokens="samples", **fields)
    text, table, axis = draw(x="clip", hue="flag", best="max")
    assert axis.get_ylabel() == "accuracy"
    assert table[0] == "10 True 0.95 0.95 0.95 1 0"
    axis.figure.canvas.draw()
    assert [tick.get_text() for tick in axis.get_xticklabels()] == ["2", "10", "auto", "None"]
    assert [text.get_text() for text in axis.get_legend().texts] == ["True", "None"]

def test_zero_stands_apart_from_decades_and_a_measure_is_an_axis():
    for beta in [0, 0.1, 1, 10]:
        run(f"{beta}", 1.5 + beta / 10, beta=beta, size=int(beta), code=f"{beta > 0}")
    text, table, axis = draw(x="beta")
    places = axis.transData.transform([(beta, 1.5) for beta in [0, 0.1, 1, 10]])[:, 0]
    assert min(places[1:] - places[:-1]) > 50
    text, table, axis = draw(x="l0", hue="meta.code")
    assert [float(row.split()[0]) for row in table] == [15, 15.1, 16, 25]
    assert axis.get_xlabel() == "l0" and len(table) == 4

def test_other_code_and_data_are_a_line_each():
    run("one", 1.5, code="a = 1")
    run("two", 1.6, code="a = 2", seed=2, meta=dict(data=[90, 5]))
    grown = run("grown", 1.7, code="a = 1\nb = 1", seed=3)
    both = run("both", 1.8, code="a = 3", seed=4)
    for folder, code in [(grown, "a = 1\nb = 1\nc = 1"), (both, "a = 4")]:
        (folder / "code/10").mkdir()
        (folder / "code/10/train.py").write_text(code)
        meta = json.loads((folder / "meta.json").read_text()) | dict(start=10)
        (folder / "meta.json").write_text(json.dumps(meta))
    text, table, axis = draw()
    assert "note: runs by meta.data: {'[100, 7]': 3, '[90, 5]': 1}" in text
    assert "note: runs by meta.code: {'train.py " in text and "meta.torch" not in text
    assert "runs/both: trained by two codes" in text and "runs/grown" not in text
    assert table == ["0.01 1.65 1.5 1.8 4 0"]
    assert len(draw(hue="meta.code")[1]) == 4
