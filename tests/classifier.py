# %% [markdown]
# # Another experiment: a classifier of points in the plane
# Shapes: B points, C channels, V classes.

# %%
# config: flags in the script; in the notebook edit the last line, as in Config(lr=1e-3)
from dataclasses import dataclass
from typing import Literal

from config import Record, open_run

@dataclass
class Config(Record):
    """Train a classifier of points on the arms of a spiral."""

    # data
    classes: int = 5  # arms of the spiral
    noise: float = 0.1  # spread of the points around their arm, in radii of the spiral
    train_points: int = 5000
    batch_size: int = 64  # points in a step, of all processes
    micro_batch_size: int = 0  # in a forward pass; 0: a process's share

    # model
    n_layer: int = 4  # hidden layers
    n_embd: int = 128  # width of the hidden layers

    # optimizer
    lr: float = 3e-3  # peak learning rate
    weight_decay: float = 0.01
    warmup: int = 0  # steps until lr's peak
    cooldown: float = 0.5  # final fraction of steps: lr falls to 0

    # machine
    seed: int = 1337  # of weights and batches
    device: str = "auto"  # cpu, cuda, cuda:1, mps; auto: the best
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of the matrix products
    compile: Literal["auto", "on", "off"] = "auto"  # auto: long runs on CUDA

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
# data: points in the plane, (N, 2), and the arm of the spiral that each belongs to, (N,)
# The cells below need train_data, val_data, get_batch, train_offsets, val_offsets, fingerprint.
def make_points(count, seed):
    rng = np.random.default_rng(seed)
    arm = rng.integers(cfg.classes, size=count)
    radius = rng.uniform(size=count)
    angle = 2 * np.pi * (arm / cfg.classes + radius)
    points = radius * np.stack((np.cos(angle), np.sin(angle)))  # (2, N)
    points += cfg.noise * radius * rng.standard_normal(points.shape)
    points = torch.from_numpy(points.T.astype(np.float32)).to(device)
    return points, torch.from_numpy(arm).to(device)

train_data = make_points(cfg.train_points, seed=1)
val_data = make_points(2000, seed=2)

def get_batch(data, places):
    # points, (B, 2), and their classes, (B,)
    points, arm = data
    return points[places], arm[places]

def train_offsets(step):
    # The points of a step, (batch_size,), of all processes together. They depend on (seed, step)
    # alone, so that a resumed run sees the same.
    rng = np.random.default_rng((cfg.seed, step))
    return rng.integers(cfg.train_points, size=cfg.batch_size)

val_offsets = np.arange(2000)

# How a resumed run knows its data.
fingerprint = zlib.crc32(train_data[0].cpu().numpy().tobytes())

# %%
# model
def norm(x):
    # LayerNorm without weights: on a CPU one kernel, RMSNorm several
    return F.layer_norm(x, x.shape[-1:])

class Classifier(nn.Module):
    def __init__(self, C):
        super().__init__()
        self.enter = Linear(2, C)
        self.blocks = nn.ModuleList(Linear(C, C) for _ in range(cfg.n_layer))
        self.head = Linear(C, cfg.classes)

    def forward(self, points, targets=None):
        x = self.enter(points).float()  # (B, C)
        for block in self.blocks:
            x = x + F.relu(block(norm(x))).square()
        logits = self.head(norm(x)).float()  # (B, V)
        if targets is None:
            return logits
        return F.cross_entropy(logits, targets)

torch.manual_seed(cfg.seed)
model = Classifier(cfg.n_embd).to(device)

# %%
# optimizers
adamw = torch.optim.AdamW(model.parameters(), weight_decay=cfg.weight_decay)
optimizers = [adamw]

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
    total = torch.zeros(2, device=device)
    for places in micro_batches(val_offsets):
        points, arm = get_batch(val_data, places)
        logits = model(points)
        total[0] += (logits.argmax(-1) == arm).sum()
        total[1] += F.cross_entropy(logits, arm, reduction="sum")
    accuracy, val_loss = all_reduce(total) / len(val_offsets)
    return dict(accuracy=accuracy, val_loss=val_loss)

# All that is saved, by name. In a notebook this cell may run again.
assert cfg is run.cfg, "cfg was replaced: set cfg = run.cfg, rerun the cells since"
begun = run.resume(data=fingerprint, model=model, optimizers=optimizers)
for step in range(begun, cfg.steps + 1):
    row = dict(step=step, points=step * cfg.batch_size, lr=lr_at(step))
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
# the result
run.finish(
    points_per_second=row["points"] / run.seconds,
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
