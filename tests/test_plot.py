"""plot.ipynb over run directories of every kind, executed as a reader would."""

import json
import os
import subprocess
import sys
import zlib
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parent.parent

# a last cell that prints what was drawn in the second figure
PROBE = """
print("title", axis.get_title(loc="left"))
for line in axis.lines:
    if line.get_markersize() == 12:
        print("ring", *line.get_xdata(), *line.get_ydata())
print("crosses", axis.collections[-1].get_offsets().data.round(6).tolist())
print("ticks", [tick.get_text() for tick in axis.get_xticklabels()])
"""


def run(name, final=None, until=20, y="val_loss", script="train.py", code="", meta=None, **config):
    """A run directory as train.py leaves it: finished, unfinished, or diverged without `final`."""
    folder = Path("runs", name)
    folder.mkdir(parents=True)
    config = dict(steps=20, lr=0.01, seed=1, data="stdlib") | config | dict(run_dir=str(folder))
    (folder / "config.json").write_text(json.dumps(config))
    (folder / script).write_text(code)
    made = dict(script=script, python="3.11.7", data=[100, 10, 7]) | (meta or {})
    (folder / "meta.json").write_text(json.dumps(made))

    rows = []
    for step in range(until + 1):
        row = dict(step=step, tokens=10 * step, lr=0.1)
        if step % 10 == 0:
            row[y] = 3 - step / 20
        if step == 20:
            row[y] = final
        else:
            row["train_loss"] = 3 - step / 20
        rows.append(row | dict(seconds=step / 2))
    if final is None:
        rows.append(dict(step=until, train_loss=None))
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metrics.jsonl").write_text(text)
    if final is not None and until == 20:
        result = {y: final, "train_seconds": 10 * final, "run_dir": str(folder)}
        (folder / "result.json").write_text(json.dumps(result))
    return folder


def execute(probe="", **first_cell):
    """Run all cells: what they print, the table, and how many figures there are."""
    notebook = nbformat.read(ROOT / "plot.ipynb", 4)
    edits = [f"{name} = {value!r}" for name, value in first_cell.items()]
    notebook.cells[1].source += "\n" + "\n".join(edits)
    notebook.cells.append(nbformat.v4.new_code_cell(probe))
    nbformat.write(notebook, "plot.ipynb")
    command = [sys.executable, "-m", "nbconvert", "--to", "notebook", "--execute", "--inplace"]
    path = f".{os.pathsep}{ROOT}"  # for config.py
    environment = os.environ | {"PYTHONPATH": path}
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
                lines = data["text/plain"].splitlines()
                table = [line.split() for line in lines]
    return text, table, figures


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_a_sweep_and_every_odd_case():
    for seed in [1, 2]:
        run(f"sweep/muon-{seed}", 1.5 + seed / 10, optimizer="muon", seed=seed)
        run(f"sweep/adamw-{seed}", 2.0 + seed / 10, optimizer="adamw", seed=seed)
    run("sweep/muon-high-1", 1.1, optimizer="muon", lr=0.1)
    run("sweep/muon-high-2", until=7, optimizer="muon", lr=0.1, seed=2)
    run("sweep/adamw-higher", until=7, optimizer="adamw", lr=1)
    going = run("going", 2.5, until=9, optimizer="adamw", lr=0.001)
    with open(going / "metrics.jsonl", "a") as f:
        f.write('{"step": 10, "tok')
    (run("torn") / "config.json").write_text('{"steps"')
    (run("fresh") / "metrics.jsonl").write_text("")
    run("classifier", 0.9, y="accuracy")
    run("again", 1.8, optimizer="muon")  # the config and seed of muon-1
    run("mine", 1.65, optimizer="muon", script="mine.py")
    run("other-data", 1.75, optimizer="muon", meta=dict(python="3.10.1", data=[90, 9, 5]))
    (run("no-meta", 1.9, optimizer="muon") / "meta.json").unlink()
    elsewhere = Path("runs").rename("elsewhere")
    Path("runs").mkdir()
    Path("runs/link").symlink_to(elsewhere.resolve())
    Path("runs/circle").symlink_to(Path("runs").resolve())

    text, table, figures = execute(PROBE, more=["train_seconds"])
    assert figures == 2
    assert "12 runs, told apart by lr, optimizer, data_version, code" in text
    for line in [
        "torn: not drawn: ",
        "fresh: not drawn: nothing is measured yet",
        "classifier: not drawn: it has no val_loss",
        "going: metrics.jsonl ends in a torn line",
        "going: unfinished at step 9 of 20",
        "muon-high-2: diverged at step 7 of 20",
        "adamw-higher: diverged at step 7 of 20",
        "no-meta: no meta.json",
        "python is 3.10.1 in 1 runs, such as runs/link/other-data",
        "data_version is [90, 9, 5] in 1 runs, such as runs/link/other-data",
    ]:
        assert line in text
    assert "again, runs/link/sweep/muon-1: one config and seed" in text

    # best first: lr, optimizer, data, code (script and checksum); mean, lowest, highest; seeds,
    # diverged; train_seconds. The run that went twice is one seed: (1.6 + 1.8) / 2
    rows = [" ".join(row[1:]) for row in table[1:]]
    assert rows == [
        "0.01 muon [100, 10, 7] mine.py 0 1.65 1.65 1.65 1 0 16.5",
        "0.01 muon [100, 10, 7] train.py 0 1.70 1.70 1.70 2 0 17.0",
        "0.01 muon [90, 9, 5] train.py 0 1.75 1.75 1.75 1 0 17.5",
        "0.01 muon None None 0 1.90 1.90 1.90 1 0 19.0",
        "0.01 adamw [100, 10, 7] train.py 0 2.15 2.10 2.20 2 0 21.5",
        "0.10 muon [100, 10, 7] train.py 0 1.10 1.10 1.10 2 1 11.0",
        "1.00 adamw [100, 10, 7] train.py 0 NaN NaN NaN 1 1 NaN",
    ]

    # where a seed diverged there is a cross and no best, whatever the other seed came to
    assert "ring 0.01 1.65\n" in text
    setting = "lr 0.01, optimizer muon, data_version [100, 10, 7], code mine.py"
    assert f"title best: 1.65, {setting}" in text
    assert "crosses [[0.1, " in text and "], [1.0, " in text
    for name in ["curves", "summary"]:
        assert Path(f"runs/{name}.png").stat().st_size > 5000
        assert Path(f"runs/{name}.pdf").exists()


def test_fields_of_any_type_and_the_highest_is_best():
    for clip, accuracy in [(None, 0.6), (0.5, 0.7), (10, 0.9), (2, 0.8)]:
        for flag in [None, True, False]:
            bonus = 0.05 if flag else 0
            fields = dict(clip=clip, flag=flag, betas=[1, 2])
            run(f"{clip}-{flag}", accuracy + bonus, y="accuracy", **fields)
    run("diverged", y="accuracy", clip=2.0, flag=True, betas=[3, 4])
    text, table, figures = execute(PROBE, x="clip", hue="flag", best="max")
    assert figures == 2
    assert "13 runs, told apart by clip, flag, betas" in text
    assert "title best: 0.95, clip 10, flag True, betas [1, 2]" in text
    assert "ring 10 0.95" in text
    assert "ticks ['0.5', '2', '10', 'None']" in text
    assert "crosses [[1.0, " in text  # on the second place
    assert [row[1:3] for row in table[1:5]] == [
        ["10", "True"],
        ["10", "False"],
        ["10", "None"],
        ["2", "True"],
    ]
    assert len(table) == 1 + 13


def test_code_that_was_edited_between():
    run("before", 283.0, code="a = 1")  # ends worse than it began
    run("after", 1.5, code="a = 2")
    run("other-seed", 1.7, code="a = 2", seed=2)
    text, table, figures = execute()
    assert figures == 2
    assert "3 runs, told apart by lr, code" in text
    assert [row[2:7] for row in table[1:]] == [
        ["train.py", f"{zlib.crc32(b'a = 2'):x}", "1.6", "1.5", "1.7"],
        ["train.py", f"{zlib.crc32(b'a = 1'):x}", "283.0", "283.0", "283.0"],
    ]


def test_code_that_differs_with_a_field_is_named():
    run("low", 1.5, code="a = 1")
    run("high", 1.4, code="a = 2", lr=0.1)
    text, table, figures = execute()
    assert "2 runs, told apart by lr\n" in text
    assert f"code is train.py {zlib.crc32(b'a = 2'):x} in 1 runs, such as runs/high" in text
    assert [row[1:3] for row in table[1:]] == [["0.10", "1.4"], ["0.01", "1.5"]]


def test_data_that_follows_from_a_field_or_the_seed():
    for horizon in [1, 2]:
        for seed in [1, 2]:
            data = [100, 10, 10 * horizon + seed]
            run(
                f"{horizon}-{seed}",
                horizon + seed / 10,
                seed=seed,
                horizon=horizon,
                meta={"data": data},
            )
    text, table, figures = execute()
    assert "4 runs, told apart by horizon\n" in text
    assert [row[1:] for row in table[1:]] == [
        ["1", "1.15", "1.1", "1.2", "2", "0"],
        ["2", "2.15", "2.1", "2.2", "2", "0"],
    ]


def test_data_that_changed_between_seeds():
    for seed in [1, 2, 3, 4]:
        data = [100, 10, 1] if seed < 3 else [200, 20, 2]
        run(f"seed-{seed}", 1 + seed / 10, seed=seed, meta={"data": data})
    text, table, figures = execute()
    assert "4 runs, told apart by lr, data_version\n" in text
    rows = [" ".join(row[1:]) for row in table[1:]]
    assert rows == [
        "0.01 [100, 10, 1] 1.15 1.1 1.2 2 0",
        "0.01 [200, 20, 2] 1.35 1.3 1.4 2 0",
    ]


def test_runs_of_wandb():
    run("local", 1.0)
    Path("wandb.py").write_text(
        """
class Run:
    def __init__(self, name, state, lr):
        self.name, self.state = name, state
        self.config = {"lr": lr, "steps": 1}
        self.summary_metrics = {"val_loss": 2.5, "_runtime": 9}

    def scan_history(self):
        yield {"_step": 0, "step": 0, "lr": 0.1, "val_loss": 3.0, "train_loss": 3.0, "seconds": 0}
        yield {"_step": 1, "step": 1, "lr": 0.1, "val_loss": 2.5, "seconds": 1}

class Api:
    def runs(self, path):
        assert path == "me/gpt"
        return [Run("one", "finished", 0.1), Run("two", "running", 0.2)]
"""
    )
    text, table, figures = execute(wandb_path="me/gpt")
    assert figures == 2 and "2 runs, told apart by lr" in text
    assert "two: unfinished at step 1 of 1" in text
    assert [row[1:3] for row in table[1:]] == [["0.1", "2.5"]]


def test_one_run_that_goes_on():
    run("going", 2.5, until=9)
    text, table, figures = execute()
    assert figures == 1 and "no second figure: no run is finished" in text
    assert "1 runs" in text


@pytest.mark.parametrize(
    "cell, says",
    [
        (dict(y="val_los"), "y is 'val_los', but there is only: val_loss, train_loss"),
        (dict(x="lrr"), "x is 'lrr', but there is only: lr, run_dir"),
        (dict(folder="rnus"), "there is no run to draw in 'rnus'"),
    ],
)
def test_a_wrong_name(cell, says):
    run("a", 1.5)
    run("b", 1.5, lr=0.1)
    text, table, figures = execute(**cell)
    assert f"error: {says}" in text and figures == 0
    assert not Path("rnus").exists()
