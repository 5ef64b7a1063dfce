# %% [markdown]
# # One experiment: a small GPT
# `train.py` and `train.ipynb` hold the same cells. Shapes: B sequences, T tokens, C channels, H heads of D = C / H, V token ids.

# %%
# config: flags in the script; in the notebook edit this line instead, as in Config(lr=3e-3, steps=200)
from config import Config, parse
cfg = parse(Config())

# %%
# run directory: start it, resume it, or leave it alone. Torch is imported later, so that a mistake costs no time
import atexit, contextlib, fcntl, io, json, math, os, shlex, shutil, signal, subprocess, sys, time
from pathlib import Path
rank, local_rank, world_size = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))
notebook = "ipykernel" in sys.modules

def fail(message):  # one line on what is wrong and what to do, exit code 1
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # where all processes fail alike, torchrun ends the others
    time.sleep(5 if local_rank else 0)  # before they repeat it
    sys.exit(f"error: {message}")

@contextlib.contextmanager
def or_fail(message, *kinds):  # turns errors of these kinds in its block into `fail`
    try:
        yield
    except kinds as error:
        fail(f"{message}: {(str(error).strip() or repr(error)).splitlines()[0]}")

cfg.run_dir = cfg.run_dir or time.strftime(f"runs/%Y%m%d-%H%M%S-{os.getpid()}")
run_dir = Path(cfg.run_dir)
resumed = (run_dir / "config.json").exists()
if resumed:
    with or_fail(f"{run_dir}/config.json is not a run's config; name another --run-dir", ValueError, TypeError):
        old, new = vars(Config(**json.loads((run_dir / "config.json").read_text()))), vars(cfg)
    differ = [f"{k} is {old[k]!r} there, {v!r} here" for k, v in new.items() if v not in (old[k], "auto") and k != "run_dir"]
    if differ:  # but for auto, which means: as the run began
        fail(f"{run_dir} holds a run of another config ({', '.join(differ)}); name another --run-dir")
    cfg = Config(**old | {"run_dir": cfg.run_dir})
    if rank == 0 and not notebook and (run_dir / "train.py").read_bytes() != Path(__file__).read_bytes():
        print(f"note: the code has changed since this run, see {run_dir}/train.py")
    if (run_dir / "sample.txt").exists():  # a run's last file
        last = json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])
        if rank == 0:
            print(f"{run_dir} is finished: val_loss {last['val_loss']:.4f} after {last['step']} steps")
        sys.exit()

if rank == 0:
    with or_fail(f"{run_dir} is in use by another process, or cannot be written; name another --run-dir", OSError):
        run_dir.mkdir(parents=True, exist_ok=True)
        metrics_file = open(run_dir / "metrics.jsonl", "a+b", buffering=0)
        fcntl.lockf(metrics_file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the lock goes with the process, however it ends

def write(name, data):  # bytes to a file of the run directory: beside it, then renamed over, so there is always a whole one
    with or_fail(f"cannot write {run_dir / name}; make room, and the same line goes on from the last checkpoint", OSError):
        with open(run_dir / f"{name}.tmp", "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(f.name, run_dir / name)

# %%
# device and processes
import numpy as np
import torch
import torch.nn.functional as F
from torch import distributed as dist, nn
from tqdm import tqdm
mps = torch.mps.is_available() and world_size == 1  # it has no backend for several processes
cfg.device = cfg.device.replace("auto", "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu")
with or_fail(f"--device {cfg.device} is not here: try --device auto, or resume the run where it began", RuntimeError, AssertionError):
    device = torch.empty(1, device=f"cuda:{local_rank}" if cfg.device == "cuda" else cfg.device).device
cuda = device.type == "cuda"
if cuda:
    torch.cuda.set_device(device)
    torch.set_float32_matmul_precision("high")  # TF32, for --dtype float32
bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False) if cuda else torch.cpu._is_amx_tile_supported()
cfg.dtype = cfg.dtype.replace("auto", "bfloat16" if bfloat16 else "float32")
dtype = getattr(torch, cfg.dtype)
compiler = shutil.which(os.environ.get("CXX", "g++").split()[0])
cfg.compile = cfg.compile.replace("auto", "on" if cuda and compiler else "off")
if cfg.compile == "on" and not compiler:
    fail("--compile on needs a C++ compiler, and there is no g++ here: install it, or use --compile off")
torch.manual_seed(cfg.seed)
micro_batch_size = cfg.micro_batch_size or max(cfg.batch_size // world_size, 1)
micro_steps = cfg.batch_size // (micro_batch_size * world_size)
if cfg.batch_size != micro_batch_size * micro_steps * world_size:
    fail(f"--batch-size {cfg.batch_size} cannot be shared by {world_size} processes in micro-batches of {micro_batch_size}")
if world_size > 1:
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")

# %%
# data: one long row of token ids, memory-mapped
def open_tokens(name):  # the token ids of a file, (N,) of uint8 or uint16
    if name == "stdlib":  # the source of Python's standard library, without its tests and tables
        lib, skip = Path(os.__file__).parent, {"site-packages", "dist-packages", "test", "tests", "encodings", "pydoc_data"}
        files = sorted(f for top in lib.iterdir() if top.name not in skip for f in [top, *top.rglob("*.py")]
                       if f.suffix == ".py" and not skip & {*f.relative_to(lib).parts})
        np.random.default_rng(0).shuffle(files)  # so that the last tenth is like the rest
        return np.frombuffer(b"".join(f.read_bytes() for f in files), np.uint8)
    with or_fail(f"cannot read {name} (a .bin holds uint16 token ids, any other file bytes)", OSError, ValueError):
        return np.memmap(name, np.uint16 if name.endswith(".bin") else np.uint8, mode="r")

data = open_tokens(cfg.data)
train_data, val_data = (data, open_tokens(cfg.val_data)) if cfg.val_data else np.split(data, [len(data) * 9 // 10])
if min(len(train_data), len(val_data)) <= cfg.seq_len:
    fail(f"{len(train_data)} training and {len(val_data)} validation tokens are too few: --seq-len {cfg.seq_len} needs more of each")

def windows(tokens, starts):  # inputs and targets, both (B, T), of the windows that begin at `starts` (B,)
    ids = torch.from_numpy(tokens[starts[:, None] + np.arange(cfg.seq_len + 1)].astype(np.int64))  # (B, T + 1)
    if ids.max() >= cfg.vocab_size:
        fail(f"the data has the token id {ids.max()}, beyond --vocab-size {cfg.vocab_size}")
    ids = (ids.pin_memory() if cuda else ids).to(device, non_blocking=cuda)  # a copy from pinned memory does not block
    return ids[:, :-1], ids[:, 1:]

def batch_starts(step):  # a pure function of (seed, step), so that a resumed run sees the same windows
    starts = np.random.default_rng((cfg.seed, step)).integers(len(train_data) - cfg.seq_len, size=cfg.batch_size)
    return starts.reshape(world_size, micro_steps, micro_batch_size)[rank]

n_val = min(max(cfg.eval_tokens // cfg.seq_len, 1), (len(val_data) - 1) // cfg.seq_len)  # always the same windows
val_starts = np.linspace(0, len(val_data) - 1 - cfg.seq_len, n_val).astype(np.int64)

# %%
# model
def norm(x):
    return F.layer_norm(x, x.shape[-1:])  # no weights: the next matrix can learn the scale. As good as RMSNorm, and one kernel on the CPU

D = cfg.n_embd // cfg.n_head
angle = torch.outer(torch.arange(cfg.seq_len), 10000.0 ** -(torch.arange(0, D, 2) / D))[:, None]  # (T, 1, D / 2)
cos, sin = angle.cos().to(device), angle.sin().to(device)

def rotary(x):  # rotary positions (Su et al., 2021): turn pairs of channels by angles that grow with the position
    (a, b), T = x.chunk(2, dim=-1), x.size(1)
    return torch.cat((a * cos[:T] + b * sin[:T], b * cos[:T] - a * sin[:T]), dim=-1)

class Linear(nn.Linear):  # float32 weights for the optimizer, the product in `dtype`
    def forward(self, x):
        return F.linear(x.to(dtype), self.weight.to(dtype))

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = Linear(cfg.n_embd, 3 * cfg.n_embd, bias=False)
        self.attn_out = Linear(cfg.n_embd, cfg.n_embd, bias=False)
        self.up = Linear(cfg.n_embd, 4 * cfg.n_embd, bias=False)
        self.down = Linear(4 * cfg.n_embd, cfg.n_embd, bias=False)
        nn.init.zeros_(self.attn_out.weight)  # a block begins as the identity
        nn.init.zeros_(self.down.weight)

    def forward(self, x):
        (B, T, C), H = x.shape, cfg.n_head
        q, k, v = self.qkv(norm(x)).view(B, T, 3, H, D).unbind(2)
        q, k = rotary(norm(q)), rotary(norm(k))  # QK-norm (Henry et al., 2020): allows a high lr
        q, k, v = (z.transpose(1, 2).to(torch.float32 if device.type == "cpu" else dtype) for z in (q, k, v))  # (B, H, T, D)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # the CPU is slow at this in bfloat16
        assert y.shape == (B, H, T, D)
        x = x + self.attn_out(y.transpose(1, 2).reshape(B, T, C))
        return x + self.down(F.relu(self.up(norm(x))).square())  # squared ReLU (So et al., 2021)

class GPT(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(cfg.vocab_size, cfg.n_embd)
        self.smear = nn.Parameter(torch.zeros(cfg.n_embd))
        self.blocks = nn.ModuleList(Block() for _ in range(cfg.n_layer))
        self.head = Linear(cfg.n_embd, cfg.vocab_size, bias=False)
        nn.init.zeros_(self.head.weight)  # the first loss is ln(V)

    def forward(self, ids, targets=None):  # (B, T): logits of the next token, or with targets (B, T) the mean cross-entropy in nats
        x = self.embed(ids)  # (B, T, C)
        x = norm(x + self.smear * F.pad(x, (0, 0, 1, -1)))  # a learned share of the token before (smear, modded-nanogpt)
        for block in self.blocks:
            x = block(x)
        logits = self.head(norm(x)).float()  # (B, T, V)
        return logits if targets is None else F.cross_entropy(logits.flatten(0, 1), targets.flatten())

model = GPT().to(device)
train_model = torch.compile(model, dynamic=False) if cfg.compile == "on" else model  # what the loop calls
if world_size > 1:
    train_model = nn.parallel.DistributedDataParallel(train_model)

# %%
# optimizers and learning rate: a group takes `scale` times the rate of the schedule. The constants are the best of a few tried
matrices = [p for p in model.blocks.parameters() if p.ndim == 2]
others = [p for p in model.parameters() if all(p is not q for q in [*matrices, model.head.weight])]  # embedding, smear, yours
groups = [dict(params=others, scale=4.0), dict(params=[model.head.weight])]
if cfg.optimizer == "adamw":
    groups += [dict(params=matrices, scale=0.2, weight_decay=cfg.weight_decay)]
optimizers = [torch.optim.AdamW(groups, cfg.lr, betas=(0.8, 0.95), weight_decay=0.0, fused=True)]
if cfg.optimizer == "muon":  # Muon (Jordan et al., 2024); match_rms_adamw gives its updates an RMS of 0.2 * lr
    optimizers += [torch.optim.Muon(matrices, cfg.lr, cfg.weight_decay, momentum=0.8, adjust_lr_fn="match_rms_adamw")]

def lr_at(step):  # warmup, stable, decay (Hu et al., 2024): up in `warmup` steps, level, and straight down to 0
    return cfg.lr * min((step + 1) / (cfg.warmup + 1), 1, (cfg.steps - step) / max(cfg.cooldown * cfg.steps, 1))

# %%
# where the run stands: its checkpoint, and the two places its numbers go to, metrics.jsonl and wandb
start, seconds, tracker = 0, 0.0, None  # updates done, seconds of training, wandb's run
if resumed and (run_dir / "checkpoint.pt").exists():
    with or_fail(f"{run_dir}/checkpoint.pt is damaged or of another model; delete it to start again from step 0", Exception):
        checkpoint = torch.load(run_dir / "checkpoint.pt", map_location="cpu", weights_only=True)
        model.load_state_dict(checkpoint["model"])
        for optimizer, state in zip(optimizers, checkpoint["optimizers"]):
            optimizer.load_state_dict(state)
        start, seconds = checkpoint["step"], checkpoint["seconds"]
if rank == 0:
    metrics_file.seek(0)  # through this file only: to close another of the same name would give up the lock
    rows = metrics_file.read().splitlines(keepends=True)  # drop those after the checkpoint, and a torn one: they come again
    metrics_file.truncate(sum(len(row) for row in rows if row.endswith(b"\n") and json.loads(row)["step"] < start))
    if not resumed:
        commit = subprocess.getoutput(f"git -C '{Path(sys.modules['config'].__file__).parent}' rev-parse --verify HEAD 2>/dev/null")
        meta = dict(commit=commit, command=shlex.join(sys.argv), torch=torch.__version__, wandb_id=os.urandom(4).hex())
        write("meta.json", json.dumps(meta, indent=2).encode())
    write("train.py", "\n\n".join(In).encode() if notebook else Path(__file__).read_bytes())  # In: the cells as run
    write("config.py", Path(sys.modules["config"].__file__).read_bytes())
    write("config.json", json.dumps(vars(cfg), indent=2).encode())
    if cfg.wandb != "disabled":
        import wandb
        with or_fail("wandb does not start; --wandb offline needs no account and no network", Exception):
            wandb_id = json.loads((run_dir / "meta.json").read_text())["wandb_id"]  # a resumed run goes on under its id
            tracker = wandb.init(mode=cfg.wandb, project=cfg.wandb_project, group=cfg.wandb_group or None, name=run_dir.name,
                                 id=wandb_id, resume="allow", config=vars(cfg), settings=wandb.Settings(silent=True, console="off"))

# %%
# loop
@torch.no_grad()
def evaluate():  # mean cross-entropy of the validation windows in nats a token, the work shared among the processes
    total = torch.zeros((), device=device)
    for i in range(rank * micro_batch_size, len(val_starts), world_size * micro_batch_size):
        starts = val_starts[i : i + micro_batch_size]
        total += model(*windows(val_data, starts)) * len(starts)
    if world_size > 1:
        dist.all_reduce(total)
    return total.item() / len(val_starts)

stop_signals = []  # Ctrl-C, kill, a cluster's warning: the loop finishes its step, saves and stops
handlers = {n: signal.signal(n, lambda number, frame: stop_signals.append(number)) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
plain = not (notebook or sys.stderr.isatty())  # a log file: lines instead of a bar
tokens_per_step, val_loss, clock = cfg.batch_size * cfg.seq_len, math.nan, time.perf_counter()
bar = tqdm(total=cfg.steps * tokens_per_step, initial=start * tokens_per_step, unit=" tokens", unit_scale=True,
           file=open(os.devnull, "w") if plain or rank > 0 else None,
           bar_format="{l_bar}" + "{bar:20}| " * (not plain) + "{elapsed}<{remaining}, {rate_fmt}{postfix}")
atexit.register(bar.close)  # also when the run fails
for step in range(start, cfg.steps + 1):
    # loss and gradient of batch `step`, at the weights after `step` updates
    model.zero_grad()
    train_loss = torch.zeros((), device=device)
    for i, starts in enumerate(batch_starts(step)):
        train_model.require_backward_grad_sync = i == micro_steps - 1  # processes exchange gradients once a step
        loss = train_model(*windows(train_data, starts)) / micro_steps
        loss.backward()
        train_loss += loss.detach()

    # log, evaluate, save: at the same weights, so only those with a finite loss are saved
    stopping, done = max(stop_signals, default=0), step == cfg.steps
    if world_size > 1:  # a signal finds the processes at different steps: they stop together
        dist.all_reduce(flag := torch.tensor(stopping), dist.ReduceOp.MAX)
        stopping = flag.item()
    evaluating = step % cfg.eval_every == 0 or done
    saving = step % cfg.save_every == 0 and step > start or done or stopping
    if step % cfg.log_every == 0 or evaluating or saving:
        if world_size > 1:
            dist.all_reduce(train_loss)
        train_loss = train_loss.item() / world_size  # .item() waits for the device, so the clock is right
        seconds += time.perf_counter() - clock
        finite = math.isfinite(train_loss)
        row = dict(step=step, tokens=step * tokens_per_step, seconds=seconds, train_loss=train_loss if finite else None, lr=lr_at(step))
        if evaluating and finite:
            val_loss = row["val_loss"] = evaluate()
        if rank == 0:
            with or_fail(f"cannot write {run_dir}/metrics.jsonl; make room, and the same line goes on", OSError):
                if metrics_file.write(line := json.dumps(row).encode() + b"\n") < len(line):
                    raise OSError("the disk took a part of a line")
        try:
            if tracker:
                tracker.log(row, step=step)
        except Exception as error:  # no network, no disk
            tqdm.write(f"wandb failed, training goes on without it: {error}")
            tracker = None
        if not finite:
            fail(f"the loss is not finite at step {step}: try an --lr below {cfg.lr:g}. {run_dir} keeps its last checkpoint")
        if saving and rank == 0:  # all that the next step depends on
            state = dict(model=model.state_dict(), optimizers=[o.state_dict() for o in optimizers], step=step, seconds=seconds)
            torch.save(state, buffer := io.BytesIO())  # in memory first: a full disk is then a plain OSError
            write("checkpoint.pt", buffer.getvalue())
        bar.set_postfix_str(f"step {step}/{cfg.steps}, loss {train_loss:.3f}, val {val_loss:.3f}")
        if plain and rank == 0:
            print(bar, flush=True)
        clock = time.perf_counter()
    if done or stopping:
        break

    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group.get("scale", 1.0) * lr_at(step)
        optimizer.step()
    bar.update(tokens_per_step)
bar.close()
start = step  # in a notebook, this cell again goes on from here
if world_size > 1:  # together: a process that leaves early makes the others abort
    dist.barrier()
    dist.destroy_process_group()
for number, handler in handlers.items():
    signal.signal(number, handler)
if not done:
    again = shlex.join(["python", *sys.argv, "--run-dir", cfg.run_dir]) if not notebook else f"this cell, or run_dir={cfg.run_dir!r}"
    if rank == 0:
        print(f"stopped by {signal.Signals(stopping).name} at step {step}, saved. To resume: {again}")
    sys.exit(128 + stopping if rank == 0 else 0)  # torchrun ends the others when one fails: rank 0 may finish wandb

# %%
# sample: what the model writes, and the result
if rank == 0:
    torch.manual_seed(cfg.seed)
    ids = torch.tensor([[int(val_data[0])]], device=device)  # (1, T)
    for _ in range(cfg.sample_tokens):
        with torch.no_grad():
            logits = model(ids[:, -cfg.seq_len :])[0, -1]  # (V,)
        ids = torch.cat((ids, torch.multinomial(F.softmax(logits / 0.8, dim=-1), 1)[None]), dim=1)  # temperature 0.8
    ids = ids[0, 1:].tolist()
    sample = " ".join(map(str, ids)) if cfg.data.endswith(".bin") else bytes(i for i in ids if i < 256).decode(errors="replace")
    write("sample.txt" if done else "sample-unfinished.txt", sample.encode())
    if tracker:
        tracker.summary["sample"] = sample
        tracker.finish()
    print(f"\n{sample}\n\n---\nval_loss: {val_loss:.4f}\nsteps: {step}\ntokens: {row['tokens']}\ntrain_seconds: {seconds:.1f}\n"
          f"tokens_per_second: {row['tokens'] / seconds:.0f}\nparameters: {sum(p.numel() for p in model.parameters())}\nrun_dir: {run_dir}")

# %%
# the loss curve, in the notebook
if notebook:
    import pandas as pd
    pd.read_json(run_dir / "metrics.jsonl", lines=True).interpolate().plot("step", ["train_loss", "val_loss"], ylabel="nats per token")
