"""Every knob of the experiment in one flat dataclass, and the rule of the run directory.

A new flag is a new line in Config; its comment is its --help.
"""
import errno
import fcntl
import inspect
import json
import os
import re
import shlex
import subprocess
import sys
import time
import zlib
from dataclasses import dataclass, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Literal, get_args, get_origin

import tyro

# The variables of wandb are the defaults of its flags.
wandb_mode = os.environ.get("WANDB_MODE")
if wandb_mode not in ("online", "offline", "disabled"):
    wandb_mode = "offline"


@dataclass
class Config:
    """Train a small GPT. The same line again resumes an unfinished --run-dir."""

    # data
    data: str = "stdlib"  # a text, token ids (.npy, .bin), or stdlib: Python's source
    val_data: str = ""  # validation file; empty: the last tenth of --data
    vocab_size: int = 256  # token ids: 256 for bytes, 50304 for GPT-2's tokens
    seq_len: int = 128  # tokens in a training window
    batch_size: int = 32  # sequences per optimizer step, over all processes
    micro_batch_size: int = 0  # sequences per forward pass of a process; 0: its whole share

    # model
    n_layer: int = 4  # transformer blocks
    n_head: int = 2  # attention heads
    n_embd: int = 128  # width of the residual stream
    init_from: str = ""  # run directory whose weights a new run begins with

    # optimizer
    optimizer: Literal["muon", "adamw"] = "muon"  # of the matrices; the rest takes AdamW
    lr: float = 1.5e-2  # peak learning rate of Muon and AdamW, times the scale of a group
    weight_decay: float = 0.1  # decoupled, of the matrices
    warmup: int = 0  # steps in which lr rises to its peak
    cooldown: float = 0.5  # final fraction of the run, in which lr falls to 0

    # loop
    steps: int = 300  # optimizer steps
    log_every: int = 10  # steps between two lines of metrics.jsonl
    eval_every: int = 50  # steps between two evaluations, each with a checkpoint
    eval_tokens: int = 32768  # validation tokens in an evaluation, each time the same
    sample_tokens: int = 512  # length of the text written at the end

    # machine
    seed: int = 1337  # of weights, batches and sample
    device: str = "auto"  # cpu, cuda, cuda:1, mps; auto: the best available
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of the matrix products
    compile: Literal["auto", "on", "off"] = "auto"  # torch.compile; auto: on CUDA

    # record
    run_dir: str = ""  # where everything is written; empty: runs/<start time>
    wandb: Literal["online", "offline", "disabled"] = wandb_mode  # offline needs no account
    wandb_project: str = os.environ.get("WANDB_PROJECT") or "gpt"  # its name on wandb
    wandb_group: str = ""  # such as the name of a sweep

    def __post_init__(self):
        positive = [
            "vocab_size", "seq_len", "batch_size", "n_layer", "n_head", "n_embd",
            "lr", "steps", "log_every", "eval_every", "eval_tokens",
        ]  # fmt: skip
        for name in positive:
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be positive")
        for name in ["micro_batch_size", "weight_decay", "warmup", "sample_tokens", "seed"]:
            if not 0 <= getattr(self, name) < 2**63:
                raise ValueError(f"{name} must be 0 or more, and below 2**63")
        if not 0 <= self.cooldown <= 1:
            raise ValueError("cooldown must be between 0 and 1")
        if self.n_embd % (2 * self.n_head) != 0:
            raise ValueError("n_embd must be a multiple of twice n_head")
        if self.micro_batch_size and self.batch_size % self.micro_batch_size != 0:
            raise ValueError("micro_batch_size must divide batch_size")
        for field in fields(self):
            choices = get_args(field.type)
            if get_origin(field.type) is Literal and getattr(self, field.name) not in choices:
                raise ValueError(f"{field.name} must be one of {choices}")

    @classmethod
    def load(cls, run_dir):
        """The config of an earlier run; open_run(Config.load("runs/NAME")) opens that run."""
        path = Path(run_dir).expanduser() / "config.json"
        try:
            return cls(**read_json(path) | {"run_dir": str(run_dir)})
        except (ValueError, TypeError) as error:
            sys.exit(f"error: {path} is not a config of this code: {error}")


# Fields that do not make another experiment: a run resumes with other values of them.
ASIDE = [
    "run_dir", "wandb", "wandb_project", "wandb_group", "device", "compile", "micro_batch_size",
    "log_every", "eval_every", "sample_tokens",
]  # fmt: skip

own_source = Path(__file__).read_bytes()  # as it is imported
locks = {}  # lock files, open as long as the process


def open_run(defaults):
    """The flags over `defaults`, and what is in their run directory: (cfg, run).

    Nothing: a new run. An unfinished run: it resumes. A finished one: a script ends here, but a
    notebook, and a script whose code names the run, get its weights: nothing is trained or
    written. Anything else is an error, at once, before torch is imported.
    """
    if "__dataclass_fields__" not in vars(type(defaults)):
        sys.exit("error: write @dataclass above class Config(Config), or its fields are lost")
    for cls in type(defaults).__mro__[:-1]:
        typed = inspect.get_annotations(cls)
        for name, value in vars(cls).items():
            method = callable(value) or hasattr(value, "__get__")
            if not (method or name in typed or name.startswith("_")):
                kind = type(value).__name__
                sys.exit(f"error: a field of Config needs its type: {name}: {kind} = {value!r}")
    # A Jupyter kernel has its own command line; %run replaces it by the script's.
    notebook = sys.argv[0].endswith(("kernel_launcher.py", "ipykernel/__main__.py"))
    cfg = defaults
    if not notebook:
        cfg = tyro.cli(type(defaults), default=defaults)
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="replace")  # not every terminal knows UTF-8
    command = ["python", *sys.argv]
    if not cfg.run_dir:
        cfg.run_dir = time.strftime(f"runs/%Y%m%d-%H%M%S-{os.getpid()}")
        command += ["--run-dir", cfg.run_dir]
    for name, value in vars(cfg).items():
        try:
            json.dumps(value)
        except TypeError as error:
            sys.exit(f"error: config.json cannot hold the field {name} of Config: {error}")

    # The code as it is now, whatever is edited while torch is imported and the data is read.
    script = Path(getattr(sys.modules["__main__"], "__file__", "ipython"))
    if notebook:
        script = Path(os.environ.get("JPY_SESSION_NAME", "notebook.ipynb"))
    code = {}
    module = sys.modules[type(defaults).__module__]
    for path in [script, Path(getattr(module, "__file__", ""))]:
        if path.suffix == ".py" and path.exists():
            code[path.name] = path.read_bytes()
    code[Path(__file__).name] = own_source

    rank = int(os.environ.get("RANK") or 0)
    world_size = int(os.environ.get("WORLD_SIZE") or 1)
    launched = "RANK" in os.environ and "MASTER_ADDR" in os.environ
    if not 0 <= rank < world_size or (world_size > 1 and not launched):
        sys.exit("error: no launcher set RANK and WORLD_SIZE: unset them, or use torchrun")
    try:
        run_dir = Path(cfg.run_dir).expanduser()
        state = enter(run_dir, rank)
    except (OSError, RuntimeError) as error:
        sys.exit(f"error: cannot write to --run-dir {cfg.run_dir}: {error}")
    meta = dict(began=time.time())
    if state != "new" and (run_dir / "meta.json").exists():
        meta = read_json(run_dir / "meta.json")
    script_before = meta.get("script", script.name)
    # It was named in the code, not by a flag.
    opened = state == "finished" and (notebook or cfg.run_dir == defaults.run_dir)
    if state != "new":
        stems = {Path(script_before).stem, script.stem}
        stems.discard("notebook")  # of a notebook that does not know its name
        if len(stems) > 1 and not opened:
            sys.exit(f"error: {run_dir} is a run of {script_before}; name another --run-dir")
        compare(cfg, code, meta, run_dir, rank)
    if state == "finished" and rank == 0:
        result = read_json(run_dir / "result.json")
        name, value = next(iter(result.items()))
        print(f"{run_dir} is finished: {name}: {value:.5g}")
    if state == "finished" and not opened:
        sys.exit()

    if state != "finished":
        # The commit of the code's own folder, with -dirty behind it if files have changed.
        here = shlex.quote(str(Path(__file__).parent))
        git = f"git -C {here} describe --always --dirty --abbrev=40 --exclude='*' 2> /dev/null"
        meta |= dict(
            commit=subprocess.getoutput(git),
            command=shlex.join(command),
            script=script.name,
            python=sys.version.split()[0],
        )
    run = SimpleNamespace(dir=run_dir, state=state, notebook=notebook, code=code, meta=meta)
    # What the cells below make of this config. In a notebook what they made of an earlier one is
    # deleted, so that no run begins with another's model or data.
    run.made_by_cells = ["device", "fingerprint", "model", "optimizers"]
    run.before = b""  # the copy of an unfinished run's code, of which write_cells makes a new one
    if notebook:
        variables = vars(sys.modules["__main__"])
        for name in run.made_by_cells:
            variables.pop(name, None)
        # In is Jupyter's list of the cells that ran, this one the last of them.
        run.first_cell = len(variables["In"]) - 1
        copy = run_dir / f"{Path(script_before).stem}.py"
        if state == "unfinished" and copy.exists():
            run.before = copy.read_bytes()
    # The record cell sets it, so that one open_run serves one run.
    run.used = False
    # The loop sets it when all steps are done.
    run.trained = False
    return cfg, run


def split_cells(source):
    """The cells of a script, or of what a notebook ran, as a set of texts; without the config's,
    whose values are compared instead."""
    parts = re.split(r"(?m)^# %%.*$", source.decode("utf-8", "replace"))
    return {part.strip() for part in parts if "open_run(" not in part}


def enter(run_dir, rank):
    """What is there: a "new", "unfinished" or "finished" run. One that is not finished is locked
    against other processes until this one ends."""
    state = "new"
    found = os.listdir(run_dir) if run_dir.exists() else []
    strange = set(found) - {"lock", "log.txt", "config.json.tmp"}
    rows = run_dir / "metrics.jsonl"
    if "checkpoint.pt" in found or (rows.exists() and rows.stat().st_size > 0):
        state = "unfinished"
    if "result.json" in found:
        state = "finished"
    # A run that was never trained may be begun anew; its lock tells it from other folders.
    ours = "config.json" in found and (state != "new" or "lock" in found)
    if strange and not ours:
        sys.exit(f"error: {run_dir} holds {min(strange)}, no run; name another --run-dir")
    if state == "finished" or rank > 0:
        return state

    run_dir.mkdir(parents=True, exist_ok=True)
    if run_dir not in locks:
        locks[run_dir] = open(run_dir / "lock", "a")
    try:
        fcntl.lockf(locks[run_dir], fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            sys.exit(f"error: {run_dir} is in use by another process")
        print(f"note: this disk has no locks ({error}); start no second process in {run_dir}")
    return state


def compare(cfg, code, meta, run_dir, rank):
    """An error if the run there is another experiment. If its code was other code: a note, and
    its checksum in `meta`, since the copy of that code is written over."""
    before = vars(type(cfg).load(run_dir))
    differ = ""
    for name, value in vars(cfg).items():
        # JSON gives a tuple back as a list.
        same = value == before[name] or json.dumps(value) == json.dumps(before[name])
        if not same and name not in ASIDE:
            differ += f"{name} is {before[name]!r} there, {value!r} here; "
    if differ:
        sys.exit(f"error: {run_dir} is another run: {differ}name another --run-dir")
    for name, content in code.items():
        copy = run_dir / name
        if rank > 0 or not copy.exists():
            continue
        old = copy.read_bytes()
        same = old == content
        if str(meta.get("script")).endswith(".ipynb") and name != Path(__file__).name:
            # The copy of a notebook has the cells that ran, as yet perhaps not all.
            same = split_cells(old) <= split_cells(content)
        if not same:
            print(f"note: the code has changed since this run, see {copy}")
            meta.setdefault("edited", []).append(f"{name} {zlib.crc32(old):x}")


def read_json(path):
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        sys.exit(f"error: cannot read {path}: {error}")
