"""What other people's files, disks, terminals, signals and variables do to a run."""
import fcntl
import gzip
import json
import os
import pty
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from test_train import (  # noqa: F401 (workdir is a fixture)
    ROOT, SHORT, TINY, broken_here, copy_code, edited, files, has_rows, metrics, read_json,
    refused, run_here, start, train_here, trained, wait_until, workdir,
)  # fmt: skip

# signals, closed streams and terminals

SITTINGS = [
    ("trap '' HUP; exec LINE", [signal.SIGHUP, signal.SIGINT], 130),  # as nohup does
    ("trap : INT; LINE 2>&1 | tee log; exit ${PIPESTATUS[0]}", [signal.SIGINT], 130),
    ("exec LINE >&-", [signal.SIGTERM], 143),
    ("exec LINE 2>&-", [signal.SIGUSR1], 138),
    ("exec LINE > /dev/full 2>&1", [signal.SIGHUP], 129),
]

def test_one_run_through_signals_closed_streams_and_a_closed_terminal(monkeypatch):
    monkeypatch.setenv("TQDM_MININTERVAL", "0")
    copy_code()
    flags = ["--steps", "600", "--eval-every", "200", "--micro-batch-size", "1", "--run-dir"]
    line = shlex.join([sys.executable, "train.py", *TINY, *flags, "run"])
    rare = f"{line} --eval-every 1000"
    starts = ["0"]
    rows_file = Path("run/metrics.jsonl")
    count = lambda: rows_file.read_text().count("\n") if rows_file.exists() else 0  # noqa: E731
    for shell, numbers, code in SITTINGS:
        command = ["bash", "-c", shell.replace("LINE", rare)]
        pipe = subprocess.PIPE
        process = subprocess.Popen(command, stdout=pipe, stderr=pipe, start_new_session=True)
        wait_until(process, Path("run/lock").exists)
        if starts == ["0"]:  # its files are edited before it imports torch
            subprocess.run("echo '# edited' | tee -a train.py config.py", shell=True)
        for number in numbers:
            rows = count() + 4
            wait_until(process, lambda: count() > rows)
            os.killpg(process.pid, number)
        out, err = process.communicate(timeout=60)
        assert process.returncode == code, err
        if starts == ["0"]:
            saved = f"\nsaved at step {count()}; again with --run-dir run to go on\n"
            assert saved.encode() in out and not err
        starts.append(str(count()))

    pid, terminal = pty.fork()
    if pid == 0:
        os.execlp("bash", "bash", "-c", f"stty rows 24 cols 80; exec {line} --eval-every 1")
    shown = b""
    rows = count() + 4
    while count() < rows:
        shown += os.read(terminal, 65536)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 129
    starts.append(str(count()))
    bars = shown.decode(errors="replace").replace("\n", "\r").split("\r")
    assert max(len(bar) for bar in bars) <= 80
    bar = r"/600 \[\d\d:\d\d<\d\d:\d\d,.*train_loss \d\.\d+, val_loss \d\.\d+\]"
    assert re.search(bar, "\n".join(bars)), bars

    train_here(*flags, "whole")
    trained(*flags, "run", script="train.py")
    for mine, theirs in zip(metrics("run"), metrics("whole"), strict=True):
        assert mine.get("train_loss") == theirs.get("train_loss")
    assert {path.name for path in Path("run/code").iterdir()} == set(starts)
    for step in starts:
        for name in ("train.py", "config.py"):
            code = Path("run/code", step, name).read_bytes()
            assert code == (ROOT / name).read_bytes() + b"# edited\n" * (step != "0")

# data and flags

def with_header(magic, version, ids):
    header = np.zeros(256, np.int32)
    header[:3] = magic, version, len(ids)
    return header.tobytes() + ids.tobytes()

def put(name, content):
    if name.endswith(".npy"):
        np.save(name, content)
    else:
        Path(name).write_bytes(content)

# the same ids in every kind of file
IDS = np.random.default_rng(0).integers(200, size=20000)
SAME = {
    "ids.bin": IDS.astype(np.uint16),
    "uint8.npy": IDS.astype(np.uint8),
    "int64.npy": IDS,
    "GPT2.BIN": with_header(20240520, 1, IDS.astype(np.uint16)),
    "llama.bin": with_header(20240801, 7, IDS.astype(np.uint32)),
}

def test_the_same_ids_in_every_kind_of_file(monkeypatch):
    monkeypatch.setenv("HOME", os.getcwd())
    for name, content in SAME.items():
        put(name, content)
        train_here(f"--data=~/{name}", f"--run-dir=~/runs/{name}", *SHORT)
        assert metrics(f"runs/{name}") == metrics("runs/ids.bin")
        assert len(read_json(f"runs/{name}/sample.txt")) == 16  # ids, not text
    assert not Path("~").exists()

BAD_DATA = [
    ("wide.bin", IDS.astype(np.uint32), "ids wider than uint16"),
    ("wider.bin", (IDS * 640).astype(np.uint32), "ids wider than uint16"),
    ("large.bin", IDS.astype(np.uint16) + 100, "token id 299 in the data, beyond --vocab-size 256"),
    ("negative.npy", -IDS, "token id -199 in the data"),
    ("floats.npy", IDS * 1.0, "floats.npy is float64 of shape (20000,)"),
    ("rows.npy", IDS.reshape(2, -1), "int64 of shape (2, 10000)"),
    ("cut.bin", SAME["GPT2.BIN"][:-100], "cannot read cut.bin"),
    ("odd.bin", b"x" * 10001, "cannot read odd.bin"),
    ("text.npy", None, "cannot read text.npy"),
    ("text.gz", gzip.compress(b"some text" * 1000), "no plain text"),
    ("utf-16.txt", ("some text" * 1000).encode("utf-16"), "no plain text"),
    ("empty.txt", b"", "cannot read empty.txt"),
    ("short.txt", b"x" * 100, "of data are too few for --seq-len 32"),
    ("data.txt/none", None, "cannot read data.txt/none"),
    (".", None, "Is a directory"),
]
BAD_FLAGS = [
    (["--vocab-size", 257], 1, "--vocab-size 257 is beyond the uint8 of data.txt"),
    (["--learning-rate", 1], 2, "Unrecognized options"),
    (["--lr", "fast"], 2, "could not convert string to float"),
    (["--lr", "nan"], 2, "lr must be positive"),
    (["--steps", 0], 2, "steps must be positive"),
    (["--optimizer", "sgd"], 2, "invalid choice"),
]

def test_bad_input_is_refused_and_data_never_read_as_what_it_is_not():
    Path("text.npy").write_text("text" * 1000)
    for name, content, words in BAD_DATA:
        if content is not None:
            put(name, content)
        refused(run_here("--run-dir", "run", "--data", name), words)
    for flags, code, words in BAD_FLAGS:
        refused(run_here("--run-dir", "run", *flags), words, code=code)
    with pytest.raises(AssertionError, match="multiple of twice n_head"):
        run_here("--run-dir", "run", "--n-head", 3)
    assert os.listdir("run") == ["lock"]

def test_many_ids_are_told_apart_by_some_of_them():
    flags = ["--data", "ids.npy", "--run-dir", "run"]
    for seed in (1, 2):
        ids = np.random.default_rng(seed).integers(256, size=12_000_000, dtype=np.uint8)
        ids[::1000] = 0  # in rows that begin alike
        np.save("ids.npy", ids)
        if seed == 1:
            broken_here(7, *flags)
    refused(run_here(*flags), "data is [10800000, 1200000, ")

# disks, repositories and compilers

def test_what_may_not_be_read_or_written_and_a_disk_without_locks(monkeypatch):
    put("secret.txt", b"x" * 10000)
    Path("secret.txt").chmod(0)
    Path("closed").mkdir(mode=0o555)
    drop = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"]  # of root's rights
    command = [*(drop if os.geteuid() == 0 else []), sys.executable, ROOT / "train.py", *TINY]
    for flags in (["run", "--data", "secret.txt"], ["closed"], ["closed/run"]):
        done = subprocess.run([*command, "--run-dir", *flags], capture_output=True, text=True)
        assert done.returncode == 1 and "Permission denied" in done.stderr
    assert os.listdir("closed") == []
    monkeypatch.setattr(fcntl, "lockf", mock.Mock(side_effect=OSError(37, "no locks here")))
    train_here("--run-dir", "unlocked", *SHORT)
    assert read_json("unlocked/result.json")["steps"] == 5

def test_commit_of_the_codes_own_folder_and_whether_it_was_clean(monkeypatch):
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    copy_code("o'neil")
    monkeypatch.setattr("config.__file__", os.path.abspath("o'neil/config.py"))

    def git(*words, folder="o'neil"):
        command = ["git", "-C", folder, "-c", "user.name=x", "-c", "user.email=x", *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    def commit(run_dir):
        train_here("--run-dir", run_dir, *SHORT)
        return read_json(run_dir, "meta.json")["commit"]

    git("init", folder=".")  # another repository around it
    git("commit", "--allow-empty", "-m", "x", folder=".")
    assert "config.py" in commit("around") and git("rev-parse", "HEAD") not in commit("again")
    git("init")
    git("add", ".")
    git("commit", "-m", "x")
    head = git("rev-parse", "HEAD")
    assert commit("clean") == head
    Path("o'neil/train.py").write_text("edited")
    assert commit("dirty") == f"{head}-dirty"
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")  # as in another user's folder
    assert "dubious ownership" in commit("refused")

def test_compile_without_a_compiler(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", os.path.abspath("cache"))
    # as if this were a GPU, where auto compiles
    script = edited((' and on_cuda and cfg.steps * cfg.batch_size > 20_000:', ':'))
    auto = trained("--run-dir", "run", *SHORT, script=script)
    assert "note: torch.compile fails, so the run is slower: " in auto.out
    assert read_json("run/meta.json")["compile"] is False
    monkeypatch.setattr("torch.compile", mock.Mock(side_effect=RuntimeError("no compiler")))
    with pytest.raises(RuntimeError, match="no compiler"):
        run_here("--run-dir", "on", "--compile", "on", *SHORT)

# wandb

def children(process):
    numbers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert numbers
    return list(map(int, numbers))

def test_wandb_offline_holds_config_and_history(monkeypatch):
    # as a shell may have it
    variables = dict(WANDB_DIR=os.getcwd(), WANDB_MODE="offline", WANDB_PROJECT="theirs")
    variables |= dict(WANDB_RUN_GROUP="a-sweep", PYTHONIOENCODING="ascii")
    variables |= dict(TQDM_DISABLE="1", CXX="", WORLD_SIZE="1")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    tiny = [flag for flag in TINY if flag not in ("--wandb", "disabled")]
    command = [sys.executable, ROOT / "train.py", *tiny, "--run-dir", "run"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    wait_until(process, lambda: has_rows("run", 3))
    for child in children(process):  # a cluster ends all processes of a job
        os.kill(child, signal.SIGTERM)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 143
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "note" not in done.stdout and "\nval_loss: " in done.stdout
    steps, ids, there = {}, set(), {}
    for log in sorted(Path("wandb").glob("offline-run-*/*.wandb")):
        read = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", log]  # its own reader
        lines = subprocess.run(read, capture_output=True, check=True).stdout.splitlines()
        for record in map(json.loads, lines):
            if record["type"] == "run":
                run = record["run"]
                ids.add((run["run_id"], run["run_group"], run["project"], run["display_name"]))
                there |= run["config"].get("update", {})
            if record["type"] == "history":
                row = record["history"]["item"]
                steps[row["step"]] = row
    ((id, *names),) = ids  # the resumed run goes on under its id
    assert names == ["a-sweep", "theirs", "run"]
    here = read_json("run/config.json")
    assert here["wandb"] == "offline" and here.items() <= there.items()
    for row in metrics("run"):
        assert row.items() <= steps[row["step"]].items()

def test_wandb_never_costs_a_run(monkeypatch):
    offline = ["--wandb", "offline", "--run-dir"]
    # its service dies
    process = start(*offline, "dead", "--steps", 300)
    wait_until(process, lambda: has_rows("dead", 3))
    for child in children(process):
        os.kill(child, signal.SIGKILL)
    _, err = process.communicate(timeout=100)
    assert process.returncode == 0, err
    assert read_json("dead/result.json")["steps"] == 300
    # no server
    with monkeypatch.context() as patch:
        patch.setenv("WANDB_API_KEY", "")
        patch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
        done = trained("--run-dir", "online", "--wandb", "online", *SHORT)
    assert "note: wandb failed, training goes on: " in done.out
    assert read_json("online/result.json")["steps"] == 5
    # not installed
    monkeypatch.setitem(sys.modules, "wandb", None)
    done = train_here(*offline, "missing", *SHORT)
    assert "note: wandb failed, training goes on: import of wandb halted" in done.out
    assert read_json("missing/result.json")["steps"] == 5
    # a full disk
    Path("disk").mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16k", "none", "disk"]
    if subprocess.run(mount, stderr=subprocess.DEVNULL).returncode != 0:
        pytest.skip("a small disk is mounted by root alone, and not in every container")
    try:
        monkeypatch.setenv("WANDB_DIR", "disk")
        trained(*offline, "full")
        assert shutil.disk_usage("disk").free == 0
    finally:
        subprocess.run(["umount", "-l", "disk"], check=True)
    assert read_json("full/result.json")["steps"] == 40
