"""sweep.sh as a user runs, edits, interrupts and repeats it."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TINY = ("--data data.txt --n-layer 1 --n-head 1 --n-embd 16 --seq-len 32 --batch-size 8 --log-every 10 --eval-every 50 "
        "--eval-tokens 1024 --save-every 50 --sample-tokens 4 --device cpu --wandb disabled --steps 300").split()  # fmt: skip


@pytest.fixture(autouse=True)
def copy(tmp_path, monkeypatch):
    """A copy of the repo with a grid of two optimizers, two rates and one seed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    for name in ("train.py", "config.py", "sweep.sh"):
        shutil.copy(ROOT / name, ".")
    Path("data.txt").write_bytes(Path(os.__file__).parent.joinpath("argparse.py").read_bytes())
    edit("1e-3 3e-3 1e-2 3e-2 1e-1", "1e-3 1e-2")
    edit("seed in 1 2", "seed in 1")


def edit(old, new):
    text = Path("sweep.sh").read_text()
    assert text.count(old) == 1
    Path("sweep.sh").write_text(text.replace(old, new))


def start(*flags):
    return subprocess.Popen(["bash", "sweep.sh", *flags], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def sweep(*flags):
    process = start(*flags)
    process.out, process.err = process.communicate(timeout=200)
    return process


def losses():
    """The metrics of every run, without the times."""
    rows = {}
    for path in sorted(Path("runs").glob("*/*/metrics.jsonl")):
        rows[path.parent.name] = [json.loads(line) | {"seconds": 0} for line in path.read_text().splitlines()]
    return rows


def test_list_prints_the_lines_and_runs_nothing():
    lines = sweep("list", "--data", "my text.txt").out.splitlines()
    assert len(lines) == 4 and len(set(lines)) == 4 and not Path("runs").exists()
    assert all(line.startswith("python train.py --run-dir runs/muon-or-adamw/") and line.endswith(r"--data my\ text.txt") for line in lines)


def test_failures_are_named_finished_runs_skipped_and_a_grid_enlarged():
    edit("1e-3 1e-2", "1e6 1e-2")
    first = sweep(*TINY)
    assert first.returncode == 1, first.out + first.err
    assert first.out.count(" of 4  ") == 4 and first.out.count("FAILED: error: the loss is not finite") == 2
    assert first.out.count("val_loss: ") == 2 and " left\n" in first.out and "4 runs, 2 failed" in first.out
    assert "failed, see runs/muon-or-adamw/adamw-lr1e6-seed1/log.txt" in first.out
    before = losses()
    edit("1e6 1e-2", "1e-3 1e-2")
    edit("seed in 1", "seed in 1 2")
    again = sweep(*TINY)
    assert again.returncode == 0, again.out + again.err
    assert "8 runs, 0 failed" in again.out and again.out.count("after 300 steps") == 2  # the two that had finished
    assert len(losses()) == 10 and before.items() <= losses().items()


def test_interrupted_anywhere_the_same_line_gives_the_same_losses():
    assert sweep(*TINY).returncode == 0
    whole = losses()
    shutil.rmtree("runs")
    for number in (signal.SIGINT, signal.SIGTERM):
        process = start(*TINY)
        time.sleep(random.uniform(1, 7))
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
        assert process.returncode in (130, 0), out + err
        orphans = subprocess.run(["pgrep", "-f", f"{os.getcwd()}/runs|--run-dir runs/muon-or-adamw"], capture_output=True, text=True)
        assert not orphans.stdout, "left running"
    assert sweep(*TINY).returncode == 0
    assert losses() == whole


def test_shellcheck_finds_nothing():
    done = subprocess.run(["shellcheck", ROOT / "sweep.sh", ROOT / "slurm.sbatch"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
