"""sweep.sh as a user runs, edits, interrupts and repeats it."""

import json
import os
import pty
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TINY = (
    "--data data.txt --n-layer 1 --n-head 1 --n-embd 16 --seq-len 32 --batch-size 8 "
    "--log-every 10 --eval-every 50 --eval-tokens 1024 --device cpu "
    "--wandb disabled --steps 200"
).split()
RUNS = "runs/muon-or-adamw"

# another experiment: its measure is an accuracy, it may fail, and it takes no time
MINE = """
import json, os, sys, time

flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
print("a NUL byte: \\0")
print("gpu:", os.environ.get("CUDA_VISIBLE_DEVICES"), flush=True)
time.sleep(float(flags.get("--sleep", 0)))
if flags["--x"] == "killed":
    os.kill(os.getpid(), 9)
result = {"accuracy": float(flags["--x"]), "steps": 1}
with open(flags["--run-dir"] + "/result.json", "w") as f:
    json.dump(result, f, indent=2)
"""


@pytest.fixture(autouse=True)
def copy(tmp_path, monkeypatch):
    """A copy of the repo, in a shell without variables that the sweep would obey."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    for name in ("JOBS", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    for name in ("train.py", "config.py", "sweep.sh"):
        shutil.copy(ROOT / name, ".")
    Path("data.txt").write_bytes(Path(os.__file__).with_name("argparse.py").read_bytes())
    Path("mine.py").write_text(MINE)


def edit(old, new):
    text = Path("sweep.sh").read_text()
    assert text.count(old) == 1
    Path("sweep.sh").write_text(text.replace(old, new))


def small_grid():
    """Two optimizers, two rates, one seed."""
    edit("1e-3 3e-3 1e-2 3e-2 1e-1", "1e-3 1e-2")
    edit("seed in 1 2", "seed in 1")


def grid_of_mine(line):
    """The grid is this line, of mine.py."""
    text = Path("sweep.sh").read_text().replace("(python train.py)", "(python mine.py)")
    text = re.sub(r"(?ms)^grid\(\) \{.*?^\}$", "grid() {\n" + line + "\n}", text)
    Path("sweep.sh").write_text(text)


def start(*flags, **variables):
    return subprocess.Popen(
        ["bash", "sweep.sh", *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | variables,
    )


def sweep(*flags, **variables):
    process = start(*flags, **variables)
    process.out, _ = process.communicate(timeout=200)
    return process


def metrics():
    """The metrics of every run, without the times."""
    rows = {}
    for path in sorted(Path("runs").glob("*/*/metrics.jsonl")):
        lines = path.read_text().splitlines()
        rows[path.parent.name] = [json.loads(line) | {"seconds": 0} for line in lines]
    return rows


def left_behind():
    """The command lines of the processes that still run in this folder."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if os.readlink(folder / "cwd") == os.getcwd() and folder.name != str(os.getpid()):
                found.append((folder / "cmdline").read_text())
        except OSError:
            pass  # it has ended, or is another user's
    return found


def test_list_prints_the_lines_and_runs_nothing():
    small_grid()
    lines = sweep("list", "--data", "my text.txt").out.splitlines()
    assert len(lines) == len(set(lines)) == 4
    for line in lines:
        assert line.startswith(f"python train.py --run-dir {RUNS}/")
        assert line.strip().endswith(r"--data my\ text.txt")
    assert not Path("runs").exists()


def test_what_cannot_work_is_refused_in_a_line_and_nothing_runs():
    def refused(*flags):
        done = sweep(*flags)
        assert done.returncode == 1 and done.out.count("\n") == 1 and not Path("runs").exists()
        return done.out

    assert "error: what is lsit?" in refused("lsit")
    assert "error: --run-dir is not yours" in refused("--run_dir=runs/x")
    assert "bash sweep.sh slurm" in sweep("--help").out
    assert "error: --lr is not yours to give" in refused("--steps", "1", "--lr", "1")
    assert "error: --seed is not yours to give" in refused("--seed=7")
    edit("best=min", "best=lowest")
    assert "error: best=lowest is neither min nor max" in refused()
    edit("best=lowest", "best=min")
    edit("$optimizer-lr$lr-seed$seed", "$optimizer-lr$lr")
    assert "error: two runs are called adamw-lr1e-1:" in refused()
    edit('--seed "$seed"', '--no-x --seed="$seed"')
    assert "error: --seed is not yours to give" in refused("--seed", "7")
    assert "error: --x is not yours to give" in refused("--x")
    edit('run "$optimizer-lr$lr"', "run")
    assert "error: '--optimizer' cannot be the name of a run" in refused("slurm")
    grid_of_mine("run a --x 1")
    Path("mine.py").unlink()
    assert f"error: there is no mine.py in {os.getcwd()}" in refused()


def test_the_table_of_any_measure_and_rows_that_fail():
    grid_of_mine('for x in 0.5 killed 0.91 wrong 0.7; do run "x $x" --x "$x"; done')
    edit("best=min", "best=max")
    for _ in range(2):  # the second time, three have finished
        done = sweep()
        assert done.returncode == 1
        table = done.out.split("5 runs, 2 failed")[1].splitlines()[2:]
        assert table[0].startswith("accuracy ")
        assert [line.split()[0] for line in table[1:4]] == ["0.91", "0.7", "0.5"]
        assert table[4].startswith(f"FAILED     x killed, see {RUNS}/x killed/log.txt: ")
        assert "killed by SIGKILL, as the system does when memory runs out" in table[4]
        assert table[5].endswith("ValueError: could not convert string to float: 'wrong'")
    assert done.out.count("was finished: accuracy") == 3


def test_one_run_for_each_core_or_gpu():
    grid_of_mine("for x in 1 2 3; do run x$x --x $x; done")
    cores = min(len(os.sched_getaffinity(0)), 3)
    assert f"3 runs, {cores} at a time" in sweep(OMP_NUM_THREADS="1").out
    assert f"3 runs, {cores} at a time" in sweep(OMP_NUM_THREADS="8").out
    assert f"3 runs, {cores} at a time" in sweep(CUDA_VISIBLE_DEVICES="-1").out
    assert f"3 runs, {cores} at a time" in sweep(CUDA_VISIBLE_DEVICES="NoDevFiles").out
    assert "3 runs, 1 at a time" in sweep(JOBS="01").out
    assert "3 runs, 3 at a time" in sweep(JOBS="08").out
    assert "JOBS=many is not a number" in sweep(JOBS="many").out
    shutil.rmtree("runs")
    assert "3 runs, 2 at a time" in sweep(CUDA_VISIBLE_DEVICES="4,GPU-5e,-1,6").out
    logs = "".join(path.read_text() for path in Path("runs").glob("*/*/log.txt"))
    assert set(re.findall(r"gpu: (\S+)", logs)) == {"4", "GPU-5e"}


def test_edited_enlarged_and_started_again_while_it_runs():
    grid_of_mine("for x in 1 2 3 4; do run x$x --x $x --sleep 1; done")
    first = start(JOBS="2")
    assert first.stdout.readline().startswith("4 runs, 2 at a time")
    grid_of_mine("echo more > more.txt; for x in 6 5 4 3 2 1; do run x$x --x $x --sleep 1; done")
    second = start(JOBS="3")
    assert second.stdout.readline().startswith("6 runs, 3 at a time")
    Path("sweep.sh").write_text("if then (\n" * 300)  # an editor saves what is half done
    for process, number in ((first, 4), (second, 6)):
        out, _ = process.communicate(timeout=60)
        assert process.returncode == 0 and f"{number} runs, 0 failed" in out
        names = re.findall(r"(?m)^\d of \d  (\S+)", out)
        assert sorted(names) == [f"x{x}" for x in range(1, number + 1)]


def test_failures_are_named_finished_runs_skipped_and_a_grid_enlarged():
    small_grid()
    edit("1e-3 1e-2", "1e6 1e-2")
    first = sweep(*TINY)
    assert first.returncode == 1, first.out
    assert first.out.count(" of 4  ") == 4 and " left\n" in first.out
    assert first.out.count("FAILED: error: not finite at step") == 2
    assert f"FAILED     adamw-lr1e6-seed1, see {RUNS}/adamw-lr1e6-seed1/log.txt" in first.out
    assert "4 runs, 2 failed" in first.out
    before = metrics()
    edit("1e6 1e-2", "1e-3 1e-2")
    again = sweep(*TINY, JOBS="3")
    assert again.returncode == 0, again.out
    assert "4 runs, 0 failed" in again.out and again.out.count("was finished: val_loss") == 2
    assert len(metrics()) == 6 and before.items() <= metrics().items()
    typo = sweep(*TINY, "--lrr", "1")
    assert typo.out.count("FAILED: Unrecognized options: --lrr, 1") == 4


def test_runs_of_code_that_was_edited_between_are_marked():
    small_grid()
    edit("optimizer in muon adamw", "optimizer in muon")
    short = [*TINY, "--steps", "20"]
    assert "has changed" not in sweep(*short).out
    path = f"{RUNS}/muon-lr1e-2-seed1"
    Path(path, "result.json").unlink()  # as if stopped before its end
    edit("lr in 1e-3 1e-2", "lr in 1e-3 1e-2 1e-1")
    with open("train.py", "a") as f:
        f.write("# edited\n")
    for _ in range(2):  # the second time, the run that went on has a copy of the new code
        done = sweep(*short)
        assert done.returncode == 0, done.out
        table = done.out.split("best (min) first\n")[1].splitlines()
        assert table.pop().startswith("* trained by code that has changed")
        marked = {line.split()[1]: line.endswith(" *") for line in table}
        assert marked == {
            "muon-lr1e-3-seed1": True,
            "muon-lr1e-2-seed1": True,
            "muon-lr1e-1-seed1": False,
        }


def interrupted(how, seconds):
    """The sweep in a terminal of its own, which ends after some seconds in one of the ways."""
    pid, terminal = pty.fork()
    if pid == 0:
        # Under nohup, or behind &, they would be ignored, and a shell cannot trap them.
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.execvp("bash", ["bash", "sweep.sh", *TINY])
    time.sleep(seconds)
    if how == "closed":
        os.close(terminal)
    elif how == "TERM":
        os.kill(pid, signal.SIGTERM)
    else:
        os.write(terminal, b"\x03")
    if how == "twice":
        time.sleep(0.3)
        os.write(terminal, b"\x03")
    out = b""
    try:
        while how != "closed" and (read := os.read(terminal, 4096)):
            out += read
    except OSError:  # the end, of a terminal
        pass
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    logs = [path.read_text() for path in Path("runs").glob("*/*/log.txt")]
    assert status in (130, 0), (how, out.decode(), *logs)
    assert not left_behind()


def test_interrupted_anywhere_the_same_line_gives_the_same_numbers():
    small_grid()
    assert sweep(*TINY).returncode == 0
    whole = metrics()
    assert len(whole) == 4
    shutil.rmtree("runs")
    for how in ("Ctrl-C", "twice", "TERM", "closed", "Ctrl-C"):
        interrupted(how, random.uniform(0.3, 6))
    done = sweep(*TINY)
    assert done.returncode == 0, done.out
    assert metrics() == whole


def test_shellcheck_finds_nothing_and_lines_are_short():
    for path in (ROOT / "sweep.sh", ROOT / "slurm.sbatch"):
        done = subprocess.run(["shellcheck", path], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout
        assert max(len(line) for line in path.read_text().splitlines()) <= 100
