# %% [markdown]
# # One experiment: a small GPT
# Shapes: B sequences, T tokens, C channels, H heads of D = C / H channels, V token ids.

# %%
# config: flags in the script; in the notebook edit this line, as in Config(lr=3e-3)
from config import Config, open_run, read_json, split_cells

cfg, run = open_run(Config())

# %%
# imports
import io
import json
import math
import os
import signal
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

# %%
# device and processes
# torchrun or slurm.sbatch sets these three.
rank = int(os.environ.get("RANK") or 0)
local_rank = int(os.environ.get("LOCAL_RANK") or 0)
world_size = int(os.environ.get("WORLD_SIZE") or 1)

device_name = cfg.device
if cfg.device == "auto":
    device_name = str(torch.accelerator.current_accelerator(check_available=True) or "cpu")
if device_name == "cuda":
    device_name = f"cuda:{local_rank}"
try:
    device = torch.empty(1, device=device_name).device
except (RuntimeError, AssertionError) as error:
    reason = str(error)[:200].partition("\n")[0]
    sys.exit(f"error: --device {cfg.device} is not here: {reason}")
on_cuda = device.type == "cuda"
if on_cuda:
    torch.cuda.set_device(device)
    torch.set_float32_matmul_precision("high")  # TF32, for --dtype float32

dtype_name = cfg.dtype
if cfg.dtype == "auto":
    if on_cuda:
        fast_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    elif hasattr(torch.cpu, "get_capabilities"):
        # A CPU without these instructions is many times slower in bfloat16 than in float32.
        has = torch.cpu.get_capabilities()
        fast_bfloat16 = has.get("amx_bf16", False) or has.get("avx512_bf16", False)
    else:  # an older torch
        fast_bfloat16 = torch.cpu._is_amx_tile_supported()
    dtype_name = "bfloat16" if fast_bfloat16 else "float32"
    # A resumed run goes on as it began, wherever it is now.
    dtype_name = run.meta.get("dtype", dtype_name)
dtype = getattr(torch, dtype_name)

compiling = cfg.compile == "on" or (cfg.compile == "auto" and on_cuda)
if compiling:
    # Compile something tiny: if there is no C++ compiler, no Python.h, too old a card, it
    # should fail here, not in the loop.
    try:
        torch.compile(torch.neg)(torch.ones(1, device=device))
    except Exception as error:
        if cfg.compile == "on":
            sys.exit(f"error: torch.compile fails, add --compile off: {error}")
        if rank == 0:
            print(f"note: torch.compile fails here, so the run is slower: {error}")
        compiling = False

# the processes share the batch, and each takes its share in micro-batches
micro_batch_size = cfg.micro_batch_size or max(cfg.batch_size // world_size, 1)
micro_steps = cfg.batch_size // (micro_batch_size * world_size)
if micro_batch_size * micro_steps * world_size != cfg.batch_size:
    shares = f"{world_size} processes in micro-batches of {micro_batch_size}"
    sys.exit(f"error: --batch-size {cfg.batch_size} cannot be shared by {shares}")

torch.manual_seed(cfg.seed)
if world_size > 1:
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_cuda else "gloo")

def all_reduce(x, op=dist.ReduceOp.SUM):
    if world_size > 1:
        dist.all_reduce(x, op)
    return x

# %%
# data: one long row of token ids, memory-mapped
# Other cells use of this one: train_data, val_data, get_batch, train_offsets, val_offsets, n_val,
# tokens_per_step, fingerprint.
def open_tokens(name):
    # The ids, (N,), of a .npy of any integers, a .bin, or else of a text's bytes.
    try:
        path = Path(name).expanduser()
        if path.is_fifo():
            raise ValueError("it is a pipe")
        if name == "stdlib":
            tokens = stdlib_source()
        elif path.suffix.lower() == ".npy":
            tokens = np.lib.format.open_memmap(path, mode="r")
        elif path.suffix.lower() == ".bin":
            tokens = open_bin(path)
        else:
            tokens = np.memmap(path, np.uint8, mode="r")
            # Other data, compressed or not, has many zeros; a .gz may be too short for them.
            zeros = np.mean(tokens[:1_000_000] == 0)
            if zeros > 0.001 or bytes(tokens[:2]) == b"\x1f\x8b":
                raise ValueError("it is no plain text: unpack it, or save ids as .npy")
        largest = np.iinfo(tokens.dtype).max
    except Exception as error:
        sys.exit(f"error: cannot read {name} as token ids: {error}")
    if tokens.ndim != 1:
        sys.exit(f"error: {name} has the shape {tokens.shape}, it must be one row of token ids")
    if cfg.vocab_size > largest + 1:
        what = f"{name} is read as {tokens.dtype}, and no id is above {largest}"
        wrong = f"--vocab-size {cfg.vocab_size} is for other data, such as a tokenizer's .npy"
        sys.exit(f"error: {what}: {wrong}")
    # Most wrong sizes are seen here, in milliseconds; get_batch checks every id.
    some_ids = tokens[:10_000_000]
    check_ids(some_ids)
    return tokens

def check_ids(ids):
    for id in (ids.max(initial=0), ids.min(initial=0)):
        if not 0 <= id < cfg.vocab_size:
            sys.exit(f"error: token id {id} in the data, beyond --vocab-size {cfg.vocab_size}")

def open_bin(path):
    # llm.c and modded-nanogpt begin with 256 int32: a number for the format, a version, how many
    # ids. nanoGPT's files are bare uint16.
    header = np.fromfile(path, np.int32, count=256)
    if len(header) == 256 and header[0] == 20240520:
        return np.memmap(path, np.uint16, mode="r", offset=1024, shape=header[2])
    if len(header) == 256 and header[0] == 20240801:
        return np.memmap(path, np.uint32, mode="r", offset=1024, shape=header[2])
    tokens = np.memmap(path, np.uint16, mode="r")
    even = tokens[:2000:2]
    odd = tokens[1:2000:2]
    if len(odd) > 0 and odd.max() < 16 < even.max():
        raise ValueError("every second uint16 is small: if the ids are wider, save them as .npy")
    return tokens

def stdlib_source():
    # Python's standard library, without its tests and tables: text on every machine
    leave_out = {"site-packages", "dist-packages", "test", "tests", "encodings", "pydoc_data"}
    files = []
    for folder, subfolders, names in os.walk(Path(os.__file__).parent):
        # Changed in place, since os.walk goes by it.
        subfolders[:] = set(subfolders) - leave_out
        files += [Path(folder, name) for name in names if name.endswith(".py")]
    files.sort()
    np.random.default_rng(0).shuffle(files)  # the last tenth is like the rest
    return np.frombuffer(b"".join(f.read_bytes() for f in files), np.uint8)

train_data = open_tokens(cfg.data)
if cfg.val_data:
    val_data = open_tokens(cfg.val_data)
else:
    cut = len(train_data) * 9 // 10
    train_data, val_data = train_data[:cut], train_data[cut:]
if min(len(train_data), len(val_data)) <= cfg.seq_len:
    what = f"{len(train_data)} tokens to train on and {len(val_data)} to validate"
    sys.exit(f"error: the data has too few tokens for --seq-len {cfg.seq_len}: {what}")

def get_batch(tokens, offsets):
    # inputs and targets, both (B, T), of the windows that begin at `offsets` (B,)
    ids = tokens[offsets[:, None] + np.arange(cfg.seq_len + 1)]  # (B, T + 1)
    check_ids(ids)
    ids = torch.from_numpy(ids.astype(np.int64))
    # On CUDA a copy from pinned memory goes on beside the computation.
    if on_cuda:
        ids = ids.pin_memory()
    ids = ids.to(device, non_blocking=on_cuda)
    return ids[:, :-1], ids[:, 1:]

def train_offsets(step):
    # The windows of a step, over all processes, (batch_size,). They depend on (seed, step) alone,
    # so a resumed run sees the same, and several processes share what one would see.
    rng = np.random.default_rng((cfg.seed, step))
    return rng.integers(len(train_data) - cfg.seq_len, size=cfg.batch_size)

# validation: always the same windows, evenly spread
n_windows = (len(val_data) - 1) // cfg.seq_len
n_val = max(cfg.eval_tokens // cfg.seq_len, 1)
n_val = min(n_val, n_windows)
last_offset = len(val_data) - 1 - cfg.seq_len
val_offsets = np.linspace(0, last_offset, n_val).astype(np.int64)

tokens_per_step = cfg.batch_size * cfg.seq_len

# How a resumed run knows its data: the sizes, and a checksum of the ids, or of 10,000 of many.
fingerprint = [len(train_data), len(val_data)]
for tokens in (train_data, val_data):
    if len(tokens) > 10_000_000:
        some = np.random.default_rng(0).integers(len(tokens), size=10_000)
        tokens = tokens[np.sort(some)]
    fingerprint.append(zlib.crc32(tokens.tobytes()))

# %%
# model
def norm(x):
    # Without weights: the next matrix learns the scale. As good as RMSNorm, and one kernel on
    # a CPU.
    return F.layer_norm(x, x.shape[-1:])

D = cfg.n_embd // cfg.n_head  # channels of a head
frequency = 10000.0 ** -(torch.arange(0, D, 2) / D)
positions = torch.arange(cfg.seq_len)
angle = torch.outer(positions, frequency)[:, None]  # (T, 1, D / 2)
cos = angle.cos().to(device)
sin = angle.sin().to(device)

def rotary(x):
    # rotary positions (Su et al., 2021): pairs of channels turn by angles that grow with T
    T = x.size(1)
    a, b = x.chunk(2, dim=-1)  # (B, T, H, D / 2)
    turned_a = a * cos[:T] + b * sin[:T]
    turned_b = b * cos[:T] - a * sin[:T]
    return torch.cat((turned_a, turned_b), dim=-1)

class Linear(nn.Linear):
    # float32 weights for the optimizer, the product in `dtype`
    def forward(self, x):
        bias = None if self.bias is None else self.bias.to(dtype)
        return F.linear(x.to(dtype), self.weight.to(dtype), bias)

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = Linear(cfg.n_embd, 3 * cfg.n_embd, bias=False)
        self.attn_out = Linear(cfg.n_embd, cfg.n_embd, bias=False)
        # Three dimensions: AdamW takes it, not Muon.
        self.conv = nn.Parameter(torch.zeros(3, 1, cfg.n_embd))
        self.up = Linear(cfg.n_embd, 4 * cfg.n_embd, bias=False)
        self.down = Linear(4 * cfg.n_embd, cfg.n_embd, bias=False)
        nn.init.zeros_(self.attn_out.weight)  # a block begins as the identity
        nn.init.zeros_(self.down.weight)

    def attention(self, x):
        B, T, C = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, cfg.n_head, D).unbind(2)  # (B, T, H, D)
        # QK-norm (Henry et al., 2020) keeps training stable at a high learning rate.
        q = rotary(norm(q))
        k = rotary(norm(k))
        attention_dtype = dtype
        if device.type == "cpu":  # slow at it in bfloat16
            attention_dtype = torch.float32
        q = q.transpose(1, 2).to(attention_dtype)  # (B, H, T, D)
        k = k.transpose(1, 2).to(attention_dtype)
        v = v.transpose(1, 2).to(attention_dtype)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        assert y.shape == (B, cfg.n_head, T, D)
        return self.attn_out(y.transpose(1, 2).reshape(B, T, C))

    def short_conv(self, x):
        # A Canon layer (Allen-Zhu, 2025): each token gets shares of the n tokens before it.
        n = len(self.conv)
        T = x.size(1)
        padded = F.pad(x, (0, 0, n, 0))  # (B, n + T, C)
        y = x
        for i in range(n):
            y = y + self.conv[i] * padded[:, i : i + T]
        return y

    def forward(self, x):
        x = x + self.attention(norm(x))
        h = self.up(self.short_conv(norm(x)))
        h = F.relu(h).square()  # squared ReLU (So et al., 2021)
        return x + self.down(h)

class GPT(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(cfg.vocab_size, cfg.n_embd)
        self.blocks = nn.ModuleList(Block() for _ in range(cfg.n_layer))
        self.head = Linear(cfg.n_embd, cfg.vocab_size, bias=False)
        nn.init.zeros_(self.head.weight)  # the first loss is ln(V)

    def forward(self, ids, targets=None):
        assert ids.size(1) <= cfg.seq_len, "more tokens than seq_len"
        x = norm(self.embed(ids))  # (B, T, C)
        for block in self.blocks:
            x = block(x)
        logits = self.head(norm(x)).float()  # (B, T, V)
        if targets is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())  # mean, nats per token

model = GPT().to(device)
train_model = model  # the same weights, as the loop calls them
if compiling:
    train_model = torch.compile(train_model, dynamic=False)
if world_size > 1:
    train_model = nn.parallel.DistributedDataParallel(train_model)

# %%
# optimizers
class Muon(torch.optim.Optimizer):
    # Muon (Jordan et al., 2024): a matrix moves along its momentum, made nearly orthogonal.
    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            for p in params:
                if p not in self.state:
                    self.state[p]["momentum"] = torch.zeros_like(p)
                momentum = self.state[p]["momentum"]
                momentum.lerp_(p.grad, 1 - group["beta"])
                p.grad.lerp_(momentum, group["beta"])  # Nesterov's momentum
            # All matrices of one shape are orthogonalized as one batch.
            for shape in sorted({p.shape for p in params}):
                batch = [p for p in params if p.shape == shape]
                updates = orthogonal(torch.stack([p.grad for p in batch]))
                # An update gets an RMS of 0.2, about that of AdamW's (Liu et al., 2025).
                size = 0.2 * max(shape) ** 0.5
                for p, update in zip(batch, updates):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(update, alpha=-group["lr"] * size)

def orthogonal(x):
    # Five steps of Newton-Schulz bring the singular values of each matrix of x, (n, rows,
    # columns), to about 1. The coefficients are Keller Jordan's.
    if x.size(1) > x.size(2):
        return orthogonal(x.mT).mT
    norms = x.norm(dim=(1, 2), keepdim=True)  # (n, 1, 1)
    x = (x / (norms + 1e-7)).to(dtype)
    for _ in range(5):
        gram = x @ x.mT  # (n, rows, rows)
        polynomial = -4.775 * gram + 2.0315 * gram @ gram
        x = 3.4445 * x + polynomial @ x
    return x.float()

matrices, fast, rest = [], [], []
for name, p in model.named_parameters():
    if name.startswith("blocks.") and p.ndim == 2:
        matrices.append(p)
    elif name.startswith("embed.") or name.endswith(".conv"):
        fast.append(p)  # they learn best at a higher rate
    else:  # the head, and what you add
        rest.append(p)

# Each group learns at its `scale`, or else 1, times lr_at(step). The constants are the best of a
# few tried.
groups = [dict(params=fast, scale=4.0), dict(params=rest)]
optimizers = []
if cfg.optimizer == "muon":
    if not matrices:
        sys.exit("error: Muon takes the matrices of model.blocks, and there are none")
    defaults = dict(lr=cfg.lr, weight_decay=cfg.weight_decay, beta=0.8)
    muon = Muon(matrices, defaults)
    optimizers.append(muon)
elif cfg.optimizer == "adamw":
    groups.append(dict(params=matrices, scale=0.2, weight_decay=cfg.weight_decay))
else:
    sys.exit(f"error: there is no code for --optimizer {cfg.optimizer}")
adamw = torch.optim.AdamW(groups, cfg.lr, betas=(0.8, 0.95), weight_decay=0.0, fused=True)
optimizers.append(adamw)

def lr_at(step):
    # warmup, stable, decay (Hu et al., 2024)
    up = (step + 1) / (cfg.warmup + 1)
    cooldown_steps = max(cfg.cooldown * cfg.steps, 1)
    down = (cfg.steps - step) / cooldown_steps
    return cfg.lr * min(up, 1, down)

# %%
# the record: what a run writes, and how it resumes. An experiment seldom touches this
if run.used:
    sys.exit("error: this run has begun already; run the config cell again, and all below it")
for name in run.made_by_cells:
    if name not in globals():
        sys.exit(f"error: {name} is not of this config; run all cells below the config cell")
recording = rank == 0 and run.state != "finished"
tracker = None  # wandb's run

def write(name, data):
    # Written beside the file, then renamed over it: there is always a whole one.
    path = run.dir / name
    try:
        with open(f"{path}.tmp", "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(f.name, path)
    except OSError as error:
        sys.exit(f"error: cannot write {path}: {error}")

def write_json(name, values):
    write(name, json.dumps(values, indent=2).encode())

def save():
    if not recording:
        return
    checkpoint = dict(model=model.state_dict(), updates=updates, seconds=seconds)
    checkpoint["optimizers"] = [optimizer.state_dict() for optimizer in optimizers]
    # In memory first: a full disk is then an OSError.
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    write("checkpoint.pt", buffer.getvalue())
    write_cells()

def write_cells():
    # In is Jupyter's list of the cells that ran; the loop's is among them when this is called.
    if run.notebook:
        name = Path(run.meta["script"]).stem + ".py"
        source = "\n\n# %%\n".join(In[run.first_cell :]).encode()
        if run.before and split_cells(source) - split_cells(run.before):
            print("note: other cells ran than before in this run")
            checksum = zlib.crc32(run.before)
            run.meta.setdefault("edited", []).append(f"{name} {checksum:x}")
            write_json("meta.json", run.meta)
        run.before = b""
        write(name, source)

def load_checkpoint(run_dir):
    path = Path(run_dir).expanduser() / "checkpoint.pt"
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        sys.exit(f"error: cannot read {path}: {error!r}")

def resume():
    # Returns the optimizer steps and the seconds of training that the checkpoint stands for.
    before = run.meta.get("data", fingerprint)
    if before != fingerprint:
        what = f"ids and checksums {before} there, {fingerprint} here"
        if run.state != "finished":
            sys.exit(f"error: {run.dir} began with other data ({what}); name another --run-dir")
        print(f"note: {run.dir} was trained on other data ({what})")
    trainable = {p for p in model.parameters() if p.requires_grad}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            trainable -= set(group["params"])
            # as the code has it, before any step
            options = {name: value for name, value in group.items() if name != "params"}
            group.setdefault("options", options)
    if trainable:
        sys.exit("error: some weights of the model are in no optimizer: add them, or run its cell")
    if run.state == "finished" or (run.dir / "checkpoint.pt").exists():
        checkpoint = load_checkpoint(run.dir)
        try:
            model.load_state_dict(checkpoint["model"])
            for optimizer, saved in zip(optimizers, checkpoint["optimizers"], strict=True):
                groups = optimizer.param_groups
                optimizer.load_state_dict(saved)
                # Options (scale, beta) that were edited are what the code says now.
                for i, group in enumerate(groups):
                    if optimizer.param_groups[i].get("options") != group["options"]:
                        optimizer.param_groups[i] = group
        except (RuntimeError, ValueError) as error:
            sys.exit(f"error: {run.dir} was trained by other code, its copy is there: {error}")
        return checkpoint["updates"], checkpoint["seconds"]
    if cfg.init_from:
        theirs = read_json(Path(cfg.init_from).expanduser() / "config.json")
        differ = ""
        for name in ("n_layer", "n_head", "n_embd", "vocab_size"):
            value = getattr(cfg, name, None)
            if theirs.get(name, value) != value:
                differ += f" --{name.replace('_', '-')} {theirs[name]}"
        if differ:
            sys.exit(f"error: the model of --init-from {cfg.init_from} is another: add{differ}")
        try:
            model.load_state_dict(load_checkpoint(cfg.init_from)["model"])
        except RuntimeError as error:
            sys.exit(f"error: the weights of --init-from {cfg.init_from} do not fit: {error}")
    return 0, 0.0

def rewind(updates):
    # Rows of metrics.jsonl from before the checkpoint stay; later ones, and a torn one, go.
    path = run.dir / "metrics.jsonl"
    kept = []
    path.touch()
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            row = json.loads(line)
        except ValueError:
            break
        if row["step"] >= updates or not line.endswith(b"\n"):
            break
        kept.append(line)
    write("metrics.jsonl", b"".join(kept))

def log(row):
    if recording:
        path = run.dir / "metrics.jsonl"
        try:
            with open(path, "ab") as f:
                f.write(json.dumps(row).encode() + b"\n")
        except OSError as error:
            sys.exit(f"error: cannot write {path}: {error}")
        track("log", row, step=row["step"])

def track(method, *args, **kwargs):
    # Whatever is wrong with wandb, the run goes on.
    global tracker
    try:
        if tracker:
            getattr(tracker, method)(*args, **kwargs)
    except Exception as error:
        tqdm.write(f"note: wandb failed, training goes on: {error}")
        tracker = None

def check_finite(values, step):
    if not all(math.isfinite(value) for value in values.values()):
        # JSON has no NaN; None is how plot.ipynb knows of it.
        log(dict(step=step, train_loss=None))
        advice = f"try an --lr below {cfg.lr:g}, in another --run-dir"
        sys.exit(f"error: not finite at step {step}: {values}; {advice}")

updates, seconds = resume()
span = all_reduce(torch.tensor([updates, -updates]), dist.ReduceOp.MAX)  # most and fewest
if span.sum() != 0:
    sys.exit(f"error: the processes see other checkpoints: is {run.dir} on a disk of all nodes?")
if recording and updates > 0:
    print(f"{run.dir} resumes at step {updates}")

if recording:
    write_json("config.json", vars(cfg))
    here = dict(torch=torch.__version__, device=str(device), compile=compiling)
    here["processes"] = world_size
    run.meta |= here | dict(data=fingerprint, dtype=dtype_name)
    run.meta.setdefault("starts", []).append(dict(step=updates) | here)
    write_json("meta.json", run.meta)
    for name, code in run.code.items():
        write(name, code)
run.used = True

if recording and cfg.wandb != "disabled":
    try:
        import wandb

        # A resumed run goes on under its id; a copy of its folder gets another.
        identity = f"{run.dir.resolve()} {run.meta['began']}"
        wandb_id = zlib.crc32(identity.encode())
        tracker = wandb.init(
            mode=cfg.wandb,
            project=cfg.wandb_project,
            group=cfg.wandb_group or None,
            name=run.dir.name,
            id=f"{wandb_id:08x}",
            resume="allow",
            config=vars(cfg),
            settings=wandb.Settings(silent=True, console="off"),
        )
        print(f"wandb {cfg.wandb}: {Path(tracker.dir).parent}")
    except Exception as error:
        print(f"note: wandb failed, training goes on: {error}")

# %%
# loop
@torch.no_grad()
def evaluate():
    # Measures by name, as numbers, and first the one that matters. The processes share the work.
    total = torch.zeros((), device=device)
    for i in range(rank * micro_batch_size, n_val, world_size * micro_batch_size):
        offsets = val_offsets[i : i + micro_batch_size]
        inputs, targets = get_batch(val_data, offsets)
        total += model(inputs, targets) * len(offsets)
    return dict(val_loss=all_reduce(total).item() / n_val)

def in_words(values):
    return ", ".join(f"{name} {value:.4g}" for name, value in values.items())

def set_seed(*numbers):
    # Whatever is random in the model, such as dropout, depends on these alone, so that a resumed
    # run draws the same.
    torch.manual_seed(zlib.crc32(str(numbers).encode()))

# Ctrl-C, kill, Slurm's warning: the loop finishes its step, saves and stops.
stop_signal = 0

def on_signal(number, frame):
    global stop_signal
    stop_signal = number

for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, on_signal)

# In a notebook this cell may run again: it goes on from the checkpoint, as a script would.
if run.notebook:
    if not run.used:
        sys.exit("error: this is a new run; run the cells from the config cell down to this one")
    updates, seconds = resume()
if recording:
    rewind(updates)
todo = range(updates, cfg.steps + 1)
if run.state == "finished":
    todo = []
# A log file gets lines instead of a bar.
interactive = run.notebook or sys.stderr.isatty()
hidden = not (recording and interactive)
bar = tqdm(initial=updates, total=cfg.steps, disable=hidden)
measures = {}
stop = 0
clock = time.perf_counter()

for step in todo:
    row = dict(step=step, tokens=step * tokens_per_step, lr=lr_at(step))
    last = step == cfg.steps
    if not last:
        # A signal reaches the processes at different steps; by the maximum they stop together.
        stop = all_reduce(torch.tensor(stop_signal), dist.ReduceOp.MAX).item()

    # The weights after `step` updates: evaluate, and save them if all measures are finite.
    evaluating = step % cfg.eval_every == 0 or last or stop
    if evaluating:
        if on_cuda:
            torch.cuda.synchronize()
        seconds += time.perf_counter() - clock  # of training only
        model.eval()
        set_seed(cfg.seed, rank)
        measures = evaluate()
        model.train()
        row |= measures | dict(seconds=seconds)
        check_finite(measures, step)
        save()
        clock = time.perf_counter()
    if last:
        log(row)
        bar.set_postfix_str(in_words(measures))
    if last or stop:
        break

    # One step: the loss and its gradient over the micro-batches, then the update.
    set_seed(cfg.seed, step, rank)
    model.zero_grad()
    train_loss = torch.zeros((), device=device)
    shares = train_offsets(step).reshape(world_size, micro_steps, micro_batch_size)
    for i, offsets in enumerate(shares[rank]):
        # Processes exchange gradients once a step, after the last micro-batch.
        if world_size > 1:
            train_model.require_backward_grad_sync = i == micro_steps - 1
        inputs, targets = get_batch(train_data, offsets)
        loss = train_model(inputs, targets) / micro_steps
        loss.backward()
        train_loss += loss.detach()
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group.get("scale", 1.0) * lr_at(step)
        optimizer.step()
    updates = step + 1

    # Report.
    bar.update()
    if step % cfg.log_every == 0 or evaluating:
        train_loss = all_reduce(train_loss) / world_size
        row["train_loss"] = train_loss.item()
        row["seconds"] = seconds + time.perf_counter() - clock
        check_finite(dict(train_loss=row["train_loss"]), step)
        log(row)
        shown = {"loss": row["train_loss"]}
        # The bar shows the last measures, a line only those of its own step.
        if evaluating or interactive:
            shown |= measures
        text = in_words(shown)
        bar.set_postfix_str(text)
        if recording and not interactive:
            print(f"step {step}/{cfg.steps}, {text}", flush=True)

bar.close()
model.eval()
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGTERM, signal.SIG_DFL)
signal.signal(signal.SIGUSR1, signal.SIG_DFL)
if world_size > 1:
    dist.barrier()
    dist.destroy_process_group()
if stop:
    if rank == 0:
        print(f"stopped by {signal.Signals(stop).name} at step {step}, saved. To resume:")
        if run.notebook:
            print("run this cell again")
        elif world_size > 1:
            print(f"the same line again, with --run-dir {cfg.run_dir}")
        else:
            print(run.meta["command"])
    # torchrun kills all at the first exit code that is not 0: it is rank 0's, so that it can
    # finish wandb.
    if rank == 0:
        sys.exit(128 + stop)
    sys.exit()
run.trained = True

# %%
# a sample: what the model writes
if recording and cfg.sample_tokens > 0:
    torch.manual_seed(cfg.seed)
    ids = torch.tensor([[int(val_data[0])]], device=device)  # (1, T)
    for _ in range(cfg.sample_tokens):
        with torch.no_grad():
            logits = model(ids[:, -cfg.seq_len :])[0, -1]  # (V,)
        probabilities = F.softmax(logits / 0.8, dim=-1)  # temperature 0.8
        next_id = torch.multinomial(probabilities, 1)
        ids = torch.cat((ids, next_id[None]), dim=1)
    sample = ids[0, 1:].tolist()
    is_text = train_data.dtype == np.uint8 and not cfg.data.lower().endswith(".npy")
    if is_text:
        sample = bytes(sample).decode(errors="replace")
    write("sample.txt", str(sample).encode())
    track("log", dict(sample=str(sample)), step=step)
    # An untrained model may write control characters, which a terminal would obey.
    plain = ""
    for character in str(sample):
        if character.isprintable() or character in "\n\t":
            plain += character
        else:
            plain += "?"
    print(plain)

# %%
# the result
if recording and not run.trained:
    sys.exit("error: this run is not trained: run the loop's cell to its end")
if recording:
    result = measures | dict(
        steps=step,
        tokens=step * tokens_per_step,
        train_seconds=seconds,
        tokens_per_second=step * tokens_per_step / seconds,
        parameters=sum(p.numel() for p in model.parameters()),
        device=str(device),
        dtype=dtype_name,
        run_dir=str(run.dir),
    )
    write_cells()
    write_json("result.json", result)  # the run is finished
    print("---")
    for name, value in result.items():
        if isinstance(value, float):
            value = f"{value:.5g}"
        print(f"{name}: {value}")
    track("finish")

# %%
# the curves, in the notebook
if run.notebook and (run.dir / "metrics.jsonl").exists():
    import pandas as pd

    metrics = pd.read_json(run.dir / "metrics.jsonl", lines=True).interpolate()
    metrics.drop(columns=["tokens", "seconds", "lr"]).plot("step")
