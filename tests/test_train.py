"""Run train.py as a user does, and look at what it leaves."""

import json
import math
import os
import random
import resource
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import jupytext
import nbformat
import numpy as np
import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from config import Config

TINY = ("--data data.txt --n-layer 2 --n-head 2 --n-embd 32 --seq-len 32 --batch-size 8 --steps 40 --warmup 5 --log-every 1 "
        "--eval-every 10 --eval-tokens 1024 --save-every 5 --sample-tokens 16 --device cpu --wandb disabled").split()  # fmt: skip


@pytest.fixture(autouse=True)
def workdir(tmp_path, monkeypatch):
    """A folder of its own, with a little text in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    source = Path(os.__file__).parent.joinpath("argparse.py").read_bytes()
    Path("data.txt").write_bytes(source)


def start(*flags, launcher=(), **kwargs):
    command = [sys.executable, *launcher, str(ROOT / "train.py"), *TINY, *map(str, flags)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kwargs)


def train(*flags, **kwargs):
    process = start(*flags, **kwargs)
    process.out, process.err = process.communicate(timeout=200)
    return process


def metrics(run_dir, torn=False):
    """The rows of metrics.jsonl without the times; torn: whose last line may be half written."""
    lines = Path(run_dir, "metrics.jsonl").read_text().splitlines(keepends=True)
    rows = [json.loads(line) for line in lines if not torn or line.endswith("\n")]
    for row in rows:
        row.pop("seconds")
    return rows


def refused(process, *words):
    """It ended with one line that says why, and no traceback."""
    assert process.returncode == 1, process.out + process.err
    assert len(process.err.strip().splitlines()) == 1, process.err
    for word in words:
        assert word in process.err, process.err


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("OMP_NUM_THREADS", "1")
        Path("data.txt").write_bytes(Path(os.__file__).parent.joinpath("argparse.py").read_bytes())
        process = train("--run-dir", "run")
    assert process.returncode == 0, process.err
    process.run_dir = folder / "run"
    return process


def test_run_learns_and_leaves_its_record(whole):
    rows = metrics(whole.run_dir)
    assert [row["step"] for row in rows] == list(range(41))
    assert rows[0]["train_loss"] == pytest.approx(math.log(256), rel=0.02)
    assert rows[0]["val_loss"] == pytest.approx(math.log(256), rel=0.02)
    assert rows[-1]["val_loss"] < 3.3 and rows[-1]["tokens"] == 40 * 8 * 32
    assert {"step", "tokens", "train_loss", "lr", "val_loss"} == set(rows[-1])
    config = json.loads((whole.run_dir / "config.json").read_text())
    assert config["device"] == "cpu" and config["dtype"] in ("float32", "bfloat16")  # what auto came to
    assert json.loads(json.dumps(Config(**config).__dict__)) == config
    for name in ("train.py", "config.py"):
        assert (whole.run_dir / name).read_text() == (ROOT / name).read_text()
    assert len((whole.run_dir / "sample.txt").read_bytes().decode()) == 16
    result = dict(line.split(": ") for line in whole.out.split("---\n")[1].splitlines()[:7])
    assert float(result["val_loss"]) == pytest.approx(rows[-1]["val_loss"], abs=1e-4)
    assert int(result["steps"]) == 40 and int(result["tokens"]) == 40 * 8 * 32 and result["run_dir"] == "run"
    assert "step 10/40, loss" in whole.out  # a log file gets plain lines
    saved = torch.load(whole.run_dir / "checkpoint.pt", weights_only=True)
    assert saved["step"] == 40


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_model_is_causal(optimizer, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", *TINY, "--steps", "10", "--optimizer", optimizer, "--run-dir", "run"])
    model = runpy.run_path(str(ROOT / "train.py"), run_name="__main__")["model"]
    ids = torch.randint(256, (2, 32))
    changed = ids.clone()
    changed[:, 20] = (ids[:, 20] + 1) % 256
    with torch.no_grad():
        before, after = model(ids), model(changed)
    assert before.shape == (2, 32, 256)
    torch.testing.assert_close(before[:, :20], after[:, :20])
    assert not torch.allclose(before[:, 20:], after[:, 20:])


def test_kill_9_anywhere_and_resume_exactly(whole):
    kills = 0
    for rows in sorted(random.sample(range(35), 4)):  # after this many rows of metrics.jsonl, the next time perhaps at start-up
        process = start("--run-dir", "run")
        while process.poll() is None and (not Path("run/metrics.jsonl").exists() or len(metrics("run", torn=True)) <= rows):
            pass
        process.kill()
        process.communicate()
        kills += process.returncode == -signal.SIGKILL
    process = train("--run-dir", "run")
    assert process.returncode == 0, process.err
    assert kills and metrics("run") == metrics(whole.run_dir)
    assert Path("run/sample.txt").read_text() == (whole.run_dir / "sample.txt").read_text()


def test_kill_9_while_a_checkpoint_is_written(whole):
    process = start("--run-dir", "run")
    while not Path("run/checkpoint.pt.tmp").exists():
        assert process.poll() is None, process.communicate()
    process.kill()
    process.communicate()
    assert 0 < len(metrics("run")) < 41
    assert train("--run-dir", "run").returncode == 0
    assert metrics("run") == metrics(whole.run_dir)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_signal_saves_and_exits(whole, number):
    process = start("--run-dir", "run", "--save-every", 1000, "--eval-every", 20)
    while not Path("run/metrics.jsonl").exists() or not Path("run/metrics.jsonl").read_text().count("\n") > 3:
        assert process.poll() is None, process.communicate()
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number, err
    assert f"stopped by {number.name}" in out and not err
    resume = out.split("To resume: python ")[1].split()
    assert torch.load("run/checkpoint.pt", weights_only=True)["step"] == metrics("run")[-1]["step"]
    assert subprocess.run([sys.executable, *resume], capture_output=True).returncode == 0  # the line it printed
    same = [(row["step"], row["train_loss"]) for row in metrics("run")]
    assert same == [(row["step"], row["train_loss"]) for row in metrics(whole.run_dir)]


def test_same_command_on_a_finished_run_and_another_config(whole):
    before = {f: f.read_bytes() for f in whole.run_dir.iterdir() if f.is_file()}
    again = train("--run-dir", whole.run_dir)
    assert again.returncode == 0 and "is finished: val_loss" in again.out
    for name in ("train.py", "config.py"):
        Path(name).write_text((ROOT / name).read_text() + "# another experiment\n")
    changed = subprocess.run([sys.executable, "train.py", *TINY, "--run-dir", whole.run_dir], capture_output=True, text=True)
    assert changed.returncode == 0 and "note: the code has changed since this run" in changed.stdout
    other = train("--run-dir", whole.run_dir, "--lr", 0.1, "--seed", 2)
    refused(other, "another config", "lr is 0.015 there, 0.1 here", "seed is 1337 there, 2 here")
    assert before == {f: f.read_bytes() for f in whole.run_dir.iterdir() if f.is_file()}


def test_two_processes_in_one_run_directory():
    first = start("--run-dir", "run", "--steps", 2000, "--save-every", 1000)
    while not Path("run/config.json").exists():
        assert first.poll() is None, first.communicate()
    second = train("--run-dir", "run", "--steps", 2000, "--save-every", 1000)
    first.kill()
    first.communicate()
    refused(second, "in use")


def test_two_processes_and_micro_batches_equal_one():
    float32 = ("--dtype", "float32", "--run-dir")
    launcher = "-m torch.distributed.run --standalone --nproc-per-node 2".split()
    assert train(*float32, "one").returncode == 0
    assert train(*float32, "micro", "--micro-batch-size", 2).returncode == 0
    process = train(*float32, "two", "--micro-batch-size", 2, launcher=launcher)
    assert process.returncode == 0, process.err
    assert process.out.count("val_loss:") == 1  # only one speaks
    for run_dir in ("micro", "two"):
        for mine, theirs in zip(metrics(run_dir), metrics("one"), strict=True):
            assert mine == pytest.approx(theirs, rel=1e-3)  # float rounding, which training amplifies


def test_wandb_offline_holds_config_and_history(monkeypatch):
    monkeypatch.setenv("WANDB_DIR", os.getcwd())
    flags = ("--run-dir", "run", "--wandb", "offline", "--wandb-group", "a-sweep", "--save-every", 1000)
    process = start(*flags)
    while not Path("run/metrics.jsonl").exists() or not Path("run/metrics.jsonl").read_text().count("\n") > 3:
        assert process.poll() is None, process.communicate()
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert train(*flags).returncode == 0
    steps, ids, config, samples = {}, set(), {}, []
    for log in sorted(Path("wandb").glob("offline-run-*/*.wandb")):
        read = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", log]  # wandb's own reader
        for record in map(json.loads, subprocess.run(read, capture_output=True, check=True).stdout.splitlines()):
            if record["type"] == "run":
                ids.add(record["run"]["run_id"])
                assert record["run"]["run_group"] == "a-sweep" and record["run"]["display_name"] == "run"
                config |= record["run"]["config"].get("update", {})
            if record["type"] == "history":
                row = record["history"]["item"]
                steps[row["step"]] = row
            if record["type"] == "summary":
                samples += [record["summary"]["update"]["sample"]] if "sample" in record["summary"].get("update", {}) else []
    assert len(ids) == 1  # the resumed run goes on under its id
    assert {k: config[k] for k in Config().__dict__} == json.loads(Path("run/config.json").read_text())
    for row in metrics("run"):
        assert {k: steps[row["step"]][k] for k in row} == row
    assert samples[-1] == Path("run/sample.txt").read_bytes().decode()


def test_wandb_failing_in_mid_run_does_not_stop_training():
    flags = ("--run-dir", "run", "--wandb", "offline", "--steps", 400, "--log-every", 10)
    process = start(*flags)
    while not Path("run/checkpoint.pt").exists():
        assert process.poll() is None, process.communicate()
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for child in children:  # wandb's service
        os.kill(int(child), signal.SIGKILL)
    out, err = process.communicate(timeout=200)
    assert children and process.returncode == 0 and "val_loss: " in out, err


def test_disk_full_during_a_checkpoint(whole):
    assert train("--run-dir", "run", "--lr", 1e-3).returncode == 0  # how large a checkpoint is
    limit = os.path.getsize("run/checkpoint.pt") // 2
    process = start("--run-dir", "full")
    while not Path("full/checkpoint.pt").exists():
        assert process.poll() is None, process.communicate()
    process.kill()
    process.communicate()
    before = Path("full/checkpoint.pt").read_bytes()
    full = train("--run-dir", "full", preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    refused(full, "cannot write full/checkpoint.pt")
    assert Path("full/checkpoint.pt").read_bytes() == before
    assert train("--run-dir", "full").returncode == 0
    assert metrics("full") == metrics(whole.run_dir)


def test_damaged_files_of_a_run(whole):
    for name, content, words in [
        ("checkpoint.pt", (whole.run_dir / "checkpoint.pt").read_bytes()[:5000], "checkpoint.pt is damaged"),
        ("checkpoint.pt", b"not a checkpoint", "checkpoint.pt is damaged"),
        ("config.json", b'{"lr": ', "config.json is not"),
        ("config.json", b'{"learning_rate": 1}', "config.json is not"),
    ]:
        run = Path("run")
        run.mkdir(exist_ok=True)
        for f in ("config.json", "metrics.jsonl", "checkpoint.pt", "train.py"):
            (run / f).write_bytes((whole.run_dir / f).read_bytes())
        (run / name).write_bytes(content)
        refused(train("--run-dir", "run"), words)
        assert (run / name).read_bytes() == content
        assert metrics("run") == metrics(whole.run_dir)


def test_loss_that_is_not_finite():
    process = train("--run-dir", "run", "--lr", 1e6, "--warmup", 0)
    refused(process, "not finite at step", "--lr")
    assert metrics("run")[-1]["train_loss"] is None


BAD = {
    "unknown flag": (["--learning-rate", 1], "Unrecognized"),
    "wrong type": (["--lr", "fast"], "--lr"),
    "not a choice": (["--optimizer", "sgd"], "--optimizer"),
    "heads": (["--n-head", 3], "--n-head 3"),
    "negative lr": (["--lr", -1], "--lr"),
    "lr nan": (["--lr", "nan"], "--lr"),
    "no steps": (["--steps", 0], "--steps"),
    "micro batch": (["--micro-batch-size", 3], "--micro-batch-size 3 must divide"),
    "missing data": (["--data", "nowhere.txt"], "No such file or directory: 'nowhere.txt'"),
    "directory as data": (["--data", "."], "Is a directory"),
    "empty data": (["--data", "empty.txt"], "cannot read empty.txt"),
    "short data": (["--data", "short.txt"], "too few"),
    "odd bin": (["--data", "odd.bin"], "uint16"),
    "ids beyond the vocabulary": (["--data", "large.bin"], "--vocab-size"),
    "run_dir under a file": (["--run-dir", "data.txt/run"], "cannot be written"),
    "no such device": (["--device", "cuda:9"], "--device cuda:9 is not here"),
    "no device at all": (["--device", "toaster"], "--device toaster is not here"),
    "no read permission": (["--data", "secret.txt"], "Permission denied"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    if name == "no read permission" and os.geteuid() == 0:
        pytest.skip("root may read every file")
    Path("empty.txt").touch()
    Path("short.txt").write_bytes(b"x" * 100)
    Path("odd.bin").write_bytes(b"x" * 1001)
    np.full(10000, 256, np.uint16).tofile("large.bin")
    Path("secret.txt").write_bytes(b"x" * 10000)
    Path("secret.txt").chmod(0)
    flags, words = BAD[name]
    refused(train(*(["--run-dir", "run"] if "--run-dir" not in flags else []), *flags), words)
    assert not Path("run/sample.txt").exists()


def test_compile_without_a_compiler(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    refused(train("--compile", "on"), "--compile on needs a C++ compiler")


def test_error_in_two_processes_or_in_the_second():
    launcher = "-m torch.distributed.run --standalone --nproc-per-node 2".split()
    process = train("--batch-size", 7, launcher=launcher)
    assert process.returncode == 1 and process.err.count("cannot be shared by 2 processes") == 1, process.err
    process = train("--lr", 1e6, launcher=launcher)
    assert process.returncode == 1 and process.err.count("not finite at step") == 1, process.err
    ids = np.zeros(20000, np.uint16)
    starts = np.random.default_rng((Config.seed, 0)).integers(18000 - 32, size=8)  # of the windows of step 0
    ids[next(s for s in starts[4:] if all(abs(s - other) > 33 for other in starts[:4]))] = 999
    ids.tofile("tokens.bin")
    process = train("--data", "tokens.bin", launcher=launcher)
    assert process.returncode == 1 and process.err.count("token id 999, beyond --vocab-size 256") == 1, process.err


def test_tokens_in_a_bin_file():
    np.arange(20000, dtype=np.uint16).clip(0, 999).tofile("tokens.bin")
    process = train("--data", "tokens.bin", "--vocab-size", 1000, "--run-dir", "run")
    assert process.returncode == 0, process.err
    assert len(Path("run/sample.txt").read_text().split()) == 16


def test_notebook_is_the_script_and_runs():
    cells = lambda notebook: [(cell.cell_type, cell.source.strip()) for cell in notebook.cells]
    notebook = nbformat.read(ROOT / "train.ipynb", 4)
    assert cells(notebook) == cells(jupytext.read(ROOT / "train.py"))
    assert any("image/png" in output.get("data", {}) for cell in notebook.cells for output in cell.get("outputs", []))
    tiny = "Config(data='data.txt', n_layer=2, n_embd=32, steps=20, eval_tokens=512, sample_tokens=8, wandb='disabled', run_dir='{}')"
    source = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    assert source[0].endswith("parse(Config())")
    again = [nbformat.v4.new_code_cell(s.replace("Config())", tiny.format(d) + ")")) for d in ("one", "two") for s in source]
    loop = next(i for i, s in enumerate(source) if "stop_signals = []" in s)
    interrupted = nbformat.v4.new_code_cell(source[loop].replace("= []", "= [signal.SIGINT]"), metadata={"tags": ["raises-exception"]})
    again.insert(len(source) + loop, interrupted)  # in the second run, the loop's cell is interrupted and run again
    notebook.cells = again  # run all, edit the config cell, run all
    nbformat.write(notebook, "twice.ipynb")
    command = [sys.executable, "-m", "nbconvert", "--to", "notebook", "--execute", "--inplace", "twice.ipynb"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    assert metrics("two")[:1] + metrics("one") == metrics("two") and Path("two/sample.txt").exists()
    assert "class GPT" in Path("two/train.py").read_text()
