# %% [markdown]
# # One experiment: a small GPT
# Shapes: B sequences, T tokens, C channels, H heads of D = C / H channels, V token ids.

# %%
# config: flags in the script; in the notebook edit this line, as in Config(lr=3e-3)
from config import Config, open_run

cfg, run = open_run(Config())

# %%
# imports, after the flags: --help is quick
import os
import sys
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

# %%
# device and processes
device_name = cfg.device
if cfg.device == "auto":
    device_name = str(torch.accelerator.current_accelerator(check_available=True) or "cpu")
if device_name == "cuda":
    device_name = f"cuda:{os.environ.get('LOCAL_RANK') or 0}"
device = torch.device(device_name)
on_cuda = device.type == "cuda"
if on_cuda:
    torch.cuda.set_device(device)
    torch.set_float32_matmul_precision("high")  # TF32, for --dtype float32

dtype_name = cfg.dtype
if cfg.dtype == "auto":
    # Without these instructions a CPU is far slower in bfloat16.
    has = torch.cpu.get_capabilities()
    fast_bfloat16 = has.get("amx_bf16", False) or has.get("avx512_bf16", False)
    if on_cuda:
        fast_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    dtype_name = "bfloat16" if fast_bfloat16 else "float32"
    # A resumed run goes on as it began, wherever it is now.
    dtype_name = run.meta.get("dtype", dtype_name)
matmul_dtype = getattr(torch, dtype_name)

compiling = cfg.compile == "on"
# A short run does not win back the half minute of compiling.
if cfg.compile == "auto" and on_cuda and cfg.steps * cfg.batch_size > 20_000:
    # Something tiny first: without a C++ compiler it fails here, not in the loop.
    try:
        torch.compile(torch.neg)(torch.ones(1, device=device))
        compiling = True
    except Exception as error:
        print(f"note: torch.compile fails, so the run is slower: {error}")
run.meta |= dict(device=device_name, dtype=dtype_name, compile=compiling)

if run.world_size > 1:
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_cuda else "gloo")
assert cfg.batch_size >= run.world_size, "--batch-size is below the number of processes"

def micro_batches(samples):
    # This process's share of them, in pieces.
    share = np.array_split(samples, run.world_size)[run.rank]
    size = cfg.micro_batch_size or -(-cfg.batch_size // run.world_size)  # rounded up
    return [share[i : i + size] for i in range(0, len(share), size)]

def all_reduce(x):
    # The sum over the processes.
    if run.world_size > 1:
        dist.all_reduce(x)
    return x

def set_seed(*numbers):
    # Dropout and the like draw the same numbers in a resumed run.
    torch.manual_seed(zlib.crc32(str(numbers).encode()))

class Linear(nn.Linear):
    # float32 weights for the optimizer, the product in --dtype
    def forward(self, x):
        bias = self.bias
        if bias is not None:
            bias = bias.to(matmul_dtype)
        return F.linear(x.to(matmul_dtype), self.weight.to(matmul_dtype), bias)

# %%
# data: one long row of token ids, memory-mapped
# The cells below need train_data, val_data, get_batch, train_offsets, val_offsets,
# tokens_per_step and fingerprint.
def open_tokens(name):
    # The ids, (N,), of a .npy of any integers, a .bin, or else of a text's bytes.
    path = Path(name).expanduser()
    try:
        if name == "stdlib":
            tokens = stdlib_source()
        elif path.suffix.lower() == ".npy":
            tokens = np.load(path, mmap_mode="r")
        elif path.suffix.lower() == ".bin":
            tokens = open_bin(path)
        else:
            tokens = np.memmap(path, np.uint8, mode="r")
            # Ids of two bytes, and what is compressed, have a zero byte soon.
            if 0 in tokens[:1_000_000]:
                raise ValueError("no plain text: unpack it, or save ids as .npy")
    except (OSError, ValueError, EOFError) as error:
        sys.exit(f"error: cannot read {name} as token ids: {error}")
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        sys.exit(f"error: {name} is {tokens.dtype} of shape {tokens.shape}, no row of token ids")
    if cfg.vocab_size > np.iinfo(tokens.dtype).max + 1:
        sys.exit(f"error: --vocab-size {cfg.vocab_size} is beyond the {tokens.dtype} of {name}")
    check_ids(tokens[:10_000_000])
    return tokens

def check_ids(ids):
    for value in (ids.max(initial=0), ids.min(initial=0)):
        if not 0 <= value < cfg.vocab_size:
            sys.exit(f"error: token id {value} in the data, beyond --vocab-size {cfg.vocab_size}")

def open_bin(path):
    # llm.c's and modded-nanogpt's begin with 256 int32: format, version, how many ids. nanoGPT's
    # are bare uint16.
    header = np.fromfile(path, np.int32, count=256)
    dtypes = {20240520: np.uint16, 20240801: np.uint32}
    if len(header) == 256 and header[0] in dtypes:
        return np.memmap(path, dtypes[header[0]], mode="r", offset=1024, shape=header[2])
    tokens = np.memmap(path, np.uint16, mode="r")
    low = tokens[:2000:2]
    high = tokens[1:2000:2]
    if high.max(initial=0) < 16 < low.max(initial=0):
        raise ValueError("ids wider than uint16: save them as .npy")
    return tokens

def stdlib_source():
    # Python's standard library without most tests and tables
    leave_out = {"site-packages", "dist-packages", "test", "tests", "encodings", "pydoc_data"}
    files = []
    for folder, subfolders, names in os.walk(Path(os.__file__).parent):
        # in place for os.walk
        subfolders[:] = set(subfolders) - leave_out
        files += [Path(folder, name) for name in names if name.endswith(".py")]
    files.sort()
    np.random.default_rng(0).shuffle(files)  # the last tenth is like the rest
    text = b"".join(f.read_bytes() for f in files)
    return np.frombuffer(text, np.uint8)

train_data = open_tokens(cfg.data)
if cfg.val_data:
    val_data = open_tokens(cfg.val_data)
else:
    cut = len(train_data) * 9 // 10
    val_data = train_data[cut:]
    train_data = train_data[:cut]
shorter = min(len(train_data), len(val_data))
if shorter <= cfg.seq_len:
    sys.exit(f"error: {shorter} tokens of data are too few for --seq-len {cfg.seq_len}")

def get_batch(tokens, offsets):
    # inputs and targets, both (B, T), of the windows that begin at `offsets` (B,)
    window = np.arange(cfg.seq_len + 1)
    indices = offsets[:, None] + window
    ids = tokens[indices]  # (B, T + 1)
    check_ids(ids)
    ids = ids.astype(np.int64)
    ids = torch.from_numpy(ids)
    if on_cuda:
        ids = ids.pin_memory()
    ids = ids.to(device, non_blocking=on_cuda)
    inputs = ids[:, :-1]
    targets = ids[:, 1:]
    return inputs, targets

def train_offsets(step):
    # The windows of a step, (batch_size,), of all processes. They depend on (seed, step) alone,
    # so that a resumed run sees the same.
    rng = np.random.default_rng((cfg.seed, step))
    count = len(train_data) - cfg.seq_len
    return rng.integers(count, size=cfg.batch_size)

# Validation is always of the same windows, evenly spread.
n_windows = max(cfg.eval_tokens // cfg.seq_len, 1)
max_windows = (len(val_data) - 1) // cfg.seq_len
n_windows = min(n_windows, max_windows)
last_offset = len(val_data) - 1 - cfg.seq_len
val_offsets = np.linspace(0, last_offset, n_windows, dtype=np.int64)
tokens_per_step = cfg.batch_size * cfg.seq_len

# A resumed run knows its data by sizes and checksums: of all ids, or of 10,000.
fingerprint = [len(train_data), len(val_data)]
for tokens in (train_data, val_data):
    if len(tokens) > 10_000_000:
        indices = np.random.default_rng(0).integers(len(tokens), size=10_000)
        tokens = tokens[np.sort(indices)]
    fingerprint.append(zlib.crc32(tokens.tobytes()))

# %%
# model
def rotary(x, cos, sin):
    # Rotary positions (Su et al., 2021): pairs of channels turn by angles that grow with position.
    a, b = x.chunk(2, dim=-1)  # (B, T, H, D / 2)
    turned_a = a * cos + b * sin
    turned_b = b * cos - a * sin
    return torch.cat((turned_a, turned_b), dim=-1)

def norm(x):
    # LayerNorm without weights: on a CPU one kernel, RMSNorm several
    return F.layer_norm(x, x.shape[-1:])

def zero(layer):
    nn.init.zeros_(layer.weight)
    return layer

class Block(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        C = cfg.n_embd
        self.n_head = cfg.n_head
        self.qkv = Linear(C, 3 * C, bias=False)
        self.attn_out = zero(Linear(C, C, bias=False))  # a block begins as the identity
        self.conv = nn.Parameter(torch.zeros(3, C))
        self.conv.lr_scale = 4.0  # it learns best at a higher rate
        self.up = Linear(C, 4 * C, bias=False)
        self.down = zero(Linear(4 * C, C, bias=False))

    def attention(self, x, cos, sin):
        B, T, C = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.n_head, -1)
        q, k, v = qkv.unbind(2)  # (B, T, H, D)
        if x.device.type == "cpu":
            v = v.float()  # a CPU is slow at attention in bfloat16
        # QK-norm (Dehghani et al., 2023) keeps training stable at a high learning rate.
        q = rotary(norm(q), cos, sin)
        k = rotary(norm(k), cos, sin)
        q = q.transpose(1, 2).to(v.dtype)  # (B, H, T, D)
        k = k.transpose(1, 2).to(v.dtype)
        v = v.transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        y = y.transpose(1, 2)
        y = y.reshape(B, T, C)
        return self.attn_out(y)

    def short_conv(self, x):
        # A Canon layer (Allen-Zhu, 2025): each token gets shares of the n tokens before it.
        n = len(self.conv)
        T = x.size(1)
        padded = F.pad(x, (0, 0, n, 0))  # (B, n + T, C)
        y = x
        for i in range(n):
            y = y + self.conv[i] * padded[:, i : i + T]
        return y

    def forward(self, x, cos, sin):
        x = x + self.attention(norm(x), cos, sin)
        h = self.up(self.short_conv(norm(x)))
        h = F.relu(h).square()  # squared ReLU (So et al., 2021)
        return x + self.down(h)

class GPT(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        C = cfg.n_embd
        assert C % (2 * cfg.n_head) == 0, "n_embd must be a multiple of twice n_head"
        self.embed = nn.Embedding(cfg.vocab_size, C)
        self.embed.weight.lr_scale = 4.0
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layer))
        self.head = zero(Linear(C, cfg.vocab_size, bias=False))  # the first loss is ln(V)
        D = C // cfg.n_head
        exponent = torch.arange(0, D, 2) / D
        frequency = 10000.0**-exponent  # (D / 2,)
        positions = torch.arange(cfg.seq_len)
        angle = torch.outer(positions, frequency)[:, None]  # (T, 1, D / 2)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def forward(self, ids, targets=None):
        T = ids.size(1)
        assert T <= len(self.cos), "more tokens than seq_len"
        x = norm(self.embed(ids))  # (B, T, C)
        for block in self.blocks:
            x = block(x, self.cos[:T], self.sin[:T])
        logits = self.head(norm(x)).float()  # (B, T, V)
        if targets is None:
            return logits
        logits = logits.flatten(0, 1)  # (B * T, V)
        targets = targets.flatten()
        # The mean, nats per token. A term of training alone: under `if self.training`.
        return F.cross_entropy(logits, targets)

torch.manual_seed(cfg.seed)
model = GPT(cfg).to(device)
if cfg.init_from and run.new:
    # Another number of heads would fit the weights' shapes.
    assert Config.load(cfg.init_from).n_head == cfg.n_head, "--init-from has another --n-head"
    path = Path(cfg.init_from).expanduser() / "checkpoint.pt"
    checkpoint = torch.load(path, "cpu", weights_only=False)
    model.load_state_dict(checkpoint["model"])

# %%
# optimizers
class Muon(torch.optim.Optimizer):
    # Muon (Jordan et al., 2024): a matrix moves along its momentum, made nearly orthogonal.
    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            beta = group["beta"]
            lr = group["lr"]
            params = [p for p in group["params"] if p.grad is not None]
            for p in params:
                if p not in self.state:
                    self.state[p]["momentum"] = torch.zeros_like(p)
                momentum = self.state[p]["momentum"]
                momentum.lerp_(p.grad, 1 - beta)
            # All matrices of one shape are orthogonalized as one batch.
            for shape in sorted({p.shape for p in params}):
                batch = [p for p in params if p.shape == shape]
                # Nesterov's momentum
                looks_ahead = [p.grad.lerp(self.state[p]["momentum"], beta) for p in batch]
                updates = orthogonal(torch.stack(looks_ahead))
                # An update gets an RMS of 0.2, about that of AdamW's (Liu et al., 2025).
                size = 0.2 * max(shape) ** 0.5
                for p, update in zip(batch, updates):
                    decay = lr * group["weight_decay"]
                    p.mul_(1 - decay)
                    p.add_(update, alpha=-lr * size)

def orthogonal(x):
    # Five steps of Newton-Schulz bring the singular values of each matrix of x, (n, rows,
    # columns), to about 1. The coefficients are Keller Jordan's.
    if x.size(1) > x.size(2):
        return orthogonal(x.mT).mT
    norms = x.norm(dim=(1, 2), keepdim=True)  # (n, 1, 1)
    x = (x / (norms + 1e-7)).to(matmul_dtype)
    for _ in range(5):
        gram = x @ x.mT  # (n, rows, rows)
        polynomial = -4.775 * gram + 2.0315 * gram @ gram
        x = 3.4445 * x + polynomial @ x
    return x.float()

# Muon takes the hidden matrices: the weights of each nn.Linear in a ModuleList or Sequential.
stacks = [m for m in model.modules() if isinstance(m, (nn.ModuleList, nn.Sequential))]
layers = [m for stack in stacks for m in stack.modules() if isinstance(m, nn.Linear)]
hidden = {layer.weight for layer in layers}
matrices = [p for p in model.parameters() if p in hidden]
rest = {}  # the others by their lr_scale, which a layer gives to weights of another rate
for p in model.parameters():
    if p not in hidden:
        scale = getattr(p, "lr_scale", 1.0)
        rest.setdefault(scale, []).append(p)

# Each group learns at its scale times lr_at(step). Scales and betas: the best of a few tried.
groups = [dict(params=params, scale=scale) for scale, params in rest.items()]
optimizers = []
if cfg.optimizer == "muon":
    print(f"Muon takes {len(matrices)} matrices, AdamW the rest")
    defaults = dict(lr=cfg.lr, weight_decay=cfg.weight_decay, beta=0.8)
    if matrices:
        optimizers.append(Muon(matrices, defaults))
else:
    assert cfg.optimizer == "adamw"
    groups.append(dict(params=matrices, scale=0.2, weight_decay=cfg.weight_decay))
if groups:
    adamw = torch.optim.AdamW(groups, cfg.lr, betas=(0.8, 0.95), weight_decay=0.0, fused=True)
    optimizers.append(adamw)

def lr_at(step):
    # warmup, stable, decay (Hu et al., 2024)
    up = (step + 1) / (cfg.warmup + 1)
    cooldown_steps = max(cfg.cooldown * cfg.steps, 1)
    down = (cfg.steps - step) / cooldown_steps
    return cfg.lr * min(up, 1, down)

# %%
# loop
train_model = model  # the same weights, compiled or in DDP for the training steps
if compiling:
    train_model = torch.compile(train_model, dynamic=False)
if run.world_size > 1:
    train_model = nn.parallel.DistributedDataParallel(train_model)

@torch.no_grad()
def evaluate():
    # Measures by new names, first the one that matters. The processes share the work.
    model.eval()
    total = torch.zeros((), device=device)
    for offsets in micro_batches(val_offsets):
        batch = get_batch(val_data, offsets)
        total += model(*batch) * len(offsets)
    return dict(val_loss=all_reduce(total) / len(val_offsets))

# All that is saved, by name. In a notebook this cell may run again.
assert cfg is run.cfg, "cfg was replaced: set cfg = run.cfg, rerun the cells since"
begun = run.resume(data=fingerprint, model=model, optimizers=optimizers)
for step in range(begun, cfg.steps + 1):
    row = dict(step=step, tokens=step * tokens_per_step, lr=lr_at(step))
    last = step == cfg.steps

    # The weights after `step` updates: measure and save them. After a signal it ends there.
    if run.stopping() or last or step % cfg.eval_every == 0:
        set_seed(cfg.seed, run.rank)
        run.save(row, evaluate())
    if last:
        run.log(row)
        break

    # One step: the loss and its gradient over the micro-batches, then the update.
    set_seed(cfg.seed, step, run.rank)
    model.train()
    model.zero_grad()
    train_loss = torch.zeros((), device=device)
    pieces = micro_batches(train_offsets(step))
    for i, offsets in enumerate(pieces):
        # Processes average their gradients after the last micro-batch.
        if run.world_size > 1:
            train_model.require_backward_grad_sync = i == len(pieces) - 1
        batch = get_batch(train_data, offsets)
        weight = len(offsets) * run.world_size / cfg.batch_size  # DDP divides by world_size
        loss = train_model(*batch) * weight
        loss.backward()
        train_loss += loss.detach()
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group.get("scale", 1.0) * row["lr"]
        optimizer.step()
    run.log(row, all_reduce(train_loss) / run.world_size)

# %%
# a sample: what the model writes
if run.rank == 0 and cfg.sample_tokens > 0:
    torch.manual_seed(cfg.seed)
    first = int(val_data[0])
    ids = torch.tensor([[first]], device=device)  # (1, T)
    for _ in range(cfg.sample_tokens):
        with torch.no_grad():
            window = ids[:, -cfg.seq_len :]
            logits = model(window)[0, -1]  # (V,)
        probabilities = F.softmax(logits / 0.9, dim=-1)
        next_id = torch.multinomial(probabilities, 1)
        ids = torch.cat((ids, next_id[None]), dim=1)
    sample = ids[0, 1:].tolist()
    if train_data.dtype == np.uint8 and not cfg.data.lower().endswith(".npy"):
        sample = bytes(sample).decode(errors="replace")
    sample = str(sample)
    run.write("sample.txt", sample.encode())
    # A terminal would obey control characters.
    shown = [c if c.isprintable() or c in "\n\t" else "?" for c in sample]
    print("".join(shown))

# %%
# the result
run.finish(
    tokens_per_second=row["tokens"] / run.seconds,
    parameters=sum(p.numel() for p in model.parameters()),
    device=device_name,
    dtype=dtype_name,
)

# %%
# the curves, in the notebook
if run.notebook:
    import pandas as pd

    metrics = pd.read_json(run.dir / "metrics.jsonl", lines=True)
    metrics = metrics.interpolate(limit_area="inside")
    metrics.plot("step", ["train_loss", *run.measures])
