"""Run train.py as a user does, or in this process, and look at what it leaves."""
import io
import json
import math
import os
import random
import resource
import runpy
import shutil
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import config

TINY = [
    "--data", "data.txt", "--device", "cpu", "--wandb", "disabled",
    "--n-layer", "2", "--n-head", "2", "--n-embd", "32", "--seq-len", "32",
    "--batch-size", "8", "--steps", "40", "--warmup", "5", "--log-every", "1",
    "--eval-every", "5", "--eval-tokens", "1024", "--sample-tokens", "16",
]  # fmt: skip
TWO_PROCESSES = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
SHORT = ["--steps", 5, "--eval-tokens", 32]
OPEN = "open_run(Config())"
MLP = "F.relu(h).square()"
MEASURES = "return dict(val_loss=all_reduce(total) / len(val_offsets))"

torch.set_num_threads(1)  # the same sums as in processes with OMP_NUM_THREADS=1

@pytest.fixture(autouse=True)
def workdir(tmp_path, monkeypatch):
    """A folder of its own, with a little text in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # for the config.py of scripts here
    write_text()

def write_text():
    shutil.copy(Path(os.__file__).parent / "argparse.py", "data.txt")

def copy_code(folder="."):
    """A train.py and a config.py that a test may edit."""
    Path(folder).mkdir(exist_ok=True)
    for name in ("train.py", "config.py"):
        shutil.copy(ROOT / name, folder)

def edited(*changes, script="train.py"):
    """A script here: train.py with these changes, each of what is there once."""
    text = (ROOT / "train.py").read_text()
    for old, new in changes:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    Path(script).write_text(text)
    return script

def start(*flags, script=ROOT / "train.py", launcher=(), **kwargs):
    command = [sys.executable, *launcher, str(script), *TINY, *map(str, flags)]
    kwargs = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) | kwargs
    return subprocess.Popen(command, **kwargs)

def train(*flags, **kwargs):
    process = start(*flags, **kwargs)
    process.out, process.err = process.communicate(timeout=200)
    return process

def trained(*flags, **kwargs):
    process = train(*flags, **kwargs)
    assert process.returncode == 0, process.err
    return process

def run_here(*flags, script=ROOT / "train.py", tiny=TINY):
    """The same in this process, which has imported torch; also the script's variables. What
    would end with a traceback is raised."""
    out, err = io.StringIO(), io.StringIO()
    done = SimpleNamespace(returncode=0, variables={})
    argv = mock.patch("sys.argv", ["train.py", *tiny, *map(str, flags)])
    handlers = mock.patch("signal.signal")  # would stay
    freeze = mock.patch("gc.freeze")  # this process goes on
    with redirect_stdout(out), redirect_stderr(err), argv, handlers, freeze:
        try:
            done.variables = runpy.run_path(str(script), run_name="__main__")
        except SystemExit as end:
            done.returncode = 1 if isinstance(end.code, str) else end.code or 0
            print(end.code, file=err)  # as Python does with a text
    done.out, done.err = out.getvalue(), err.getvalue()
    return done

def train_here(*flags, **kwargs):
    done = run_here(*flags, **kwargs)
    assert done.returncode == 0, done.err
    return done

def broken_here(steps, *flags, **kwargs):
    """A run in this process that ends after so many steps, like one that is killed."""
    stopping = [False] * steps + [InterruptedError]
    with mock.patch("config.Run.stopping", side_effect=stopping):
        with pytest.raises(InterruptedError):
            run_here(*flags, **kwargs)

def killed_and_resumed(*flags, script=ROOT / "train.py"):
    """The rows of a run that is killed at some step, and then resumed."""
    process = start(*flags, "--run-dir", "killed", script=script)
    rows = random.randrange(6, 30)
    wait_until(process, lambda: has_rows("killed", rows))
    kill(process)
    train_here(*flags, "--run-dir", "killed", script=script)
    return metrics("killed")

def metrics(run_dir):
    """The rows of metrics.jsonl without the times."""
    rows = [json.loads(line) for line in Path(run_dir, "metrics.jsonl").open()]
    for row in rows:
        del row["seconds"]
    return rows

def read_json(*path):
    return json.loads(Path(*path).read_text())

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
    assert code != 1 or process.err.startswith("error: "), process.err
    for word in words:
        assert word in process.err, process.err

@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("whole"))
        write_text()
        done = train_here("--run-dir", "run")
        done.run_dir = Path("run").resolve()
    return done

# what a run leaves

def test_run_learns_and_leaves_its_record(whole):
    rows = metrics(whole.run_dir)
    assert [row["step"] for row in rows] == list(range(41))
    assert [row["step"] for row in rows if "val_loss" in row] == list(range(0, 41, 5))
    assert rows[0]["train_loss"] == pytest.approx(math.log(256), rel=0.02)
    assert rows[-1]["val_loss"] < 2.6
    assert set(rows[5]) == {"step", "tokens", "train_loss", "lr", "val_loss"}
    record = read_json(whole.run_dir, "config.json")
    assert json.loads(json.dumps(vars(config.Config(**record)))) == record
    assert record["dtype"] == "auto"  # as given; what it came to is in meta.json
    meta = read_json(whole.run_dir, "meta.json")
    assert (meta["device"], meta["script"], meta["start"]) == ("cpu", "train.py", 0)
    assert meta["dtype"] in ("float32", "bfloat16")
    assert sum(meta["data"][:2]) == os.path.getsize(whole.run_dir.parent / "data.txt")
    for name in ("train.py", "config.py"):
        assert (whole.run_dir / "code/0" / name).read_bytes() == (ROOT / name).read_bytes()

    result = read_json(whole.run_dir, "result.json")
    assert list(result.items())[:2] == [("val_loss", rows[-1]["val_loss"]), ("steps", 40)]
    assert f"\n---\nval_loss: {result['val_loss']:.5g}\nsteps: 40\n" in whole.out
    assert len((whole.run_dir / "sample.txt").read_bytes().decode()) == 16
    # a log file gets plain lines, with the measures where they were measured
    loss = f"train_loss {rows[10]['train_loss']:.4g}"
    assert f"\nstep 10/40, {loss}, val_loss {rows[10]['val_loss']:.4g}\n" in whole.out
    assert f"\nstep 11/40, train_loss {rows[11]['train_loss']:.4g}\n" in whole.out

@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_model_is_causal_and_muon_is_muon(optimizer):
    variables = train_here("--steps", 10, "--optimizer", optimizer, "--run-dir", "run").variables
    kinds = [type(part).__name__ for part in variables["optimizers"]]
    assert kinds == (["Muon", "AdamW"] if optimizer == "muon" else ["AdamW"])
    model = variables["model"]
    ids = torch.randint(256, (2, 32))
    changed = ids.clone()
    changed[:, 20] = (ids[:, 20] + 1) % 256
    with torch.no_grad():
        before, after = model(ids), model(changed)
    torch.testing.assert_close(before[:, :20], after[:, :20])
    assert not torch.allclose(before[:, 20:], after[:, 20:])

    # torch has a Muon, too, which multiplies in bfloat16
    options = dict(lr=0.1, weight_decay=0.1)
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in [(8, 8), (8, 32), (32, 8), (8, 8)]]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    mine = variables["Muon"](ours, dict(beta=0.8, **options))
    torchs = torch.optim.Muon(theirs, momentum=0.8, adjust_lr_fn="match_rms_adamw", **options)
    for _ in range(3):
        for p, q in zip(ours, theirs):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        mine.step()
        torchs.step()
    for p, q in zip(ours, theirs):
        torch.testing.assert_close(p, q, rtol=0, atol=0.02)

FIELDS = """
from dataclasses import dataclass
@dataclass
class Config(Config):
    clip: float | None = None
    width: int = 0  # computed
    def __post_init__(self):
        self.width = self.width or 4 * self.n_embd
"""

def test_fields_of_ones_own_computed_ones_and_a_config_that_is_edited_too_late():
    opened = f"\ncfg, run = {OPEN}\n"
    script = edited((opened, FIELDS + opened))
    flags = ["--n-embd", 48, "--run-dir", "run", *SHORT]
    train_here(*flags, script=script)
    record = read_json("run/config.json")
    assert (record["width"], record["clip"]) == (192, None)
    Path("run/result.json").unlink()
    assert "resumes at step 5" in train_here(*flags, script=script).out
    late = edited(("# imports, after the flags: --help is quick\n", "# imports\ncfg.n_layer = 2\n"))
    with pytest.raises(AttributeError, match=r"write Config\(n_layer=2\) in the config cell"):
        run_here("--run-dir", "late", script=late)

# The layers of a model in place of GPT, and what trains it.
SMALL = """class GPT(nn.Module):
    def __init__(self, cfg, C=32):
        super().__init__()
        LAYERS

    def forward(self, ids, targets=None):
        logits = self.head(self.hidden(self.symbols(ids).mT).mT)
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

"""
LAYERS = {
    "self.symbols = nn.Embedding(256, C);"
    "self.hidden = nn.Sequential(nn.Conv1d(C, C, 1), nn.GELU(), nn.Conv1d(C, C, 1));"
    "self.head = nn.Linear(C, 256)": ["AdamW"],
    "self.symbols = lambda ids: F.one_hot(ids, 256).float();"
    "self.hidden = nn.Identity();"
    "self.bias = nn.Parameter(torch.zeros(256));"
    "self.head = lambda x: 0 * x + self.bias": ["AdamW"],
    "self.symbols = lambda ids: F.one_hot(ids, 256).float().mT;"
    "self.hidden = nn.Sequential(nn.Linear(256, 256, bias=False));"
    "self.head = lambda x: x.mT": ["Muon"],
    "tied": ["Muon", "AdamW"],
}

@pytest.mark.parametrize("layers", LAYERS)
def test_the_optimizers_cell_trains_any_model(layers):
    text = (ROOT / "train.py").read_text()
    model = text[text.index("class GPT") : text.index("model = GPT(")]
    head = model[model.index("        self.head =") : model.index("        D = C")]
    change = (model, SMALL.replace("LAYERS", layers))
    if layers == "tied":
        change = (head, f"{head}        self.head.weight = self.embed.weight\n")
    done = train_here("--run-dir", "run", "--sample-tokens", 0, script=edited(change))
    assert metrics("run")[-1]["val_loss"] < 5.3
    optimizers = done.variables["optimizers"]
    assert [type(optimizer).__name__ for optimizer in optimizers] == LAYERS[layers]
    assert ("Muon takes 0 matrices" in done.out) == ("Muon" not in LAYERS[layers])
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    trained = sum(len(group["params"]) for group in groups)
    assert trained == len(list(done.variables["model"].parameters()))

def test_measures_of_any_kind_what_is_not_finite_and_control_characters():
    first = "val_loss=all_reduce(total)[None] / len(val_offsets)"
    others = "share=np.float32(0.5), one=torch.ones(1, 1), none=np.nan"
    script = edited((MEASURES, f"return dict({first}, {others})"))
    # nothing is learned, so that the sample is of any bytes
    flags = ["--run-dir", "run", "--lr", 1e-9, "--sample-tokens", 300, *SHORT]
    done = train_here(*flags, script=script)
    result = read_json("run/result.json")
    assert list(result)[:2] == ["val_loss", "share"]
    assert result["val_loss"] == pytest.approx(math.log(256), rel=1e-3)
    for row in (metrics("run")[-1], result):
        assert (row["share"], row["one"], row["none"]) == (0.5, 1, None)
    assert any(ord(c) < 9 for c in Path("run/sample.txt").read_bytes().decode())
    assert not any(ord(c) < 32 for c in done.out if c not in "\t\n")

    refused(run_here("--run-dir", "high", "--lr", 1e6), "not finite at step", "--lr")
    assert metrics("high")[-1]["train_loss"] is None
    assert not Path("high/checkpoint.pt").exists()
    script = edited((MEASURES, "return dict(val_loss=np.nan, one=1.0)"))
    refused(run_here("--run-dir", "nan", script=script), "not finite at step 0", "val_loss nan")
    assert metrics("nan")[-1]["val_loss"] is None
    assert not Path("nan/checkpoint.pt").exists() and not Path("nan/result.json").exists()

# interrupted, and the same line again

def test_kill_9_anywhere_and_a_checkpoint_that_is_half_written(whole):
    size = os.path.getsize(whole.run_dir / "checkpoint.pt")
    rows = random.randrange(6, 30)
    process = start("--run-dir", "run")
    wait_until(process, lambda: has_rows("run", rows))
    kill(process)
    before = Path("run/checkpoint.pt").read_bytes()

    # The disk is full, which leaves what a kill while it is written leaves, too.
    limits = (resource.RLIMIT_FSIZE, (size // 2, size // 2))
    full = train("--run-dir", "run", preexec_fn=lambda: resource.setrlimit(*limits))
    assert full.returncode > 0 and "File too large" in full.err
    assert os.path.getsize("run/checkpoint.pt.tmp") == size // 2
    assert Path("run/checkpoint.pt").read_bytes() == before
    train_here("--run-dir", "run")
    assert metrics("run") == metrics(whole.run_dir)
    assert Path("run/sample.txt").read_bytes() == (whole.run_dir / "sample.txt").read_bytes()

MINE = """
class Mine:
    values = dict(calls=0, scale=np.sqrt(16))
    def state_dict(self):
        return self.values
    def load_state_dict(self, values):
        self.values = values
mine = Mine()
ema = torch.optim.swa_utils.AveragedModel(
    model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
"""

def test_any_state_by_name_resumes_exactly_after_kill_9():
    measures = "calls=mine.values['calls'], scale=mine.values['scale'], random=torch.rand(1)"
    step = "        optimizer.step()\n"
    mine = "    ema.update_parameters(model); mine.values['calls'] += 1\n"
    begin = "            lr = group[\"lr\"]\n"
    script = edited(
        ("x + self.down(h)", "x + F.dropout(self.down(h), 0.3, self.training)"),
        # what an optimizer keeps in its groups
        (begin, f"{begin}            group['k'] = group.get('k', 0) + 1\n"),
        ("alpha=-lr * size", "alpha=-lr * size / group['k']"),
        # numpy's numbers
        ("scale=scale)", "scale=np.sqrt(scale))"),
        ("min(up, 1, down)", "np.cos(step / cfg.steps)"),
        ("# %%\n# loop\n", f"{MINE}\n# %%\n# loop\n"),
        ("total += model(*batch)", "total += ema(*batch)"),
        (MEASURES, f"{MEASURES[:-1]}, {measures})"),
        ("optimizers=optimizers)\n", "optimizers=optimizers, ema=ema, mine=mine)\n"),
        (step, step + mine),
    )
    train_here("--run-dir", "whole", script=script)
    rows = metrics("whole")
    assert (rows[-1]["calls"], rows[-1]["scale"]) == (40, 4)
    assert rows[-1]["val_loss"] < 5
    assert killed_and_resumed(script=script) == rows

def test_flags_that_may_change_between_two_sittings(whole):
    broken_here(12, "--run-dir", "run", "--device", "auto")
    flags = ["--eval-every", 20, "--log-every", 10, "--compile", "off"]
    assert "run resumes at step 10 of 40\n" in train_here("--run-dir", "run", *flags).out
    theirs = metrics(whole.run_dir)
    del theirs[10]["val_loss"], theirs[30]["val_loss"]  # every 20 steps
    assert metrics("run") == [*theirs[:10], *theirs[10::10]]

def test_edits_before_the_first_checkpoint_count_and_a_signal_at_the_end_is_none(whole):
    broken_here(3, "--run-dir", "run", script=edited(("betas=(0.8", "betas=(0.5")))
    log = "    run.log(row, all_reduce"
    last = edited((log, f"    run.signal = step == 39\n{log}"))
    train_here("--run-dir", "run", script=last)
    assert metrics("run") == metrics(whole.run_dir)
    assert read_json("run/result.json")["steps"] == 40

def test_another_experiment_is_refused_and_a_finished_run_stays_as_it_is(whole):
    mine = edited(script="mine.py")
    shutil.copytree(whole.run_dir, "unfinished")
    Path("unfinished/result.json").unlink()
    for folder in (whole.run_dir, Path("unfinished")):
        before = files(folder)
        other = run_here("--run-dir", folder, "--lr", 0.1, "--seed", 2, "--micro-batch-size", 4)
        refused(other, "another run: ", "lr is 0.015 there, 0.1 here", "seed is 1337 there, 2 here")
        refused(other, "micro_batch_size is 0 there, 4 here")
        other = run_here("--run-dir", folder, script=mine)
        refused(other, "script is 'train.py' there, 'mine.py' here")
        assert files(folder) == before
    # the same text but for a byte
    text = bytearray(Path("data.txt").read_bytes())
    text[len(text) // 2] ^= 1
    Path("data.txt").write_bytes(text)
    refused(run_here("--run-dir", "unfinished"), "data is [")
    assert files("unfinished") == before

    before = files(whole.run_dir)
    again = train_here("--run-dir", whole.run_dir)
    assert "is finished: val_loss: " in again.out and not again.variables
    assert files(whole.run_dir) == before
    # this process holds the lock of what it ran
    train_here("--run-dir", "run", *SHORT)
    Path("run/result.json").unlink()
    refused(train("--run-dir", "run", *SHORT), "run is in use by another process")
    Path("other").mkdir()
    Path("other/checkpoint.pt").write_text("precious")
    refused(run_here("--run-dir", "other"), "other is no run; name another --run-dir")
    assert list(files("other").values()) == [b"precious"]

def test_a_finished_run_opened_by_a_script_that_names_it(whole):
    run_dir = str(whole.run_dir)
    before = files(run_dir)
    there = metrics(run_dir)[-1]["val_loss"]
    named = (OPEN, f"open_run(Config.load({run_dir!r}))")
    opened = train_here(script=edited(named), tiny=[])
    assert f"val_loss: {there:.5g} here, {there:.5g} recorded" in opened.out
    assert "note" not in opened.out and "code" not in opened.out
    assert opened.variables["evaluate"]()["val_loss"] == there
    changed = train_here(script=edited(named, (MLP, "F.gelu(h)"), script="look.py"), tiny=[])
    here = float(changed.variables["evaluate"]()["val_loss"])
    assert abs(here - there) > 1e-3
    assert f"val_loss: {here:.5g} here, {there:.5g} recorded" in changed.out
    assert f"\nnote: other code, data or device; see {run_dir}/code\n" in changed.out
    assert files(run_dir) == before

def test_init_from_another_run(whole, monkeypatch):
    monkeypatch.setenv("HOME", str(whole.run_dir.parent))
    flags = ["--init-from=~/run", "--run-dir", "run", "--steps", 10]
    train_here(*flags)
    rows = metrics("run")
    assert rows[0]["val_loss"] == metrics(whole.run_dir)[-1]["val_loss"]
    # killed before its first checkpoint, it begins with those weights again
    Path("run/result.json").unlink()
    Path("run/checkpoint.pt").unlink()
    broken_here(7, *flags)
    with monkeypatch.context() as patch:
        patch.setenv("HOME", "/nowhere")  # after it they are not needed
        train_here(*flags)
    assert metrics("run") == rows
    with pytest.raises(AssertionError, match="--init-from has another --n-head"):
        run_here(flags[0], "--run-dir", "heads", "--n-head", 4)

# several processes

def test_two_processes_and_micro_batches_equal_one():
    flags = ["--dtype", "float32", "--batch-size", 7, "--run-dir"]
    train_here(*flags, "one")
    train_here(*flags, "micro", "--micro-batch-size", 2)
    process = trained(*flags, "two", "--micro-batch-size", 2, launcher=TWO_PROCESSES)
    assert process.out.count("\nval_loss:") == 1  # only one speaks
    for run_dir in ("micro", "two"):
        for mine, theirs in zip(metrics(run_dir), metrics("one"), strict=True):
            assert mine == pytest.approx(theirs, rel=1e-3)  # rounding, which training amplifies

def test_processes_that_see_other_checkpoints():
    broken_here(12, "--run-dir", "run")
    os.mkdir("elsewhere")
    shutil.copytree("run", "here/run")  # whose lock is free
    processes = []
    for rank, folder in enumerate(("here", "elsewhere")):
        shutil.copy("data.txt", folder)
        launch = dict(WORLD_SIZE="2", RANK=str(rank), MASTER_ADDR="localhost", MASTER_PORT="29617")
        processes.append(start("--run-dir", "run", cwd=folder, env=os.environ | launch))
    for process in processes:
        assert "steps differ: is the disk shared?" in process.communicate(timeout=100)[1]
        assert process.returncode == 1
    assert Path("here/run/checkpoint.pt").read_bytes() == Path("run/checkpoint.pt").read_bytes()
