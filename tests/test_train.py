"""Run train.py as a user does, and look at what it leaves."""

import json
import math
import os
import random
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from config import Config

TINY = [
    "--data", "data.txt",
    "--n-layer", "2",
    "--n-head", "2",
    "--n-embd", "32",
    "--seq-len", "32",
    "--batch-size", "8",
    "--steps", "40",
    "--warmup", "5",
    "--log-every", "1",
    "--eval-every", "5",
    "--eval-tokens", "1024",
    "--sample-tokens", "16",
    "--device", "cpu",
    "--wandb", "disabled",
]  # fmt: skip
TWO_PROCESSES = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@pytest.fixture(autouse=True)
def workdir(tmp_path, monkeypatch):
    """A folder of its own, with a little text in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    write_text()


def write_text():
    Path("data.txt").write_bytes(Path(os.__file__).parent.joinpath("argparse.py").read_bytes())


def copy_code(folder="."):
    """A train.py and a config.py that a test may edit."""
    Path(folder).mkdir(exist_ok=True)
    for name in ("train.py", "config.py"):
        shutil.copy(ROOT / name, folder)


def start(*flags, script=ROOT / "train.py", launcher=(), **kwargs):
    command = [sys.executable, *launcher, str(script), *TINY, *map(str, flags)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, **kwargs)


def train(*flags, **kwargs):
    process = start(*flags, **kwargs)
    process.out, process.err = process.communicate(timeout=200)
    return process


def trained(*flags, **kwargs):
    process = train(*flags, **kwargs)
    assert process.returncode == 0, process.err
    return process


def killed_and_resumed(*flags, **kwargs):
    """The rows of a run that is killed after its first checkpoints, and then resumed."""
    killed = start(*flags, "--run-dir", "killed", **kwargs)
    wait_until(killed, lambda: has_rows("killed", 22))
    kill(killed)
    trained(*flags, "--run-dir", "killed", **kwargs)
    return metrics("killed")


def train_here(*flags):
    """The variables of train.py after it ran in this process, which has imported torch."""
    with mock.patch("sys.argv", ["train.py", *TINY, *map(str, flags)]):
        return runpy.run_path(str(ROOT / "train.py"), run_name="__main__")


def error_here(*flags):
    """The message with which train.py ends in this process."""
    with pytest.raises(SystemExit) as error:
        train_here(*flags)
    assert error.value.code.startswith("error: ")
    return error.value.code


def metrics(run_dir, torn=False):
    """The rows of metrics.jsonl without the times; torn: whose last line may be half written."""
    rows = []
    for line in Path(run_dir, "metrics.jsonl").read_text().splitlines(keepends=True):
        if torn and not line.endswith("\n"):
            continue
        row = json.loads(line)
        row.pop("seconds", None)
        rows.append(row)
    return rows


def has_rows(run_dir, count):
    path = Path(run_dir, "metrics.jsonl")
    return path.exists() and path.read_text().count("\n") > count


def wait_until(process, condition):
    while not condition():
        assert process.poll() is None, process.communicate()
        time.sleep(0.001)


def kill(process):
    process.kill()
    process.communicate()


def files(folder):
    """The content of every file there."""
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def refused(process, *words, code=1):
    """It ended with an error that says why, and no traceback."""
    assert process.returncode == code, process.out + process.err
    assert "Traceback" not in process.err, process.err
    for word in words:
        assert word in process.err, process.err
    if code == 1:
        assert process.err.startswith("error: "), process.err


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("OMP_NUM_THREADS", "1")
        write_text()
        process = trained("--run-dir", "run")
    process.run_dir = folder / "run"
    return process


# what a run leaves


def test_run_learns_and_leaves_its_record(whole):
    rows = metrics(whole.run_dir)
    assert [row["step"] for row in rows] == list(range(41))
    assert [row["step"] for row in rows if "val_loss" in row] == list(range(0, 41, 5))
    assert rows[0]["train_loss"] == pytest.approx(math.log(256), rel=0.02)
    assert rows[0]["val_loss"] == pytest.approx(math.log(256), rel=0.02)
    assert rows[-1]["val_loss"] < 3.3
    assert rows[-1]["tokens"] == 40 * 8 * 32
    assert set(rows[5]) == {"step", "tokens", "train_loss", "lr", "val_loss"}

    config = json.loads((whole.run_dir / "config.json").read_text())
    assert json.loads(json.dumps(vars(Config(**config)))) == config
    assert config["dtype"] == "auto"  # as given; what it came to is in meta.json
    meta = json.loads((whole.run_dir / "meta.json").read_text())
    assert meta["dtype"] in ("float32", "bfloat16")
    assert meta["device"] == "cpu"
    assert meta["script"] == "train.py"
    assert sum(meta["data"][:2]) == os.path.getsize(whole.run_dir.parent / "data.txt")
    for name in ("train.py", "config.py"):
        assert (whole.run_dir / name).read_text() == (ROOT / name).read_text()

    result = json.loads((whole.run_dir / "result.json").read_text())
    assert list(result)[0] == "val_loss"
    assert result["val_loss"] == rows[-1]["val_loss"]
    assert result["steps"] == 40
    assert result["tokens"] == 40 * 8 * 32
    closing = whole.out.split("---")[1]
    assert closing.startswith(f"\nval_loss: {result['val_loss']:.5g}\nsteps: 40\n")
    for name in result:
        assert f"\n{name}: " in closing
    assert len((whole.run_dir / "sample.txt").read_bytes().decode()) == 16
    # a log file gets plain lines, with the measures where they were measured
    lines = {line.split(",")[0]: line for line in whole.out.splitlines()}
    assert lines["step 10/40"].endswith(f"val_loss {rows[10]['val_loss']:.4g}")
    assert lines["step 11/40"].endswith(f"loss {rows[11]['train_loss']:.4g}")
    assert "val_loss" not in lines["step 11/40"]
    assert torch.load(whole.run_dir / "checkpoint.pt", weights_only=True)["updates"] == 40


@pytest.fixture(params=["muon", "adamw"])
def variables(request):
    """The variables of train.py after a short run."""
    flags = ["--steps", "10", "--optimizer", request.param, "--run-dir", "run"]
    return train_here(*flags)


def test_model_is_causal_and_muon_is_muon(variables):
    model = variables["model"]
    ids = torch.randint(256, (2, 32))
    changed = ids.clone()
    changed[:, 20] = (ids[:, 20] + 1) % 256
    with torch.no_grad():
        before, after = model(ids), model(changed)
    assert before.shape == (2, 32, 256)
    torch.testing.assert_close(before[:, :20], after[:, :20])
    assert not torch.allclose(before[:, 20:], after[:, 20:])

    # torch has a Muon, too, which multiplies in bfloat16
    options = dict(lr=0.1, weight_decay=0.1)
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in [(8, 8), (8, 32), (32, 8), (8, 8)]]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    optimizers = [
        variables["Muon"](ours, dict(beta=0.8, **options)),
        torch.optim.Muon(theirs, momentum=0.8, adjust_lr_fn="match_rms_adamw", **options),
    ]
    for _ in range(3):
        for p, q in zip(ours, theirs):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for p, q in zip(ours, theirs):
        torch.testing.assert_close(p, q, rtol=0, atol=0.02)


def test_tokens_in_a_bin_file():
    np.arange(20000, dtype=np.uint16).clip(0, 999).tofile("tokens.bin")
    trained("--data", "tokens.bin", "--vocab-size", 1000, "--run-dir", "run")
    assert len(Path("run/sample.txt").read_text().split(", ")) == 16


def test_without_the_sample_cell_nothing_but_the_sample_is_lost(whole):
    text = (ROOT / "train.py").read_text()
    begin, end = text.index("# %%\n# a sample"), text.index("# %%\n# the result")
    Path("mine.py").write_text(text[:begin] + text[end:])
    Path("config.py").write_text((ROOT / "config.py").read_text())
    trained("--run-dir", "run", script="mine.py")
    assert metrics("run") == metrics(whole.run_dir)
    assert not Path("run/sample.txt").exists()
    assert "is finished: val_loss: " in trained("--run-dir", "run", script="mine.py").out


# interrupted, and the same line again


def test_kill_9_anywhere_and_resume_exactly(whole):
    kills = 0
    for rows in sorted(random.sample(range(35), 4)):
        # after so many rows; the next one perhaps while it starts
        process = start("--run-dir", "run")
        while process.poll() is None and not has_rows("run", rows):
            time.sleep(0.001)
        kill(process)
        kills += process.returncode == -signal.SIGKILL
    trained("--run-dir", "run")
    assert kills
    assert metrics("run") == metrics(whole.run_dir)
    assert Path("run/sample.txt").read_text() == (whole.run_dir / "sample.txt").read_text()


def test_kill_9_while_a_checkpoint_is_written(whole):
    process = start("--run-dir", "run")
    wait_until(process, Path("run/checkpoint.pt.tmp").exists)
    kill(process)
    trained("--run-dir", "run")
    assert metrics("run") == metrics(whole.run_dir)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_signal_saves_and_exits(whole, number):
    process = start("--run-dir", "run", "--eval-every", 1000)
    wait_until(process, lambda: has_rows("run", 3))
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number, err
    assert f"stopped by {number.name} at step" in out
    assert not err
    resume = out.split("To resume:\npython ")[1].split()
    saved = torch.load("run/checkpoint.pt", weights_only=True)["updates"]
    assert saved == metrics("run")[-1]["step"] + 1

    # the line it printed
    again = subprocess.run([sys.executable, *resume], capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert f"run resumes at step {saved}\n" in again.stdout
    losses = [row.get("train_loss") for row in metrics("run")]
    assert losses == [row.get("train_loss") for row in metrics(whole.run_dir)]


def test_same_command_on_a_finished_run_and_another_config(whole):
    before = files(whole.run_dir)
    again = trained("--run-dir", whole.run_dir)
    assert "is finished: val_loss: " in again.out
    other = train("--run-dir", whole.run_dir, "--lr", 0.1, "--seed", 2)
    refused(other, "another run", "lr is 0.015 there, 0.1 here", "seed is 1337 there, 2 here")
    for name in ("train.py", "config.py"):
        Path(name).write_text((ROOT / name).read_text() + "# another experiment\n")
    Path("mine.py").write_text((ROOT / "train.py").read_text())
    refused(train("--run-dir", whole.run_dir, script="mine.py"), "is a run of train.py; name")
    changed = trained("--run-dir", whole.run_dir, script="train.py")
    assert changed.out.count("note: the code has changed since this run") == 2
    assert before == files(whole.run_dir)


def test_a_finished_run_opened_by_a_script_that_names_it(whole):
    copy_code()
    before = files(whole.run_dir)
    text = Path("train.py").read_text()
    assert "open_run(Config())" in text
    text = text.replace("open_run(Config())", f"open_run(Config.load({str(whole.run_dir)!r}))")
    Path("look.py").write_text(text + "\nprint('looked at', evaluate())\n")
    opened = subprocess.run([sys.executable, "look.py"], capture_output=True, text=True)
    assert opened.returncode == 0, opened.stderr
    last = metrics(whole.run_dir)[-1]
    assert f"looked at {{'val_loss': {last['val_loss']}}}" in opened.stdout

    # only the weights, without the data
    cells = text.split("# %%\n")
    kept = [cells[i] for i in range(1, len(cells)) if not cells[i].startswith("# data")]
    load = 'torch.load(run.dir / "checkpoint.pt", map_location=device)["model"]'
    Path("data.txt").unlink()
    Path("mine.py").write_text(
        "".join(kept[:4]) + f"model.load_state_dict({load})\nprint(model.head.weight.sum())\n"
    )
    opened = subprocess.run([sys.executable, "mine.py"], capture_output=True, text=True)
    assert opened.returncode == 0, opened.stderr
    assert "tensor(" in opened.stdout
    assert before == files(whole.run_dir)


def test_resume_of_a_model_with_dropout():
    copy_code()
    text = Path("train.py").read_text()
    text = text.replace("self.down(h)", "F.dropout(self.down(h), 0.3, self.training)")
    random = "return dict(random=torch.rand(1).item(), val_loss="
    text = text.replace("return dict(val_loss=", random)
    Path("train.py").write_text(text)
    trained("--run-dir", "whole", script="train.py")
    assert killed_and_resumed(script="train.py") == metrics("whole")


def test_no_other_script_goes_on_with_a_run():
    copy_code()
    first = start("--run-dir", "run", script="train.py")
    wait_until(first, lambda: has_rows("run", 12))
    kill(first)
    before = files("run")
    text = Path("train.py").read_text()
    Path("mine.py").write_text(text)
    look = text.replace("open_run(Config())", 'open_run(Config.load("run"))')
    Path("look.py").write_text(look)
    refused(train("--run-dir", "run", script="mine.py"), "run is a run of train.py; name another")
    refused(train("--run-dir", "run", script="look.py"), "run is a run of train.py; name another")
    assert files("run") == before

    # edited in mid-run, which its record says
    Path("train.py").write_text(text + "# edited\n")
    trained("--run-dir", "run", script="train.py")
    (edited,) = json.loads(Path("run/meta.json").read_text())["edited"]
    assert edited == f"train.py {zlib.crc32(text.encode()):x}"


def test_resume_with_other_flags_that_make_no_other_experiment(whole):
    first = start("--run-dir", "run", "--wandb-group", "a", "--device", "auto")
    wait_until(first, lambda: has_rows("run", 12))
    kill(first)
    flags = ["--wandb-group", "b", "--log-every", 10, "--sample-tokens", 4, "--eval-every", 20]
    trained("--run-dir", "run", "--device", "cpu", *flags)
    theirs = {row["step"]: row for row in metrics(whole.run_dir)}
    for row in metrics("run"):
        assert row["lr"] == theirs[row["step"]]["lr"]
        assert row.get("train_loss") == theirs[row["step"]].get("train_loss")
    assert metrics("run")[-1] == metrics(whole.run_dir)[-1]


def test_resume_on_other_data_is_refused():
    first = start("--run-dir", "run")
    wait_until(first, lambda: has_rows("run", 3))
    kill(first)
    before = files("run")
    with open("data.txt", "a") as f:
        f.write("one line more\n")
    refused(train("--run-dir", "run"), "other data")
    assert files("run") == before


def test_resume_after_an_edit_of_the_model_shows_all_that_torch_says():
    copy_code()
    first = start("--run-dir", "run", script="train.py")
    wait_until(first, Path("run/checkpoint.pt").exists)
    kill(first)
    text = Path("train.py").read_text()
    Path("train.py").write_text(text.replace("attn_out", "mixed"))
    process = train("--run-dir", "run", script="train.py")
    assert process.returncode == 1
    assert "error: run was trained by other code, its copy is there: " in process.err
    assert 'Missing key(s) in state_dict: "blocks.0.mixed.weight"' in process.err
    assert '"blocks.1.attn_out.weight"' in process.err
    # Momenta would go to other weights.
    Path("train.py").write_text(text.replace('endswith(".conv")', 'endswith(".no")'))
    process = train("--run-dir", "run", script="train.py")
    assert process.returncode == 1
    assert "error: run was trained by other code, its copy is there: " in process.err
    assert "doesn't match the size of optimizer's group" in process.err


def test_resume_after_an_edit_of_an_option_trains_by_the_edited_code():
    copy_code()
    first = start("--run-dir", "run", script="train.py")
    wait_until(first, Path("run/checkpoint.pt").exists)
    kill(first)
    text = Path("train.py").read_text()
    text = text.replace("params=fast, scale=4.0", "params=fast")
    Path("train.py").write_text(text.replace("params=rest", "params=rest, scale=9.0"))
    again = trained("--run-dir", "run", script="train.py")
    assert "note: the code has changed since this run" in again.out
    saved = torch.load("run/checkpoint.pt", weights_only=True)
    groups = saved["optimizers"][1]["param_groups"]
    assert "scale" not in groups[0] and groups[1]["scale"] == 9.0


def test_resume_of_what_an_optimizer_keeps_in_its_groups():
    copy_code()
    text = Path("train.py").read_text()
    begin = "        for group in self.param_groups:\n"
    assert begin in text and 'alpha=-group["lr"]' in text
    text = text.replace(begin, begin + "            group['k'] = group.get('k', 0) + 1\n")
    text = text.replace('alpha=-group["lr"]', 'alpha=-group["lr"] / group["k"]')
    Path("train.py").write_text(text)
    trained("--run-dir", "whole", script="train.py")
    assert killed_and_resumed(script="train.py") == metrics("whole")


def test_a_run_that_never_trained_may_be_corrected():
    copy_code()
    text = Path("train.py").read_text()
    Path("train.py").write_text(text.replace("\nrun.used = True", "\nsys.exit('stopped')"))
    assert "stopped" in train("--run-dir", "run", "--lr", 1, script="train.py").err
    assert json.loads(Path("run/config.json").read_text())["lr"] == 1
    train_here("--run-dir", "run", "--lr", 0.1, "--steps", 5)
    assert json.loads(Path("run/config.json").read_text())["lr"] == 0.1


def test_two_processes_in_one_run_directory():
    first = start("--run-dir", "run", "--steps", 2000)
    wait_until(first, Path("run/config.json").exists)
    second = train("--run-dir", "run", "--steps", 2000)
    kill(first)
    refused(second, "in use")


def test_init_from_another_run(whole):
    flags = ["--init-from", whole.run_dir, "--run-dir", "run"]
    train_here(*flags, "--steps", 10)
    assert metrics("run")[0]["val_loss"] == metrics(whole.run_dir)[-1]["val_loss"]
    assert json.loads(Path("run/config.json").read_text())["init_from"] == str(whole.run_dir)
    wider = error_here("--init-from", whole.run_dir, "--run-dir", "wider", "--n-embd", 64)
    assert wider.endswith("is another: add --n-embd 32")
    nowhere = error_here("--init-from", "nowhere", "--run-dir", "none")
    assert nowhere.startswith("error: cannot read nowhere/config.json")

    # killed before its first checkpoint, it begins with those weights again
    killed = start(*flags[:2], "--run-dir", "killed", "--steps", 10)
    wait_until(killed, Path("killed/meta.json").exists)
    kill(killed)
    Path("killed/checkpoint.pt").unlink(missing_ok=True)
    train_here(*flags[:2], "--run-dir", "killed", "--steps", 10)
    assert metrics("killed") == metrics("run")


# several processes


def test_two_processes_and_micro_batches_equal_one():
    float32 = ("--dtype", "float32", "--run-dir")
    train_here(*float32, "one")
    train_here(*float32, "micro", "--micro-batch-size", 2)
    process = trained(*float32, "two", "--micro-batch-size", 2, launcher=TWO_PROCESSES)
    assert process.out.count("\nval_loss:") == 1  # only one speaks
    for run_dir in ("micro", "two"):
        for mine, theirs in zip(metrics(run_dir), metrics("one"), strict=True):
            assert mine == pytest.approx(theirs, rel=1e-3)  # rounding, which training amplifies


def test_error_in_two_processes_or_in_the_second():
    process = train("--batch-size", 7, launcher=TWO_PROCESSES)
    assert process.returncode == 1
    assert "cannot be shared by 2 processes" in process.err
    process = train("--lr", 1e6, launcher=TWO_PROCESSES)
    assert process.returncode == 1
    assert "not finite at step" in process.err

    # of an error in the second process alone both end
    copy_code()
    text = Path("train.py").read_text()
    fault = "    # Report.\n    if rank == 1 and step == 7: sys.exit('error: the second')\n"
    Path("train.py").write_text(text.replace("    # Report.\n", fault))
    process = train("--run-dir", "run", script="train.py", launcher=TWO_PROCESSES)
    assert process.returncode == 1
    assert process.err.count("error: the second") == 1

    # on a node that does not see the disk of the others
    exists = '(run.dir / "checkpoint.pt").exists()'
    assert exists in text
    Path("train.py").write_text(text.replace(exists, f"({exists} and rank == 0)"))
    process = train("--run-dir", "run", script="train.py", launcher=TWO_PROCESSES)
    assert process.returncode == 1
    assert "error: the processes see other checkpoints: is run on a disk of all" in process.err


# wandb


def test_wandb_offline_holds_config_and_history(monkeypatch):
    monkeypatch.setenv("WANDB_DIR", os.getcwd())
    flags = ["--run-dir", "run", "--wandb", "offline", "--wandb-group", "a-sweep"]
    flags += ["--eval-every", 1000]
    process = start(*flags)
    wait_until(process, lambda: has_rows("run", 3))
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    trained(*flags)
    steps, ids, config, samples = {}, set(), {}, []
    for log in sorted(Path("wandb").glob("offline-run-*/*.wandb")):
        read = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", log]  # its own reader
        lines = subprocess.run(read, capture_output=True, check=True).stdout.splitlines()
        for record in map(json.loads, lines):
            if record["type"] == "run":
                ids.add(record["run"]["run_id"])
                assert record["run"]["run_group"] == "a-sweep"
                assert record["run"]["display_name"] == "run"
                config |= record["run"]["config"].get("update", {})
            if record["type"] == "history":
                row = record["history"]["item"]
                samples.append(row.pop("sample", None))
                steps[row["step"]] = row
    assert len(ids) == 1  # the resumed run goes on under its id
    assert {name: config[name] for name in vars(Config())} == json.loads(
        Path("run/config.json").read_text()
    )
    for row in metrics("run"):
        assert {name: steps[row["step"]][name] for name in row} == row
    assert samples[-1] == Path("run/sample.txt").read_bytes().decode()


def test_wandb_failing_in_mid_run_does_not_stop_training():
    process = start("--run-dir", "run", "--wandb", "offline", "--steps", 400, "--log-every", 10)
    wait_until(process, lambda: has_rows("run", 3))
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for child in children:  # wandb's service
        os.kill(int(child), signal.SIGKILL)
    out, err = process.communicate(timeout=200)
    assert children
    assert process.returncode == 0, err
    assert "\nval_loss: " in out


def test_wandb_that_does_not_start_does_not_stop_training(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    process = trained("--run-dir", "run", "--wandb", "online", "--steps", 5)
    assert "note: wandb failed, training goes on" in process.out
    assert "\nval_loss: " in process.out
    trained("--run-dir", "run", "--wandb", "offline", "--steps", 5)  # what one does then


# errors


def test_disk_full_during_a_checkpoint(whole):
    train_here("--run-dir", "run", "--lr", 1e-3)  # how large a checkpoint is
    limit = os.path.getsize("run/checkpoint.pt") // 2
    process = start("--run-dir", "full")
    wait_until(process, lambda: has_rows("full", 6))
    kill(process)
    before = Path("full/checkpoint.pt").read_bytes()

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    full = train("--run-dir", "full", preexec_fn=limited)
    refused(full, "cannot write full/checkpoint.pt")
    assert Path("full/checkpoint.pt").read_bytes() == before
    trained("--run-dir", "full")
    assert metrics("full") == metrics(whole.run_dir)


def test_damaged_files_of_a_run(whole):
    checkpoint = (whole.run_dir / "checkpoint.pt").read_bytes()
    damages = [
        ("checkpoint.pt", checkpoint[:5000], "cannot read run/checkpoint.pt"),
        ("checkpoint.pt", b"not a checkpoint", "cannot read run/checkpoint.pt"),
        ("config.json", b'{"lr": ', "cannot read run/config.json"),
        ("meta.json", b"", "cannot read run/meta.json"),
        ("config.json", b'{"moments": 1}', "unexpected keyword argument 'moments'"),
    ]
    for name, content, words in damages:
        run = Path("run")
        run.mkdir(exist_ok=True)
        for f in ("config.json", "metrics.jsonl", "checkpoint.pt", "meta.json", "train.py"):
            (run / f).write_bytes((whole.run_dir / f).read_bytes())
        (run / name).write_bytes(content)
        refused(train("--run-dir", "run"), words)
        assert (run / name).read_bytes() == content
        assert metrics("run") == metrics(whole.run_dir)


@pytest.mark.parametrize("name", ["train.py", "config.json", "checkpoint.pt", "result.json"])
def test_a_folder_of_other_files_is_not_touched(name):
    Path("mine").mkdir()
    Path("mine", name).write_text("precious")
    refused(train("--run-dir", "mine"), f"mine holds {name}, no run")
    assert os.listdir("mine") == [name]
    assert Path("mine", name).read_text() == "precious"


def test_loss_that_is_not_finite():
    process = train("--run-dir", "run", "--lr", 1e6, "--warmup", 0)
    refused(process, "not finite at step", "--lr")
    assert metrics("run")[-1]["train_loss"] is None
    saved = torch.load("run/checkpoint.pt", weights_only=True)
    for weight in saved["model"].values():
        assert weight.isfinite().all()


FLAGS = 2  # the exit code of tyro, which prints a box
BAD = {
    "unknown flag": (["--learning-rate", 1], "Unrecognized options", FLAGS),
    "wrong type": (["--lr", "fast"], "could not convert string to float", FLAGS),
    "not a choice": (["--optimizer", "sgd"], "invalid choice", FLAGS),
    "heads": (["--n-head", 3], "multiple of twice n_head", FLAGS),
    "negative lr": (["--lr", -1], "lr must be positive", FLAGS),
    "lr nan": (["--lr", "nan"], "lr must be positive", FLAGS),
    "no steps": (["--steps", 0], "steps must be positive", FLAGS),
    "negative warmup": (["--warmup", -1], "warmup must be 0 or more", FLAGS),
    "cooldown": (["--cooldown", 2], "cooldown must be between 0 and 1", FLAGS),
    "micro batch": (["--micro-batch-size", 3], "must divide batch_size", FLAGS),
    "run_dir under a file": (["--run-dir", "data.txt/run"], "cannot write to --run-dir", 1),
    "long name": (["--run-dir", "x" * 300], "cannot write to --run-dir", 1),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    flags, words, code = BAD[name]
    refused(train("--run-dir", "run", *flags), words, code=code)
    assert not Path("run/result.json").exists()


BAD_DATA = {
    "missing data": (["--data", "nowhere.txt"], "No such file or directory: 'nowhere.txt'"),
    "directory as data": (["--data", "."], "Is a directory"),
    "empty data": (["--data", "empty.txt"], "cannot read empty.txt"),
    "short data": (["--data", "short.txt"], "too few"),
    "odd bin": (["--data", "odd.bin"], "cannot read odd.bin"),
    "ids beyond the vocabulary": (["--data", "large.bin"], "--vocab-size"),
    "no such device": (["--device", "cuda:9"], "--device cuda:9 is not here"),
    "no device at all": (["--device", "toaster"], "--device toaster is not here"),
}


@pytest.mark.parametrize("name", BAD_DATA)
def test_bad_data_or_device(name):
    Path("empty.txt").touch()
    Path("short.txt").write_bytes(b"x" * 100)
    Path("odd.bin").write_bytes(b"x" * 1001)
    np.full(10000, 256, np.uint16).tofile("large.bin")
    flags, words = BAD_DATA[name]
    assert words in error_here("--run-dir", "run", *flags)
    assert not Path("run/result.json").exists()


def test_compile_without_a_compiler(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    refused(train("--run-dir", "run", "--compile", "on"), "torch.compile fails", "--compile off")
    train_here("--run-dir", "run", "--compile", "off")  # what the message says

    # on auto it trains all the same; here as if this were a GPU, where auto compiles
    copy_code()
    text = Path("train.py").read_text()
    assert '(cfg.compile == "auto" and on_cuda)' in text
    Path("train.py").write_text(text.replace("and on_cuda)", "and True)"))
    process = trained("--run-dir", "auto", script="train.py")
    assert "note: torch.compile fails here, so the run is slower: " in process.out
    assert metrics("auto") == metrics("run")
    assert json.loads(Path("auto/meta.json").read_text())["compile"] is False
