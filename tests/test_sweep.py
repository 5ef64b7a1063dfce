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
    "--eval-every 50 --eval-tokens 1024 --device cpu --wandb disabled --steps"
).split()
RUNS = "runs/muon-or-adamw"

# The lines of sweep.sh that a user edits, so the tests bring their own.
TOP = """
sweep=muon-or-adamw
command=(python train.py)
best=min
common=(--sample-tokens 0)

grid() {
  for optimizer in muon adamw; do
    for lr in 1e-3 3e-3 1e-2 3e-2 1e-1; do
      for seed in 1 2; do
        run "$optimizer-lr$lr-seed$seed" --optimizer "$optimizer" --lr "$lr" --seed "$seed"
      done
    done
  done
}"""

# another experiment: its measure is an accuracy, it may fail, and it takes no time
MINE = """
import json, os, sys, time

flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
path = flags["--run-dir"] + "/result.json"
if os.path.exists(path):
    sys.exit()
print("a NUL byte: \\0, gpu:", os.environ.get("CUDA_VISIBLE_DEVICES"), flush=True)
time.sleep(float(flags.get("--sleep", 0)))
if flags["--x"] == "killed":
    os.kill(os.getpid(), 9)
result = {"accuracy": float(flags["--x"]), "steps": 1}
open(path, "w").write(json.dumps(result, indent=2))
"""

@pytest.fixture(autouse=True)
def copy(tmp_path, monkeypatch):
    """A copy of the repo, in a shell without variables that the sweep would obey."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    for name in ("JOBS", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    for name in ("train.py", "config.py"):
        shutil.copy(ROOT / name, ".")
    write_sweep()
    Path("data.txt").write_bytes(Path(os.__file__).with_name("argparse.py").read_bytes())
    Path("mine.py").write_text(MINE)

def write_sweep(top=TOP):
    text = (ROOT / "sweep.sh").read_text()
    head, rest = re.split(r"(?ms)^sweep=.*?^\}$", text)
    Path("sweep.sh").write_text(head + top + rest)

def edit(old, new):
    text = Path("sweep.sh").read_text()
    assert text.count(old) == 1
    Path("sweep.sh").write_text(text.replace(old, new))

def grid_of_muon(rates):
    edit("1e-3 3e-3 1e-2 3e-2 1e-1", rates)
    edit("seed in 1 2", "seed in 1")
    edit("in muon adamw", "in muon")

def grid_of_mine(line):
    settings, _ = TOP.replace("(python train.py)", "(python mine.py)").split("grid() {")
    write_sweep(settings + "grid() {\n" + line + "\n}")

def start(*flags, script="sweep.sh", **variables):
    options = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return subprocess.Popen(["bash", script, *flags], env=os.environ | variables, **options)

def sweep(*flags, **options):
    process = start(*flags, **options)
    process.out, _ = process.communicate(timeout=200)
    return process

def metrics():
    """The metrics of every run, without the times."""
    rows = {}
    for path in sorted(Path("runs").glob("*/*/metrics.jsonl")):
        lines = path.read_text().splitlines()
        rows[path.parent.name] = [json.loads(line) | {"seconds": 0} for line in lines]
    return rows

def test_list_prints_the_lines_and_runs_nothing():
    Path("exp").symlink_to(".")
    Path("elsewhere/exp").mkdir(parents=True)  # where a CDPATH would lead
    away = dict(script="exp/sweep.sh", CDPATH="elsewhere")
    lines = sweep("list", "--data", "my text.txt", **away).out.splitlines()
    assert len(lines) == len(set(lines)) == 20
    for line in lines:
        assert line.startswith(f"python train.py --run-dir {RUNS}/")
        assert line.strip().endswith(r"--data my\ text.txt")
    shutil.copy(ROOT / "sweep.sh", ".")  # with the top that it has now
    assert " --run-dir runs/" in sweep("list", **away).out
    assert not Path("runs").exists()

def test_what_cannot_work_is_refused_in_a_line_and_nothing_runs():
    def refused(*flags):
        done = sweep(*flags)
        assert done.returncode == 1 and done.out.count("\n") == 1 and not metrics()
        return done.out

    assert "bash sweep.sh slurm" in sweep("--help").out
    assert "error: what is lsit?" in refused("lsit")
    assert "error: --run-dir is not yours" in refused("--run_dir=runs/x")
    assert "error: --lr is not yours to give" in refused("--steps", "1", "--lr", "1")
    edit("best=min", "best=lowest")
    assert "error: best=lowest is neither min nor max" in refused()
    edit("best=lowest", "best=min")
    edit("$optimizer-lr$lr-seed$seed", "$optimizer-lr$lr")
    assert "error: two runs are called adamw-lr1e-1:" in refused()
    edit('--seed "$seed"', '--no-x --seed="$seed"')
    assert "error: --seed is not yours to give" in refused("--seed=7")
    assert "error: --x is not yours to give" in refused("--x")
    edit('run "$optimizer-lr$lr"', "run")
    assert "error: '--optimizer' cannot be the name of a run" in refused("slurm")
    Path(RUNS).mkdir(parents=True)
    Path(RUNS, "lock").touch()
    assert f"error: {RUNS} is a run itself: name another" in refused()
    Path("train.py").unlink()
    assert f"error: there is no train.py in {os.getcwd()}" in refused()

def test_the_table_of_any_measure_and_rows_that_fail():
    values = "0.5 killed 0.91 wrong 0.7"
    grid_of_mine(f"for x in {values}; do run a-seed$((++n)) --x $x --sleep 1; done")
    edit("best=min", "n=0 best=max")
    sweep()
    Path(RUNS, "a-seed1/code/0").mkdir(parents=True)
    Path(RUNS, "a-seed1/code/0/mine.py").write_text("# other code")
    done = sweep(JOBS="1")  # three have finished
    assert done.returncode == 1 and done.out.count("was finished: accuracy") == 3
    table = done.out.split("5 runs, 2 failed")[1].splitlines()[2:]
    rows = [" ".join(line.split()) for line in table[:4]]
    assert rows[:3] == ["0.91 a-seed3", "0.7 a-seed5", "0.5 a-seed1 *"]
    assert rows[3] == "0.805 a, mean of 2: 0.91 to 0.7"
    assert table[5].startswith(f"FAILED     a-seed2, see {RUNS}/a-seed2/log.txt: killed by SIGKILL")
    assert table[6].endswith("ValueError: could not convert string to float: 'wrong'")
    # What was finished before counts neither as time nor as work.
    left = re.findall(r" 0:(\d\d) left\n", done.out)
    assert len(left) == 4 and "01" <= left[0] == left[1] <= "04" and left[2:] == ["00", "00"]

def test_one_run_for_each_core_or_gpu():
    grid_of_mine("for x in 1 2 3; do run x$x --x $x; done")
    cores = min(len(os.sched_getaffinity(0)), 3)
    variables = dict(OMP_NUM_THREADS="8", CUDA_VISIBLE_DEVICES="NoDevFiles")
    assert f"3 runs, {cores} at a time" in sweep(**variables).out
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
        assert len(set(re.findall(r"(?m)^\d of \d  (\S+)", out))) == number

def test_failed_finished_and_new_runs_and_those_of_edited_code():
    grid_of_muon("1e8 1e-2")
    out = sweep(*TINY, "20").out
    failure = rf"muon-lr1e8-seed1, see {RUNS}/\S+/log.txt: error: not finite at step \d+: train"
    assert re.search(f"(?m)^FAILED     {failure}", out) and "2 runs, 1 failed" in out, out
    assert sweep(*TINY, "20", "--lrr", "1").out.count("FAILED: Unrecognized options: --lrr, 1") == 2
    before = metrics()
    edit("1e8 1e-2", "1e-3 1e-2")
    out = sweep(*TINY, "20").out
    assert "2 runs, 0 failed" in out and "has changed" not in out, out
    assert out.count("was finished: val_loss") == 1 and before.items() <= metrics().items()
    edit("1e-3 1e-2", "1e-3 1e-2 1e-1")
    Path(f"{RUNS}/muon-lr1e-2-seed1/result.json").unlink()  # as if stopped before its end
    subprocess.run("echo '# edited' >> train.py", shell=True)
    for _ in range(2):  # the second time, the run that went on has a copy of the new code
        out = sweep(*TINY, "20").out
        marked = re.findall(r"(?m)^\S+ +muon-lr(\S+)-seed1( \*)?$", out)
        assert dict(marked) == {"1e-3": " *", "1e-2": " *", "1e-1": ""}
        assert out.endswith("\n* trained by code that has changed\n")

def test_interrupted_anywhere_the_same_line_gives_the_same_numbers():
    grid_of_muon("1e-3 1e-2")
    sweep(*TINY, "200")
    whole = metrics()
    shutil.rmtree("runs")
    for how in ("TERM", "Ctrl-C twice", "closed"):  # in a terminal of its own
        before = metrics()
        pid, terminal = pty.fork()
        if pid == 0:
            # Under nohup, or behind &, they would be ignored, and a shell cannot trap them.
            signal.signal(signal.SIGHUP, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.execvp("bash", ["bash", "sweep.sh", *TINY, "200"])
        time.sleep(random.uniform(0.1, 1.5))
        while how != "TERM" and metrics() == before:
            time.sleep(0.1)
        if how == "TERM":
            os.kill(pid, signal.SIGTERM)
        elif how == "closed":
            os.close(terminal)
        else:
            for _ in range(2):
                os.write(terminal, b"\x03")
                time.sleep(0.3)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 130
        here = [f for f in Path("/proc").glob("[0-9]*/cwd") if os.path.realpath(f) == os.getcwd()]
        assert len(here) == 1  # no process is left behind, but this one
    sweep(*TINY, "200")
    assert metrics() == whole and len(whole) == 2
    assert len(list(Path(RUNS).glob("*/code/*"))) > 2  # at least one went on

def test_shellcheck_finds_nothing():
    assert subprocess.run(["shellcheck", ROOT / "sweep.sh", ROOT / "slurm.sbatch"]).returncode == 0
