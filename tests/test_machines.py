"""What other people's files, disks, terminals and variables do to a run."""

import gzip
import json
import lzma
import os
import pty
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from test_train import (  # noqa: F401 (workdir is a fixture)
    ROOT,
    TINY,
    copy_code,
    error_here,
    files,
    has_rows,
    kill,
    metrics,
    refused,
    start,
    train,
    train_here,
    trained,
    wait_until,
    workdir,
)

SHORT = ["--steps", 5, "--eval-tokens", 32]


def with_header(magic, version, ids):
    header = np.zeros(256, np.int32)
    header[:3] = magic, version, len(ids)
    return header.tobytes() + ids.tobytes()


# data


def test_the_same_ids_in_every_kind_of_file():
    ids = np.random.default_rng(0).integers(1000, size=20000)
    ids.astype(np.uint16).tofile("ids.bin")
    ids.astype(np.uint16).tofile("TRAIN.BIN")
    np.save("uint16.npy", ids.astype(np.uint16))
    np.save("int64.npy", ids)
    Path("gpt2.bin").write_bytes(with_header(20240520, 1, ids.astype(np.uint16)))
    Path("llama.bin").write_bytes(with_header(20240801, 7, ids.astype(np.uint32)))
    names = ["ids.bin", "TRAIN.BIN", "uint16.npy", "int64.npy", "gpt2.bin", "llama.bin"]
    for name in names:
        flags = ["--data", name, "--vocab-size", 1000, "--run-dir", f"runs/{name}"]
        train_here(*flags, *SHORT)
        assert metrics(f"runs/{name}") == metrics("runs/ids.bin")


def test_ids_below_256_are_not_shown_as_text():
    np.save("ids.npy", np.random.default_rng(0).integers(200, size=20000, dtype=np.uint8))
    train_here("--data", "ids.npy", "--run-dir", "run", *SHORT)
    sample = json.loads(Path("run/sample.txt").read_text())
    assert len(sample) == 16 and all(0 <= id < 256 for id in sample)


BAD = {
    "uint32 without a header": (["--data", "wide.bin"], "every second uint16 is small"),
    "more ids than uint16 has": (["--data", "ids.bin", "--vocab-size", 128256], "65535"),
    "more ids than bytes": (["--data", "data.txt", "--vocab-size", 1000], "uint8"),
    "npy of floats": (["--data", "floats.npy"], "cannot read floats.npy"),
    "npy of two rows": (["--data", "rows.npy"], "(2, 5000)"),
    "npy that is none": (["--data", "text.npy"], "cannot read text.npy"),
    "header and too few ids": (["--data", "cut.bin"], "cannot read cut.bin"),
    "negative ids": (["--data", "negative.npy"], "error: token id -1"),
    "uint32 beyond 65535": (["--data", "wider.bin", "--vocab-size", 65536], "every second uint16"),
    "a compressed text": (["--data", "text.gz"], "it is no plain text"),
    "another compressed text": (["--data", "text.xz"], "it is no plain text"),
    "a text of two-byte characters": (["--data", "utf-16.txt"], "it is no plain text"),
    "a pipe": (["--data", "pipe"], "cannot read pipe as token ids: it is a pipe"),
    "an empty npy": (["--data", "empty.npy"], "cannot read empty.npy"),
}


@pytest.mark.parametrize("name", BAD)
def test_data_is_never_read_as_what_it_is_not(name):
    ids = np.random.default_rng(0).integers(200, size=10000)
    ids.astype(np.uint32).tofile("wide.bin")
    ids.astype(np.uint16).tofile("ids.bin")
    np.random.default_rng(0).integers(128256, size=10000).astype(np.uint32).tofile("wider.bin")
    Path("text.gz").write_bytes(gzip.compress(Path("data.txt").read_bytes()))
    Path("utf-16.txt").write_text(Path("data.txt").read_text(), "utf-16")
    Path("text.xz").write_bytes(lzma.compress(Path("data.txt").read_bytes()))
    os.mkfifo("pipe")
    Path("empty.npy").touch()
    np.save("floats.npy", ids * 1.0)
    np.save("rows.npy", ids.reshape(2, -1))
    np.save("negative.npy", -ids)
    Path("text.npy").write_text("text" * 1000)
    cut = with_header(20240520, 1, ids.astype(np.uint16))[:-100]
    Path("cut.bin").write_bytes(cut)
    flags, words = BAD[name]
    assert words in error_here("--run-dir", "run", *flags)


def test_large_data_in_rows_that_begin_alike_is_told_apart():
    rng = np.random.default_rng(0)
    for run_dir in ("one", "two"):
        rows = rng.integers(1, 256, size=(12_000, 1000), dtype=np.uint8)
        rows[:, 0] = 0
        np.save("rows.npy", rows.flatten())
        train_here("--data", "rows.npy", "--run-dir", run_dir, *SHORT)
    one, two = [json.loads(Path(run, "meta.json").read_text())["data"] for run in ("one", "two")]
    assert one[:2] == two[:2] == [10_800_000, 1_200_000] and one[2] != two[2]


@pytest.mark.parametrize("name", ["data.txt", "val.txt"])
def test_resume_on_other_data_of_the_same_size_is_refused(name):
    shutil.copy("data.txt", "val.txt")
    first = start("--run-dir", "run", "--val-data", "val.txt")
    wait_until(first, lambda: has_rows("run", 3))
    kill(first)
    before = files("run")
    text = Path(name).read_bytes()
    middle = len(text) // 2
    Path(name).write_bytes(text[:middle] + b"?" + text[middle + 1 :])
    refused(train("--run-dir", "run", "--val-data", "val.txt"), "began with other data")
    assert files("run") == before


def test_stdlib_of_another_python_is_other_data(monkeypatch):
    """A Python is where os.py lies: here a folder with copies of some of its files."""
    library = Path(os.__file__).parent
    Path("lib").mkdir()
    for name in ["os.py", "argparse.py", "ast.py"]:
        shutil.copy(library / name, "lib")
    here = str(Path("lib/os.py").resolve())
    Path("sitecustomize.py").write_text(f"import os\nos.__file__ = {here!r}\n")
    monkeypatch.setenv("PYTHONPATH", os.getcwd())
    flags = ["--run-dir", "run", "--data", "stdlib"]
    first = start(*flags)
    wait_until(first, lambda: has_rows("run", 3))
    kill(first)
    Path("lib/ast.py").write_text("newer = True\n")
    refused(train(*flags), "began with other data")
    Path("run").rename("older")
    trained(*flags, *SHORT)
    sizes = [json.loads(Path(run, "meta.json").read_text())["data"] for run in ("older", "run")]
    assert sizes[0] != sizes[1]


# disks and names


def without_roots_rights(*command):
    """The command, which even as root may not pass over the permissions of files."""
    if os.geteuid() != 0:
        return command
    return ["setpriv", "--bounding-set=-dac_override,-dac_read_search", *command]


def test_what_may_not_be_read_entered_or_written():
    Path("secret.txt").write_bytes(b"x" * 10000)
    Path("secret.txt").chmod(0)
    Path("closed").mkdir(mode=0)
    Path("read-only").mkdir(mode=0o555)
    cases = [
        (["--data", "secret.txt", "--run-dir", "run"], "Permission denied: 'secret.txt'"),
        (["--run-dir", "closed"], "cannot write to --run-dir closed"),
        (["--run-dir", "closed/run"], "cannot write to --run-dir closed/run"),
        (["--run-dir", "read-only/run"], "cannot write to --run-dir read-only/run"),
        (["--run-dir", "run", "--init-from", "closed"], "cannot read closed/config.json"),
    ]
    for flags, words in cases:
        command = without_roots_rights(sys.executable, ROOT / "train.py", *TINY, *flags)
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 1
        assert words in done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize("number", [37, 38, 95])
def test_a_disk_without_locks_trains_with_a_note(number, monkeypatch):
    Path("sitecustomize.py").write_text(
        "import fcntl\n"
        "def lockf(*args):\n"
        f"    raise OSError({number}, 'no locks here')\n"
        "fcntl.lockf = lockf\n"
    )
    monkeypatch.setenv("PYTHONPATH", os.getcwd())
    process = trained("--run-dir", "run", *SHORT)
    assert "note: this disk has no locks" in process.out


def test_home_in_a_name_and_a_finished_run_without_its_rows(monkeypatch):
    monkeypatch.setenv("HOME", os.getcwd())
    shutil.copy("data.txt", "text.txt")
    trained("--run-dir=~/run", "--data=~/text.txt", *SHORT)
    assert Path("run/result.json").exists()
    assert not Path("~").exists()
    Path("run/metrics.jsonl").unlink()
    again = trained("--run-dir=~/run", "--data=~/text.txt", *SHORT)
    assert "is finished: val_loss: " in again.out


def test_commit_of_the_codes_own_folder_and_whether_it_was_clean():
    copy_code("o'neil")
    git = ["git", "-C", "o'neil", "-c", "user.name=x", "-c", "user.email=x"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-qm", "x"], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
    trained("--run-dir", "clean", *SHORT, script="o'neil/train.py")
    assert json.loads(Path("clean/meta.json").read_text())["commit"] == head.stdout.strip()
    with open("o'neil/train.py", "a") as f:
        f.write("# edited\n")
    trained("--run-dir", "dirty", *SHORT, script="o'neil/train.py")
    meta = json.loads(Path("dirty/meta.json").read_text())
    assert meta["commit"] == head.stdout.strip() + "-dirty"


def test_the_code_that_ran_is_stored_though_it_is_edited_meanwhile():
    copy_code()
    before = Path("train.py").read_text()
    process = start("--run-dir", "run", *SHORT, script="train.py")
    wait_until(process, Path("run/lock").exists)  # its flags are read, torch is not yet imported
    Path("train.py").write_text("an edit")
    Path("config.py").write_text("an edit")
    process.communicate()
    assert process.returncode == 0
    assert Path("run/train.py").read_text() == before
    assert "class Config" in Path("run/config.py").read_text()


# terminals, locales, variables


def in_a_terminal(command, columns, environment):
    """What it prints to a terminal so wide."""
    terminal, process_side = pty.openpty()
    subprocess.run(["stty", "rows", "24", "cols", str(columns)], stdin=process_side, check=True)
    process = subprocess.Popen(
        command,
        env=os.environ | environment,
        stdin=process_side,
        stdout=process_side,
        stderr=process_side,
    )
    os.close(process_side)
    output = b""
    while True:
        try:
            data = os.read(terminal, 65536)
        except OSError:  # how Linux says that it is closed
            break
        if not data:
            break
        output += data
    os.close(terminal)
    assert process.wait() == 0, output.decode(errors="replace")
    return output


def test_the_bar_at_80_columns_and_a_sample_of_control_characters():
    # nothing is learned, so that the sample is of any bytes
    flags = ["--run-dir", "run", "--lr", "1e-9", "--sample-tokens", "300"]
    command = [sys.executable, str(ROOT / "train.py"), *TINY, *flags]
    environment = {"TQDM_MININTERVAL": "0", "PYTHONIOENCODING": "latin-1"}
    output = in_a_terminal(command, 80, environment)
    bar, _, rest = output.partition(b"\n")
    bars = bar.decode("latin-1").split("\r")
    assert any("loss 5.545, val_loss 5.545" in bar for bar in bars)
    last = [bar for bar in bars if bar.strip()][-1]
    assert "40/40" in last
    assert "val_loss 5.545" in last
    assert max(len(bar) for bar in bars) <= 80
    for control in range(32):
        if chr(control) not in "\t\r\n":
            assert bytes([control]) not in rest
    sample = Path("run/sample.txt").read_bytes().decode()
    assert any(ord(c) < 9 for c in sample)  # the file has it as it is
    assert b"\nval_loss: 5.545" in output


def test_variables_left_in_the_shell(monkeypatch):
    monkeypatch.setenv("TQDM_DISABLE", "1")
    monkeypatch.setenv("CXX", "")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_PROJECT", "theirs")
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    place = TINY.index("--wandb")
    flags = TINY[:place] + TINY[place + 2 :]
    command = [sys.executable, ROOT / "train.py", *flags, "--run-dir", "run", "--steps", "5"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "step 0/5, loss" in done.stdout
    assert "wandb offline: " in done.stdout
    config = json.loads(Path("run/config.json").read_text())
    assert config["wandb"] == "offline"
    assert config["wandb_project"] == "theirs"

    monkeypatch.setenv("WANDB_MODE", "dryrun")
    monkeypatch.setenv("WORLD_SIZE", "1")
    trained("--run-dir", "other", *SHORT)
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "1")):
        monkeypatch.setenv(name, value)
        refused(train("--run-dir", "none"), "no launcher set RANK and WORLD_SIZE")


# wandb


def test_wandb_is_not_installed(monkeypatch):
    Path("wandb.py").write_text("raise ModuleNotFoundError('No module named wandb')")
    monkeypatch.setenv("PYTHONPATH", os.getcwd())
    process = trained("--run-dir", "run", "--wandb", "offline", *SHORT)
    assert "note: wandb failed, training goes on: No module named wandb" in process.out


def test_wandbs_service_may_not_be_executed(monkeypatch):
    Path("sitecustomize.py").write_text(
        "import subprocess\n"
        "start = subprocess.Popen.__init__\n"
        "def refuse(self, args, *rest, **options):\n"
        "    if 'wandb-core' in str(args):\n"
        "        raise PermissionError(13, 'Permission denied', 'wandb-core')\n"
        "    start(self, args, *rest, **options)\n"
        "subprocess.Popen.__init__ = refuse\n"
    )
    monkeypatch.setenv("PYTHONPATH", os.getcwd())
    process = trained("--run-dir", "run", "--wandb", "offline", *SHORT)
    assert "note: wandb failed, training goes on: [Errno 13]" in process.out


def test_wandbs_disk_is_full(monkeypatch):
    Path("disk").mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16k", "none", "disk"]
    if subprocess.run(mount, stderr=subprocess.DEVNULL).returncode != 0:
        pytest.skip("a small disk is mounted by root alone, and not in every container")
    try:
        monkeypatch.setenv("WANDB_DIR", "disk")
        trained("--run-dir", "run", "--wandb", "offline")
        assert shutil.disk_usage("disk").free == 0
    finally:
        subprocess.run(["umount", "-l", "disk"], check=True)
    assert Path("run/result.json").exists()


def test_a_copied_run_directory_is_another_run_for_wandb():
    flags = ["--wandb", "offline", *SHORT]
    trained("--run-dir", "run", *flags)
    Path("run/result.json").unlink()
    shutil.copytree("run", "copy")
    trained("--run-dir", "run", *flags)
    trained("--run-dir", "copy", *flags)
    ids = [path.name.rsplit("-", 1)[1] for path in sorted(Path("wandb").glob("offline-run-*"))]
    assert len(ids) == 3
    assert len(set(ids)) == 2


# fields


def test_fields_that_json_does_not_hold():
    copy_code()
    text = Path("config.py").read_text()
    field = '    where: Path = Path("here")\n'
    Path("config.py").write_text(text.replace("    # loop\n", f"    # loop\n{field}"))
    refused(train("--run-dir", "run", script="train.py"), "cannot hold the field where")
    field = '    target: float = float("nan")\n'
    Path("config.py").write_text(text.replace("    # loop\n", f"    # loop\n{field}"))
    trained("--run-dir", "run", *SHORT, script="train.py")
    again = trained("--run-dir", "run", *SHORT, script="train.py")
    assert "is finished" in again.out


def test_a_seed_of_twenty_digits():
    refused(train("--seed", 10**20), "seed must be 0 or more, and below", code=2)
