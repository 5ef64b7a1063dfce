"""Config: every flag, its comment the --help. Run: the record."""
import fcntl
import gc
import io
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

if "OMP_WAIT_POLICY" not in os.environ:  # threads spin less
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")

import tyro
from tqdm import tqdm

@dataclass
class Record:
    """What Run reads: a base for any Config."""

    run_dir: str = ""  # empty: runs/<start time>
    wandb: str = os.environ.get("WANDB_MODE") or "offline"  # or online, disabled
    steps: int = 250
    log_every: int = 10  # steps between rows of metrics.jsonl
    eval_every: int = 50  # steps between evaluations and checkpoints

    def __post_init__(self):
        for name in ("lr", "steps", "log_every", "eval_every", "batch_size"):
            if not 0 < getattr(self, name, 1) < math.inf:
                raise ValueError(f"{name} must be positive")

    def __setattr__(self, name, value):
        if "opened" in vars(self):
            raise AttributeError(f"too late: write Config({name}={value!r}) in the config cell")
        super().__setattr__(name, value)

    @classmethod
    def load(cls, run_dir):
        """An earlier run's config."""
        return cls(**read_json(run_dir, "config.json") | {"run_dir": str(run_dir)})

@dataclass
class Config(Record):
    """Train a small GPT. The same line again resumes an unfinished --run-dir."""

    data: str = "stdlib"  # a text, ids (.npy, .bin), or stdlib: Python's source
    val_data: str = ""  # empty: the last tenth of --data
    eval_tokens: int = 32768  # of the validation data
    sample_tokens: int = 256
    vocab_size: int = 256  # 256: bytes; 50304: GPT-2's tokens
    seq_len: int = 128  # tokens in a window
    batch_size: int = 32  # sequences in a step, of all processes
    micro_batch_size: int = 0  # in a forward pass; 0: a process's share

    n_layer: int = 4  # transformer blocks
    n_head: int = 2
    n_embd: int = 128  # width of the residual stream
    init_from: str = ""  # run to take weights from

    optimizer: Literal["muon", "adamw"] = "muon"  # of the hidden matrices
    lr: float = 1.5e-2  # peak learning rate
    weight_decay: float = 0.1  # of the hidden matrices
    warmup: int = 0  # steps until lr's peak
    cooldown: float = 0.5  # final fraction of steps: lr falls to 0

    seed: int = 1337
    device: str = "auto"  # cpu, cuda, cuda:1, mps; auto: the best
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of the matrix products
    compile: Literal["auto", "on", "off"] = "auto"  # auto: long runs on CUDA

# Fields that make no other experiment.
ASIDE = {"run_dir", "wandb", "log_every", "eval_every", "sample_tokens", "device", "compile"}

own_source = Path(__file__).read_bytes()
made_by_cells = {"device", "fingerprint"}  # and resume's state

def open_run(defaults):
    """The flags over `defaults`, and the record of the run that they name: (cfg, run).

    A finished run ends a script, but opens in a notebook, or if the code names it: nothing is
    written. Refuses another experiment's run, and other files.
    """
    caller = sys._getframe(1)
    script = Path(caller.f_code.co_filename)
    cfg, cells = defaults, None
    # A script's code is of its globals' __file__, a notebook's cells are not.
    if script.name != Path(caller.f_globals.get("__file__") or "none").name:
        script = Path("notebook.py")
        cells = caller.f_globals.get("In", [""])
        for name in made_by_cells:
            caller.f_globals.pop(name, None)
    else:
        for stream in filter(None, (sys.stdout, sys.stderr)):
            stream.write = quiet(stream.write)
            stream.flush = quiet(stream.flush)
        kind = type(defaults)  # without default= __post_init__ sees the flags
        cfg = tyro.cli(kind) if defaults == kind() else tyro.cli(kind, default=defaults)
    opens = cells is not None or cfg.run_dir == defaults.run_dir != ""
    cfg.run_dir = cfg.run_dir or time.strftime(f"runs/%Y%m%d-%H%M%S-{os.getpid()}")
    vars(cfg)["opened"] = True
    run = Run(cfg, script, cells, opens)
    global torch
    gc.disable()
    import torch

    if cells is None:
        gc.freeze()  # quicker; later, triton would report leaks
    gc.enable()
    return cfg, run

def quiet(function):
    # The reader may be gone.
    def tried(*args):
        try:
            return function(*args)
        except (OSError, UnicodeError):
            pass
    return tried

class Run:
    """The record of a run. meta: for meta.json; new: nothing is saved yet."""

    def __init__(self, cfg, script, cells, opens):
        self.cfg = cfg
        self.dir = Path(cfg.run_dir).expanduser()
        self.world_size = int(os.environ.get("WORLD_SIZE", 1))
        self.rank = int(os.environ["RANK"]) if self.world_size > 1 else 0
        if self.rank > 0:
            sys.stdout = open(os.devnull, "w")
        self.code = {"config.py": own_source}
        self.notebook = cells is not None
        if self.notebook:
            self.cells, self.first = cells, len(cells) - 1
        else:
            self.code[script.name] = script.read_bytes()

        found = {path.name for path in self.dir.glob("*")}
        if found - {"log.txt"} and "lock" not in found:
            sys.exit(f"error: {self.dir} is no run; name another --run-dir")
        self.new = "checkpoint.pt" not in found
        self.result = read_json(self.dir, "result.json") if "result.json" in found else None
        opens = opens and self.result
        self.meta = dict(began=time.time())
        if not self.new:
            self.meta = read_json(self.dir, "meta.json")
            there = asdict(type(cfg)()) | read_json(self.dir, "config.json")
            if "notebook.py" not in (script.name, self.meta["script"]) and not opens:
                there["script"] = self.meta["script"]
            compare(self.dir, there, asdict(cfg) | dict(script=script.name))
        self.meta["script"] = script.name
        if self.result:
            name, value = next(iter(self.result.items()))
            print(f"{self.dir} is finished: {name}: {value:.5g}")
            if not opens:
                sys.exit()
        elif self.rank == 0:
            lock(self.dir)

    def resume(self, data, **state):
        """Loads what was saved, and begins the record: the step to go on from.

        data: to know it by. state: all that is saved, models first: what has a state_dict, or a
        list. Refuses other data, and optimizers of other models.
        """
        made_by_cells.update(state)
        self.parts, weights = {}, set()
        for name, value in state.items():
            for i, part in enumerate(value if isinstance(value, list) else [value]):
                self.parts[name if part is value else f"{name}.{i}"] = part
                if isinstance(part, torch.nn.Module):
                    weights.update(part.parameters())
                for group in getattr(part, "param_groups", []):
                    if not weights.issuperset(group["params"]):
                        sys.exit(f"error: {name} is of another model: run its cell again")

        saved = dict(step=0, seconds=0.0, rows="")
        path = self.dir / "checkpoint.pt"
        if path.exists():
            if not self.result:
                compare(self.dir, dict(data=self.meta["data"]), dict(data=data))
            checkpoint = torch.load(path, "cpu", weights_only=False)
            saved = checkpoint["run"]
            for name, part in self.parts.items():
                part.load_state_dict(checkpoint[name])
        self.step, self.seconds = saved["step"], saved["seconds"]
        self.signal = self.stop = 0
        self.measures = {}
        self.records = self.rank == 0 and not self.result
        self.tracks = self.records and self.cfg.wandb != "disabled"
        if self.step > 0:
            print(f"{self.dir} resumes at step {self.step} of {self.cfg.steps}")
        bar = self.records and (self.notebook or sys.stderr and sys.stderr.isatty())
        self.bar = tqdm(initial=self.step, total=self.cfg.steps, disable=not bar)
        if self.result:
            return self.step

        self.meta |= dict(
            data=data, start=self.step, command=shlex.join(["python", *sys.argv]),
            commit=commit(), python=sys.version, torch=torch.__version__,
        )
        self.write("config.json", asdict(self.cfg))
        self.write("meta.json", self.meta)
        self.write("metrics.jsonl", saved["rows"].encode())
        self._write_code()
        self._track(
            "init", id=str(self.meta["began"]), resume="allow", mode=self.cfg.wandb,
            project=os.environ.get("WANDB_PROJECT") or Path.cwd().name, name=self.dir.name,
            config=asdict(self.cfg), settings=dict(silent=True, console="off"),
        )
        # wandb may have died
        for row in map(json.loads, saved["rows"].splitlines()):
            self._track("log", row, step=row["step"])
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, lambda n, _: setattr(self, "signal", n))
        self.clock = time.perf_counter()
        return self.step

    def stopping(self):
        """Whether a signal came to a process: all save at this step, and end."""
        seen = torch.tensor([self.signal, self.step, -self.step])
        if self.world_size > 1:
            torch.distributed.all_reduce(seen, torch.distributed.ReduceOp.MAX)
        self.stop, most, least = seen.tolist()
        assert most == -least, "steps differ: is the disk shared?"
        return self.stop > 0

    def save(self, row, measures):
        """Writes the state before the row's step. The measures, numbers, go into the row; if the
        first is not finite, the run ends unsaved."""
        self.measures = {name: float(value) for name, value in measures.items()}
        assert not self.measures.keys() & {*row, "train_loss", "seconds"}
        row |= self.measures
        if not math.isfinite(next(iter(self.measures.values()))):
            self.log(row, math.nan)
        self.step = row["step"]
        if self.records and self.step > 0:
            checkpoint = {name: part.state_dict() for name, part in self.parts.items()}
            rows = (self.dir / "metrics.jsonl").read_text()
            checkpoint["run"] = dict(step=self.step, seconds=self.seconds, rows=rows)
            buffer = io.BytesIO()
            torch.save(checkpoint, buffer)
            self.write("checkpoint.pt", buffer.getvalue())
        if self.stop and self.step < self.cfg.steps:
            self.bar.close()
            self._end()
            print(f"saved at step {self.step}; again with --run-dir {self.dir} to go on")
            sys.exit(128 + self.stop if self.rank == 0 else 0)
        self.clock = time.perf_counter()

    def log(self, row, train_loss=None):
        """Writes and shows the row, in its turn or with measures; ends the run if the loss is not
        finite. Training is what passes from `save` or `log` to `log`."""
        if train_loss is not None:
            row["train_loss"] = float(train_loss)  # waits for the GPU
            self.seconds += time.perf_counter() - self.clock
            self.clock = time.perf_counter()
            self.bar.update()
        row["seconds"] = self.seconds
        step = row["step"]
        due = step % self.cfg.log_every == 0 or row.keys() & self.measures.keys()
        diverged = not math.isfinite(row.get("train_loss", 0))
        shown = row if self.bar.disable else self.measures | row
        names = [name for name in ("train_loss", *self.measures) if name in shown]
        text = ", ".join(f"{name} {shown[name]:.4g}" for name in names)
        if self.records and (due or diverged):
            with open(self.dir / "metrics.jsonl", "a") as f:
                f.write(json.dumps(finite(row), default=float) + "\n")
            self._track("log", row, step=step)
            self.bar.set_postfix_str(text)
            if self.bar.disable:
                print(f"step {step}/{self.cfg.steps}, {text}", flush=True)
        if step == self.cfg.steps:
            self.bar.close()
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if diverged:
            sys.exit(f"error: not finite at step {step}: {text}; try a lower --lr")

    def _end(self):
        if self.world_size > 1:
            torch.distributed.barrier()  # else the others abort
            torch.distributed.destroy_process_group()
        self._track("finish")

    def _track(self, function, *args, **options):
        try:
            if self.tracks:
                import wandb

                getattr(wandb, function)(*args, **options)
        except Exception as error:
            self.tracks = False
            print(f"note: wandb failed, training goes on: {error}")

    def write(self, name, content):
        """Puts bytes, or JSON, into a file of the run, always whole."""
        if not self.records:
            return
        if not isinstance(content, bytes):
            content = json.dumps(content, indent=2).encode()
        path = self.dir / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Path(f"{path}.tmp").write_bytes(content)
        os.replace(f"{path}.tmp", path)

    def _write_code(self):
        if self.notebook:
            cells = "\n\n# %%\n".join(self.cells[self.first :])
            self.code["notebook.py"] = cells.encode()
        for name, source in self.code.items():
            self.write(f"code/{self.meta['start']}/{name}", source)

    def finish(self, **facts):
        """Writes the last file, result.json: measures and facts. Refuses a run with steps to do;
        compares an opened one."""
        if self.result:
            name, there = next(iter(self.result.items()))
            here = self.measures[name]
            print(f"{name}: {here:.5g} here, {there:.5g} recorded")
            if not math.isclose(here, there, rel_tol=1e-4):
                print(f"note: other code, data or device; see {self.dir}/code")
            self._end()
            return
        if self.step < self.cfg.steps or not self.measures:
            sys.exit("error: steps are left: run the loop's cell")
        result = finite(self.measures) | dict(steps=self.step, train_seconds=self.seconds) | facts
        self._write_code()
        self.write("result.json", result)
        self._end()
        print("---")
        for name, value in result.items():
            print(f"{name}: {value:.5g}" if isinstance(value, float) else f"{name}: {value}")
        self.result = result
        self.records = False

def compare(run_dir, there, here):
    here = json.loads(json.dumps(here))
    differ = ""
    for name in sorted(there.keys() - ASIDE):
        if there[name] != here.get(name):
            differ += f"{name} is {there[name]!r} there, {here.get(name)!r} here; "
    if differ:
        sys.exit(f"error: {run_dir} is another run: {differ}name another --run-dir")

def lock(run_dir):
    run_dir.mkdir(parents=True, exist_ok=True)
    file = os.open(run_dir / "lock", os.O_RDWR | os.O_CREAT)
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        sys.exit(f"error: {run_dir} is in use by another process")
    except OSError:
        pass

def finite(values):
    return {name: value if math.isfinite(value) else None for name, value in values.items()}

def read_json(folder, name):
    return json.loads(Path(folder, name).expanduser().read_text())

def commit():
    git = f"git --no-optional-locks -C {shlex.quote(os.path.dirname(__file__))}"
    known = f"{git} ls-files --error-unmatch config.py > /dev/null"
    return subprocess.getoutput(f"{known} && {git} describe --always --dirty --abbrev=40")
