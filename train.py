# %% [markdown]
# # One experiment: a small GPT
# Config, run directory, data, model, optimizers, loop, sample: read it from top to bottom. `train.py` and `train.ipynb` hold
# the same cells. Shapes: B sequences, T tokens, C channels, H heads, D = C / H channels of a head, V token ids.

# %%
# config: flags in the script; in the notebook edit this line instead, as in Config(lr=3e-3, steps=200)
from config import Config, parse

cfg = parse(Config())

# %%
# run directory: start it, go on with it, or leave it alone. Torch is imported later, so that a mistake costs no time
import fcntl, json, os, shlex, shutil, signal, subprocess, sys, time
from dataclasses import asdict
from pathlib import Path

rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # torchrun sets them
notebook = "ipykernel" in sys.modules

def fail(message):
    """End with one line on what is wrong and what to do, and exit code 1."""
    sys.exit(f"train.py: {message}" if rank == 0 else 1)

def write(name, data):
    """Write bytes to a file of the run directory: beside it, then renamed over, so that a kill leaves the old one."""
    beside = run_dir / f"{name}.tmp"
    try:
        with open(beside, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(beside, run_dir / name)
    except OSError as error:
        beside.unlink(missing_ok=True)
        fail(f"cannot write {run_dir / name}: {error.strerror}. What was there before is whole; make room, run the same line again")

milliseconds = time.time_ns() // 10**6 % 1000  # so that two runs started together do not meet
cfg.run_dir = cfg.run_dir or time.strftime("runs/%Y%m%d-%H%M%S-") + f"{milliseconds:03d}"
run_dir = Path(cfg.run_dir)
resumed = (run_dir / "config.json").exists()
if resumed:
    try:
        saved = Config(**json.loads((run_dir / "config.json").read_text()))
    except (OSError, ValueError, TypeError) as error:
        fail(f"{run_dir}/config.json is not the config of a run ({error}); name another --run-dir")
    for name in ("device", "dtype", "compile"):  # auto means: as the run began
        if getattr(cfg, name) == "auto":
            setattr(cfg, name, getattr(saved, name))
    old, new = asdict(saved), asdict(cfg)
    differ = [f"{k} is {old[k]!r} there, {new[k]!r} here" for k in new if old[k] != new[k] and k != "run_dir"]
    if differ:
        fail(f"{run_dir} holds a run of another config ({'; '.join(differ)}); name another --run-dir")
    if (run_dir / "sample.txt").exists():  # a run's last file
        last = json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])
        sys.exit(print(f"{run_dir} is finished: val_loss {last['val_loss']:.4f} after {last['step']} steps") if rank == 0 else 0)

if rank == 0:
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        metrics_file = open(run_dir / "metrics.jsonl", "a+b")
        fcntl.lockf(metrics_file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # gone with the process, however it ends
    except BlockingIOError:
        fail(f"{run_dir} is in use by another process; wait for it, or name another --run-dir")
    except OSError as error:
        fail(f"cannot write {run_dir}: {error.strerror}; name another --run-dir")

stop_signal = 0

def on_signal(number, frame):  # Ctrl-C, kill, a cluster's warning: the loop finishes its step, saves and stops
    global stop_signal
    stop_signal = number

handlers = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}

# %%
# device and processes
import io, math

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

if cfg.device == "auto":
    cfg.device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
try:
    local = world_size > 1 and cfg.device == "cuda"
    device = torch.device(f"cuda:{os.environ['LOCAL_RANK']}" if local else cfg.device)
    torch.empty(1, device=device)
except (RuntimeError, AssertionError) as error:
    fail(f"--device {cfg.device} is not here ({str(error).splitlines()[0]}); try --device auto")
if device.type == "cuda":
    torch.cuda.set_device(device)
    torch.set_float32_matmul_precision("high")  # TF32 for what autocast leaves in float32
if cfg.dtype == "auto":
    cfg.dtype = "bfloat16" if device.type == "cuda" else "float32"
if cfg.compile == "auto":
    cfg.compile = "on" if device.type == "cuda" else "off"
if cfg.compile == "on" and not shutil.which(os.environ.get("CXX", "g++")):
    fail("--compile on needs a C++ compiler, and there is no g++ here: install it, or take --compile off")
autocast = torch.autocast(device.type, getattr(torch, cfg.dtype), enabled=cfg.dtype != "float32")
torch.manual_seed(cfg.seed)

micro_batch_size = cfg.micro_batch_size or max(cfg.batch_size // world_size, 1)
micro_steps = cfg.batch_size // (micro_batch_size * world_size)
if cfg.batch_size != micro_batch_size * micro_steps * world_size:
    fail(f"--batch-size {cfg.batch_size} cannot be shared by {world_size} processes in micro-batches of {micro_batch_size}")
if world_size > 1:
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")

# %%
# data: one long row of token ids, memory-mapped
def open_tokens(name):
    """The token ids of a file, (N,) of uint8 or uint16."""
    if name == "stdlib":  # the source of Python's standard library, without its tests and tables
        lib, skip = Path(os.__file__).parent, {"site-packages", "dist-packages", "test", "tests", "encodings", "pydoc_data"}
        files = sorted(f for f in lib.rglob("*.py") if not skip & set(f.relative_to(lib).parts))
        np.random.default_rng(0).shuffle(files)  # so that the last tenth is like the rest
        return np.frombuffer(b"".join(f.read_bytes() for f in files), np.uint8)
    try:
        return np.memmap(name, np.uint16 if name.endswith(".bin") else np.uint8, mode="r")
    except OSError as error:
        fail(f"cannot read {name}: {error.strerror}; --data takes a file")
    except ValueError:
        fail(f"{name} is empty, or a .bin of odd length: a uint16 token id takes two bytes")

train_data = open_tokens(cfg.data)
if cfg.val_data:
    val_data = open_tokens(cfg.val_data)
else:
    train_data, val_data = np.split(train_data, [len(train_data) * 9 // 10])
if min(len(train_data), len(val_data)) <= cfg.seq_len:
    fail(f"{cfg.data} has {len(train_data)} tokens to train on and {len(val_data)} to validate: "
         f"too few for a window of --seq-len {cfg.seq_len}")

def windows(tokens, starts):
    """Inputs and targets, both (B, T), of the windows that begin at `starts` (B,)."""
    ids = tokens[starts[:, None] + np.arange(cfg.seq_len + 1)]  # (B, T + 1)
    if ids.max() >= cfg.vocab_size:
        fail(f"{cfg.data} has the token id {ids.max()}, beyond --vocab-size {cfg.vocab_size}")
    ids = torch.from_numpy(ids.astype(np.int64))
    if device.type == "cuda":  # the copy goes on while the CPU does other things
        ids = ids.pin_memory()
    ids = ids.to(device, non_blocking=True)
    return ids[:, :-1], ids[:, 1:]

def batch_starts(step):
    """Where this process's windows of a step begin: a function of (seed, step) alone, so a resumed run sees the same."""
    starts = np.random.default_rng((cfg.seed, step)).integers(len(train_data) - cfg.seq_len, size=cfg.batch_size)
    return starts.reshape(world_size, micro_steps, micro_batch_size)[rank]

# validation: the same windows every time, evenly spread
n_val = min(max(cfg.eval_tokens // cfg.seq_len, 1), (len(val_data) - 1) // cfg.seq_len)
val_starts = np.linspace(0, len(val_data) - 1 - cfg.seq_len, n_val).astype(np.int64)

# %%
# model
def norm(x):
    return F.rms_norm(x, (x.size(-1),))  # RMSNorm (Zhang & Sennrich, 2019); no weights: the matrix after it can scale

def rotary(x, cos, sin):  # rotary positions (Su et al., 2021): turn pairs of channels by angles that grow with T
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1)

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(cfg.n_embd, 3 * cfg.n_embd, bias=False)
        self.attn_out = nn.Linear(cfg.n_embd, cfg.n_embd, bias=False)
        self.up = nn.Linear(cfg.n_embd, 4 * cfg.n_embd, bias=False)
        self.down = nn.Linear(4 * cfg.n_embd, cfg.n_embd, bias=False)
        nn.init.zeros_(self.attn_out.weight)  # a block begins as the identity
        nn.init.zeros_(self.down.weight)

    def forward(self, x, cos, sin):
        B, T, C = x.shape
        H, D = cfg.n_head, C // cfg.n_head
        qk, v = self.qkv(norm(x)).view(B, T, 3 * H, D).split((2 * H, H), dim=2)
        q, k = rotary(norm(qk), cos, sin).chunk(2, dim=2)  # QK-norm (Henry et al., 2020): allows a high lr
        y = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True)
        assert y.shape == (B, H, T, D)
        x = x + self.attn_out(y.transpose(1, 2).reshape(B, T, C))
        h = F.relu(self.up(norm(x)))  # (B, T, 4C)
        return x + self.down(h * h)  # squared ReLU (So et al., 2021)

class GPT(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(cfg.vocab_size, cfg.n_embd)
        self.blocks = nn.ModuleList(Block() for _ in range(cfg.n_layer))
        self.smear = nn.Parameter(torch.zeros(cfg.n_embd))
        self.head = nn.Linear(cfg.n_embd, cfg.vocab_size, bias=False)
        nn.init.zeros_(self.head.weight)  # the first loss is ln(V)
        D = cfg.n_embd // cfg.n_head
        angle = torch.outer(torch.arange(cfg.seq_len), 10000.0 ** -(torch.arange(0, D, 2) / D))[:, None]  # (T, 1, D / 2)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def forward(self, ids, targets=None):
        """Logits (B, T, V) of the next token; with targets (B, T) their mean cross-entropy in nats instead."""
        B, T = ids.shape
        x = self.embed(ids)  # (B, T, C)
        x = norm(x + self.smear * F.pad(x[:, :-1], (0, 0, 1, 0)))  # a learned share of the token before (smear, modded-nanogpt)
        for block in self.blocks:
            x = block(x, self.cos[:T], self.sin[:T])
        logits = self.head(norm(x)).float()  # (B, T, V)
        return logits if targets is None else F.cross_entropy(logits.view(B * T, -1), targets.reshape(B * T))

model = GPT().to(device)
train_model = torch.compile(model, dynamic=False) if cfg.compile == "on" else model  # what the loop calls
if world_size > 1:
    train_model = nn.parallel.DistributedDataParallel(train_model)

# %%
# optimizers and learning rate
matrices = list(model.blocks.parameters())
others = [model.embed.weight, model.head.weight, model.smear]
adamw = dict(lr=cfg.lr, betas=(0.9, 0.95), fused=True)
if cfg.optimizer == "muon":  # Muon (Jordan et al., 2024), its updates as large as AdamW's so that one lr serves both
    optimizers = [
        torch.optim.Muon(matrices, cfg.lr, cfg.weight_decay, momentum=0.9, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, weight_decay=0.0, **adamw),
    ]
else:
    decay = [dict(params=matrices, weight_decay=cfg.weight_decay), dict(params=others, weight_decay=0.0)]
    optimizers = [torch.optim.AdamW(decay, **adamw)]

def lr_at(step):
    """Warmup, stable, decay (Hu et al., 2024): up in `warmup` steps, level, and straight down to 0."""
    return cfg.lr * min((step + 1) / (cfg.warmup + 1), 1, (cfg.steps - step) / max(cfg.cooldown * cfg.steps, 1))

# %%
# checkpoint: all that the next step depends on
start, seconds = 0, 0.0  # updates done; seconds of training
if resumed and (run_dir / "checkpoint.pt").exists():
    try:
        checkpoint = torch.load(run_dir / "checkpoint.pt", map_location=device, weights_only=True)
        model.load_state_dict(checkpoint["model"])
        for optimizer, state in zip(optimizers, checkpoint["optimizers"]):
            optimizer.load_state_dict(state)
        start, seconds = checkpoint["step"], checkpoint["seconds"]
    except Exception as error:  # torch has a dozen kinds for a file that is cut short or something else
        fail(f"{run_dir}/checkpoint.pt is damaged or of another model ({str(error).splitlines()[0][:80]}); "
             "delete it, and the same line starts this run from step 0")

def save(step):
    state = dict(model=model.state_dict(), optimizers=[o.state_dict() for o in optimizers], step=step, seconds=seconds)
    torch.save(state, buffer := io.BytesIO())  # in memory first: a full disk is then a plain OSError
    write("checkpoint.pt", buffer.getbuffer())

# %%
# tracking: metrics.jsonl and wandb get the same rows
tracker = None
if rank == 0:
    metrics_file.seek(0)  # drop the rows after the checkpoint: they are about to come again
    rows = [row for row in metrics_file if row.endswith(b"\n")]
    metrics_file.truncate(sum(len(row) for row in rows if json.loads(row)["step"] < start))
    write("config.json", json.dumps(asdict(cfg), indent=2).encode())
    write("train.py", ("\n\n".join(In) if notebook else Path(__file__).read_text()).encode())  # In: the cells as run
    write("config.py", Path(sys.modules["config"].__file__).read_bytes())
    if not (run_dir / "meta.json").exists():
        git = subprocess.run("git describe --always --dirty --abbrev=40", shell=True, capture_output=True, text=True)
        meta = dict(commit=git.stdout.strip(), command=shlex.join(sys.argv), torch=torch.__version__, wandb_id=os.urandom(4).hex())
        write("meta.json", json.dumps(meta, indent=2).encode())
    if cfg.wandb != "disabled":
        import wandb
        try:
            tracker = wandb.init(
                mode=cfg.wandb, project=cfg.wandb_project, group=cfg.wandb_group or None, name=run_dir.name, config=asdict(cfg),
                id=json.loads((run_dir / "meta.json").read_text())["wandb_id"], resume="allow" if cfg.wandb == "online" else None,
                settings=wandb.Settings(silent=True, console="off"),
            )
        except Exception as error:
            fail(f"wandb does not start ({str(error).splitlines()[0]}); --wandb offline needs no account and no network")

def track(row):
    """Add a row to metrics.jsonl and to wandb. If wandb fails in mid-run, training goes on without it."""
    global tracker
    try:
        metrics_file.write(json.dumps(row).encode() + b"\n")
        metrics_file.flush()
    except OSError as error:
        fail(f"cannot write {run_dir}/metrics.jsonl: {error.strerror}; make room, run the same line again")
    try:
        if tracker:
            tracker.log(row, step=row["step"])
    except Exception as error:
        tqdm.write(f"wandb failed, training goes on without it: {error}")
        tracker = None

# %%
# loop
@torch.no_grad()
def evaluate():
    """Mean cross-entropy of the validation windows in nats a token, the work shared among the processes."""
    total, mine = torch.zeros((), device=device), val_starts[rank::world_size]
    for i in range(0, len(mine), micro_batch_size):
        x, y = windows(val_data, mine[i : i + micro_batch_size])
        with autocast:
            total += model(x, y) * len(x)
    if world_size > 1:
        dist.all_reduce(total)
    return total.item() / len(val_starts)

bar = tqdm(total=cfg.steps, initial=start, disable=rank > 0 or not (notebook or sys.stderr.isatty()),
           bar_format="{n}/{total} |{bar:20}| {elapsed}<{remaining}{postfix}")
tokens_per_step, logged, val_loss = cfg.batch_size * cfg.seq_len, start, math.nan
clock = printed = time.perf_counter()
for step in range(start, cfg.steps + 1):
    # loss and gradient of batch `step`, at the weights after `step` updates
    starts, train_loss = batch_starts(step), 0.0
    for i in range(micro_steps):
        x, y = windows(train_data, starts[i])
        if world_size > 1:
            train_model.require_backward_grad_sync = i == micro_steps - 1  # gradients are exchanged once a step
        with autocast:
            loss = train_model(x, y) / micro_steps
        loss.backward()
        train_loss += loss.detach()

    # log, evaluate, save: at the same weights, so that a checkpoint's loss has been seen to be finite
    stopping, done = stop_signal, step == cfg.steps
    if world_size > 1:  # a signal finds the processes at different steps: they stop together
        dist.all_reduce(flag := torch.tensor(stopping), dist.ReduceOp.MAX)
        stopping = flag.item()
    evaluating = step % cfg.eval_every == 0 or done
    saving = step % cfg.save_every == 0 and step > start or done or stopping
    if step % cfg.log_every == 0 or evaluating or saving:
        if world_size > 1:
            dist.all_reduce(train_loss)
        row = dict(step=step, tokens=step * tokens_per_step, train_loss=train_loss.item() / world_size, lr=lr_at(step))
        elapsed = time.perf_counter() - clock  # after .item(), which waits for the device
        seconds += elapsed
        row["seconds"] = seconds
        if math.isfinite(row["train_loss"]) and evaluating:
            val_loss = row["val_loss"] = evaluate()
        diverged = not math.isfinite(row["train_loss"])
        if rank == 0:
            track(row | dict(train_loss=None) if diverged else row)  # JSON has no NaN
        if diverged:
            fail(f"the loss is not finite at step {step}: try an --lr below {cfg.lr:g}. {run_dir} keeps its last checkpoint")
        if saving and rank == 0:
            save(step)
        speed = (step - logged) * tokens_per_step / elapsed
        line = f"loss {row['train_loss']:.3f}, val {val_loss:.3f}, {speed / 1000:.1f}k tokens/s"
        bar.set_postfix_str(line, refresh=False)
        if rank == 0 and bar.disable and (evaluating or clock - printed > 10):  # a log file
            left = tqdm.format_interval((cfg.steps - step) * tokens_per_step / speed) if speed else "?"
            print(f"step {step}/{cfg.steps}, {line}, {left} left", flush=True)
            printed = clock
        clock, logged = time.perf_counter(), step
    if done or stopping:
        break

    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step)
        optimizer.step()
        optimizer.zero_grad()
    bar.update()

bar.close()
if world_size > 1:  # together: a process that leaves early makes the others abort
    dist.barrier()
    dist.destroy_process_group()
for number, handler in handlers.items():
    signal.signal(number, handler)
if not done:
    if rank == 0:
        again = shlex.join(["python", *sys.argv, *([] if "--run-dir" in " ".join(sys.argv) else ["--run-dir", cfg.run_dir])])
        print(f"stopped by {signal.Signals(stopping).name} and saved after {step} of {cfg.steps} steps. To go on: {again}")
    if tracker:
        tracker.finish(exit_code=1)
    sys.exit(128 + stopping)

# %%
# sample: what the model writes, and the result
if rank == 0:
    generator = torch.Generator(device).manual_seed(cfg.seed)
    is_text = not cfg.data.endswith(".bin")
    ids = torch.tensor([[ord("\n") if is_text else int(val_data[0])]], device=device)  # (1, T)
    for _ in range(cfg.sample_tokens):
        with torch.no_grad(), autocast:
            logits = model(ids[:, -cfg.seq_len :])[0, -1]  # (V,)
        next_id = torch.multinomial(F.softmax(logits / 0.8, dim=-1), 1, generator=generator)  # temperature 0.8
        ids = torch.cat((ids, next_id[None]), dim=1)
    ids = ids[0, 1:].tolist()
    sample = bytes(ids).decode(errors="replace") if is_text else " ".join(map(str, ids))
    write("sample.txt", sample.encode())
    if tracker:
        tracker.summary["sample"] = sample
        tracker.finish()
    result = dict(
        val_loss=f"{val_loss:.4f}", steps=cfg.steps, tokens=cfg.steps * tokens_per_step, train_seconds=f"{seconds:.1f}",
        tokens_per_second=f"{cfg.steps * tokens_per_step / seconds:.0f}",
        parameters=sum(p.numel() for p in model.parameters()), run_dir=run_dir,
    )
    print(f"\n{sample}\n\n---", *(f"{name}: {value}" for name, value in result.items()), sep="\n")
    print("next: `wandb leet` shows the curves in the terminal, `wandb sync` uploads them")

# %%
# the loss curve, in the notebook
if notebook:
    import matplotlib.pyplot as plt
    rows = [json.loads(row) for row in open(run_dir / "metrics.jsonl")]
    plt.plot([r["step"] for r in rows], [r["train_loss"] for r in rows], color="0.7", label="training batch")
    plt.plot(*zip(*[(r["step"], r["val_loss"]) for r in rows if "val_loss" in r]), "o-", label="validation")
    plt.xlabel("step"), plt.ylabel("loss (nats per token)"), plt.legend(), plt.show()
