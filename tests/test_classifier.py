"""Another kind of experiment, made from train.py by tests/classifier.patch, goes the whole way."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_plot import execute
from test_train import (  # noqa: F401 (workdir is a fixture)
    ROOT,
    TINY,
    TWO_PROCESSES,
    copy_code,
    has_rows,
    kill,
    killed_and_resumed,
    metrics,
    refused,
    start,
    train,
    trained,
    wait_until,
    workdir,
    write_text,
)

SHORT = ["--steps", 60, "--batch-size", 64, "--warmup", 0, "--noise", 0.05]
FLAGS = [*SHORT, "--lr", 1e-2]


@pytest.fixture
def mine(workdir):  # noqa: F811
    """mine.py: train.py after the patch, beside config.py."""
    copy_code()
    patch = ROOT / "tests/classifier.patch"
    assert patch.read_text().count("\n@@ ") <= 10
    subprocess.run(["patch", "-s", "train.py", "-o", "mine.py", patch], check=True)
    Path("data.txt").unlink()  # it needs no text
    return Path("mine.py")


def test_classifier_trains_resumes_and_equals_itself_in_two_processes(mine):
    one = trained(*FLAGS, "--run-dir", "one", script=mine)
    assert "note:" not in one.out
    result = json.loads(Path("one/result.json").read_text())
    assert list(result)[:2] == ["accuracy", "val_loss"]
    assert metrics("one")[0]["accuracy"] < 0.5 < result["accuracy"]
    assert "step 40/60, loss" in one.out and ", accuracy 0." in one.out
    assert json.loads(Path("one/config.json").read_text())["noise"] == 0.05
    assert json.loads(Path("one/meta.json").read_text())["script"] == "mine.py"
    assert Path("one/mine.py").read_text() == mine.read_text()
    assert not Path("one/train.py").exists()
    again = trained(*FLAGS, "--run-dir", "one", script=mine)
    assert f"one is finished: accuracy: {result['accuracy']:.4f}" in again.out
    text = mine.read_text()
    mine.write_text(text.replace("self.blocks", "self.layers"))
    unnamed = train(*FLAGS, "--run-dir", "none", script=mine)
    refused(unnamed, "Muon takes the matrices of model.blocks, and there are none")
    mine.write_text(text.replace("@dataclass\n", ""))
    refused(train(*FLAGS, "--run-dir", "none", script=mine), "write @dataclass", code=1)
    mine.write_text(text.replace("noise: float = 0.1", "noise = 0.1"))
    untyped = train(*FLAGS, "--run-dir", "none", script=mine)
    refused(untyped, "a field of Config needs its type: noise: float = 0.1", code=1)
    mine.write_text(text)
    other = train(*FLAGS, "--run-dir", "one", "--classes", 3, script=mine)
    refused(other, "classes is 5 there, 3 here")

    assert killed_and_resumed(*FLAGS, script=mine) == metrics("one")

    trained(*FLAGS, "--run-dir", "two", script=mine, launcher=TWO_PROCESSES)
    for row, other in zip(metrics("two"), metrics("one"), strict=True):
        # rounding, which training amplifies, and which moves some of the 2,000 points
        assert row == pytest.approx(other, rel=1e-3, abs=4e-3)


def test_classifier_sweeps_and_is_drawn_by_edits_of_first_lines_alone(mine, monkeypatch):
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    text = (ROOT / "sweep.sh").read_text()
    for old, new in [
        ("python train.py", "python mine.py"),
        ("best=min", "best=max"),
        ("in muon adamw;", "in muon;"),
        ("in 1e-3 3e-3 1e-2 3e-2 1e-1;", "in 1e-4 1e-2;"),
        ("in 1 2;", "in 1;"),
    ]:
        assert old in text
        text = text.replace(old, new)
    Path("sweep.sh").write_text(text)
    flags = [*TINY, *map(str, SHORT)]
    sweep = subprocess.run(["bash", "sweep.sh", *flags], capture_output=True, text=True)
    assert sweep.returncode == 0, sweep.stdout + sweep.stderr
    folder = Path("runs/muon-or-adamw")
    results = {}
    for path in folder.glob("*/result.json"):
        results[path.parent.name] = json.loads(path.read_text())["accuracy"]
    first, second = "muon-lr1e-2-seed1", "muon-lr1e-4-seed1"
    assert results[first] > results[second]
    heading, *rows = sweep.stdout.splitlines()[-3:]
    assert "accuracy" in heading
    assert first in rows[0] and second in rows[1]

    probe = "print(axis.get_title(loc='left'), axis.get_ylabel())"
    text, table, figures = execute(probe, best="max")
    assert figures == 2
    assert f"{results[first]:.4g}, lr 0.01" in text
    assert "accuracy" in text
    assert [float(row[1]) for row in table[1:]] == [0.01, 0.0001]


def test_own_copy_of_config_with_a_field_of_any_type(mine):
    """Flags of its own in a copy of config.py: a tuple, a bool and a number or None resume."""
    text = Path("config.py").read_text().replace(
        "    # loop\n",
        "    betas: tuple[float, float] = (0.8, 0.95)  # of AdamW\n"
        "    nesterov: bool = True\n"
        "    clip: float | None = None  # largest norm of the gradient\n",
    )
    Path("mine_config.py").write_text(text)
    script = Path("train.py").read_text()
    script = script.replace("from config import", "from mine_config import")
    Path("mine.py").write_text(script.replace("betas=(0.8, 0.95)", "betas=cfg.betas"))
    write_text()
    flags = ["--run-dir", "run", "--betas", 0.7, 0.9, "--no-nesterov", "--clip", 1]
    killed = start(*flags, script="mine.py")
    wait_until(killed, lambda: has_rows("run", 12))
    kill(killed)
    trained(*flags, script="mine.py")
    config = json.loads(Path("run/config.json").read_text())
    assert config["betas"] == [0.7, 0.9]
    assert config["nesterov"] is False
    assert config["clip"] == 1
    assert Path("run/mine_config.py").read_text() == text
    refused(train(*flags[:2], script="mine.py"), "clip is 1.0 there, None here")
