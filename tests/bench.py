"""How fast train.py is on this machine, with nothing else running: one table.

python tests/bench.py [--data FILE [--nanogpt]] [flags of train.py]

On CUDA also GPT-2's shape beside a model like nanoGPT's, and kill -9 and resume. --data: also
seconds to the loss of nanoGPT's CPU recipe; --nanogpt: that recipe is trained here first.
What fails says so in a line, the rest goes on, and the exit code is 1.
"""
import argparse
import json
import math
import os
import runpy
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
TRAIN = str(ROOT / "train.py")
sys.path.insert(0, str(ROOT))
import config  # before torch, as in train.py
import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import optimizer as hooks

# Operations a second in dense bfloat16, by the cards' data sheets.
PEAKS = {"NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H200": 989e12}
PEAKS |= {"NVIDIA A100-SXM4-40GB": 312e12, "NVIDIA A100-SXM4-80GB": 312e12}
# nanoGPT's recipe for a CPU, and its shape and tokens a step for GPT-2
RECIPE = dict(n_layer=4, n_head=4, n_embd=128, seq_len=64, batch_size=12, micro_batch_size=12)
GPT2 = dict(n_layer=12, n_head=12, n_embd=768, seq_len=1024, batch_size=480, micro_batch_size=32)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

def line(name, value, text=""):
    print(f"{name:22} {value:>9}  {text}"[:100], flush=True)

def as_flags(**fields):
    return [f"--{name}={value}" for name, value in fields.items()]

def warm(values):
    return float(np.median(values[len(values) // 4 :]))

def execute(*command):
    # A pipe would stay open as long as any worker of the compiler.
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.run([sys.executable, *command], stdout=output, stderr=output)
        output.seek(0)
        lines = output.read().splitlines()
    if process.returncode != 0:
        raise RuntimeError(lines[-1])
    return lines

def read_rows(run_dir):
    return pd.read_json(f"{run_dir}/metrics.jsonl", lines=True)

def inside(flags):
    marks = []  # which part begins when
    times, seconds = [], []  # of a step's begin; of training before it

    def mark(part):
        moment = time.time()
        if torch.cuda.is_initialized():
            # A GPU is behind its orders, so it takes the time itself.
            moment = torch.cuda.Event(enable_timing=True)
            moment.record()
        marks.append((part, moment))

    def begin_step(run):
        mark("forward+backward")
        seconds.append(run.seconds)
        times.append(time.time())
        return stopping(run)

    stopping = config.Run.stopping
    config.Run.stopping = begin_step
    hooks.register_optimizer_step_pre_hook(lambda *_: mark("optimizers"))
    hooks.register_optimizer_step_post_hook(lambda *_: mark("rest"))
    sys.argv = [TRAIN, *flags]
    page = runpy.run_path(TRAIN, run_name="__main__")
    seen = dict(first=times[1], seconds=warm(np.diff(seconds)), tokens=page["tokens_per_step"])
    seen["memory"] = torch.cuda.max_memory_allocated()
    parts, moments = zip(*marks)
    if page["on_cuda"]:
        moments = [moments[0].elapsed_time(moment) for moment in moments]
    lasted = pd.Series(np.diff(moments), parts[:-1])[len(parts) // 4 :]
    seen["shares"] = (lasted.groupby(level=0).sum() / lasted.sum()).to_dict()
    return page["run"].meta | seen | products(page)

def products(page):
    """A step's products with weights, as plain torch products of the same shapes."""
    cfg = page["cfg"]
    tokens = (cfg.micro_batch_size or cfg.batch_size) * cfg.seq_len
    seconds, weights = 0, 0
    for layer in page["model"].modules():
        if isinstance(layer, nn.Linear):
            weight = layer.weight.detach().to(page["matmul_dtype"])
            x = torch.randn_like(weight[:1].expand(tokens, -1))
            times = [time.time()]
            for _ in range(8):
                (x @ weight.T)[0, 0].item()  # waits for the GPU
                times.append(time.time())
            # The backward pass has two products of as many operations.
            seconds += 3 * warm(np.diff(times))
            weights += weight.numel()
    # Attention has 12 for each layer, channel and position (Chowdhery et al., 2022).
    flops = 6 * weights + 12 * cfg.n_layer * cfg.n_embd * cfg.seq_len
    seconds *= page["tokens_per_step"] / tokens
    return dict(product_seconds=seconds, flops_per_token=flops)

class NanoBlock(nn.Module):
    def __init__(self, C, n_head):
        super().__init__()
        self.n_head = n_head
        self.norm1 = nn.LayerNorm(C, bias=False)
        self.norm2 = nn.LayerNorm(C, bias=False)
        self.qkv = nn.Linear(C, 3 * C, bias=False)
        self.out = nn.Linear(C, C, bias=False)
        self.up = nn.Linear(C, 4 * C, bias=False)
        self.down = nn.Linear(4 * C, C, bias=False)

    def forward(self, x):
        B, T, C = x.shape
        qkv = self.qkv(self.norm1(x)).view(B, T, 3, self.n_head, -1)
        q, k, v = qkv.transpose(1, 3).unbind(2)  # (B, H, T, D)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(B, T, C))
        return x + self.down(F.gelu(self.up(self.norm2(x))))

class NanoGPT(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        C = cfg.n_embd
        self.tokens = nn.Embedding(cfg.vocab_size, C)
        self.positions = nn.Embedding(cfg.seq_len, C)
        self.blocks = nn.Sequential(*[NanoBlock(C, cfg.n_head) for _ in range(cfg.n_layer)])
        self.norm = nn.LayerNorm(C, bias=False)
        for name, p in self.named_parameters():
            if name.endswith(("out.weight", "down.weight")):
                # What is added to the residual stream is smaller in a deeper model.
                nn.init.normal_(p, 0, 0.02 / (2 * cfg.n_layer) ** 0.5)
            elif p.ndim == 2:
                nn.init.normal_(p, 0, 0.02)

    def forward(self, windows):  # (B, T + 1)
        x = self.tokens(windows[:, :-1]) + self.positions.weight  # (B, T, C)
        x = self.norm(self.blocks(x))
        logits = F.linear(x, self.tokens.weight)  # (B, T, V); the embedding is the head
        return F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())

def train_nanogpt(ids, steps, device="cpu", **shape):
    """By the flags of its README for a CPU: the model, and the seconds of each step."""
    cfg = SimpleNamespace(**shape)
    on_cuda = device == "cuda"
    torch.manual_seed(1337)
    model = NanoGPT(cfg).to(device)
    train_model = torch.compile(model) if on_cuda else model
    matrices = [p for p in model.parameters() if p.ndim == 2]
    norms = [p for p in model.parameters() if p.ndim == 1]
    groups = [dict(params=matrices, weight_decay=0.1), dict(params=norms, weight_decay=0.0)]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), fused=on_cuda)
    micro_steps = cfg.batch_size // cfg.micro_batch_size
    times = [time.time()]
    for step in range(steps):
        # The rate rises to 1e-3 in 100 steps, and falls to 1e-4 along half a cosine.
        done = max(step - 100, 0) / (steps - 100)
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(step / 100, 0.55 + 0.45 * math.cos(math.pi * done))
        for _ in range(micro_steps):
            offsets = torch.randint(len(ids) - cfg.seq_len, (cfg.micro_batch_size, 1))
            windows = ids[offsets + torch.arange(cfg.seq_len + 1)]  # (B, T + 1)
            if on_cuda:
                windows = windows.pin_memory().to(device, non_blocking=True)
            with torch.autocast("cuda", torch.bfloat16, enabled=on_cuda):
                loss = train_model(windows) / micro_steps
            loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()  # waits for the GPU
        times.append(time.time())
    return model, np.diff(times)

def speed(bench, name="", **fields):
    folder = tempfile.mkdtemp(dir=bench.folder)
    fields |= dict(log_every=1, eval_every=1000, sample_tokens=0, run_dir=folder)
    begin = time.time()
    lines = execute(__file__, "inside", "--steps=40", *bench.flags, *as_flags(**fields))
    answers = [text for text in lines if text.startswith("{")]
    seen = SimpleNamespace(**json.loads(answers[-1]))
    bench.flops_per_token = seen.flops_per_token
    line(f"{name}device", seen.device, f"{seen.dtype}, compile {seen.compile}")
    speed_lines(bench, name, seen.first - begin, seen.tokens / seen.seconds, seen.memory)
    shares = [f"{part} {share:.1%}" for part, share in seen.shares.items()]
    line(f"{name}step, ms", f"{1000 * seen.seconds:.1f}", ", ".join(shares))
    share = seen.product_seconds / seen.seconds
    line(f"{name}products", f"{share:.1%}", "of a step: its products with weights, alone")

def speed_lines(bench, name, first, speed, memory):
    line(f"{name}first loss, s", f"{first:.1f}", "compiling counted (of nanoGPT the imports not)")
    line(f"{name}tokens/s", f"{speed:.0f}", "of training, the median of warm steps")
    if DEVICE == "cuda":
        card = torch.cuda.get_device_name()
        mfu = speed * bench.flops_per_token / PEAKS.get(card, math.nan)
        line(f"{name}MFU", f"{mfu:.1%}", f"of {card}'s peak; {memory / 1e9:.1f} GB at most")

def nanogpt_step(bench):
    _, seconds = train_nanogpt(torch.arange(65), steps=40, vocab_size=65, **RECIPE)
    line("nanoGPT's step, ms", f"{1000 * warm(seconds):.1f}", "of its CPU recipe, float32")

def gpt2(bench):
    path = f"{bench.folder}/ids.bin"
    np.random.default_rng(0).integers(50304, size=5_000_000, dtype=np.uint16).tofile(path)
    # There is nothing to learn in random ids: the rate has only to be harmless.
    fields = dict(data=path, vocab_size=50304, steps=10, lr=1e-3, eval_tokens=8192, compile="on")
    speed(bench, "GPT-2 ", device=DEVICE, **fields, **GPT2)

def gpt2_nanogpt(bench):
    ids = torch.randint(50304, (5_000_000,))
    _, seconds = train_nanogpt(ids, steps=10, device=DEVICE, vocab_size=50304, **GPT2)
    speed = GPT2["batch_size"] * GPT2["seq_len"] / warm(seconds)
    speed_lines(bench, "nanoGPT ", seconds[0], speed, torch.cuda.max_memory_allocated())

def resume(bench):
    fields = dict(steps=200, log_every=1, eval_every=50, sample_tokens=0, wandb="disabled")
    command = [TRAIN, *bench.flags, *as_flags(**fields, device=DEVICE), "--run_dir"]
    whole, killed = f"{bench.folder}/whole", f"{bench.folder}/killed"
    execute(*command, whole)
    output = subprocess.DEVNULL
    process = subprocess.Popen([sys.executable, *command, killed], stdout=output, stderr=output)
    path = Path(killed, "metrics.jsonl")
    while process.poll() is None:
        time.sleep(0.01)
        if path.exists() and path.read_text().count("\n") > 120:
            process.kill()
    execute(*command, killed)
    begun = json.loads(Path(killed, "meta.json").read_text())["start"]
    off = (read_rows(whole).train_loss - read_rows(killed).train_loss).abs()
    text = f"greatest difference of a loss to a whole run's; {off[:begun].max():.2g} before it"
    line(f"kill -9, resume at {begun}", f"{off[begun:].max():.2g}", text)

def recipe_loss(bench):
    loss, theirs = 1.9044, math.nan  # that of tiny Shakespeare, as --nanogpt measures it
    if bench.nanogpt:
        characters, ids = np.unique(np.fromfile(bench.data, np.uint8), return_inverse=True)
        ids = torch.from_numpy(ids)
        cut = len(ids) * 9 // 10
        model, seconds = train_nanogpt(ids[:cut], 2000, vocab_size=len(characters), **RECIPE)
        theirs = seconds.sum()
        windows = ids[cut:].unfold(0, 65, 64)  # (B, T + 1)
        with torch.no_grad():
            loss = model(windows).item()
        line("nanoGPT's recipe, s", f"{theirs:.1f}", f"2000 steps, validation loss {loss:.4f}")
    fields = dict(batch_size=28, vocab_size=128, steps=54, lr=2.5e-2, cooldown=0.75, device="cpu")
    fields |= dict(seq_len=64, eval_every=10, eval_tokens=10**9, sample_tokens=0, wandb="disabled")
    reached = []
    for seed in (1, 2, 3):
        folder = f"{bench.folder}/{seed}"
        fields |= dict(seed=seed, run_dir=folder)
        execute(TRAIN, *as_flags(**fields), *bench.flags)
        rows = read_rows(folder)
        reached.append(rows.seconds[rows.val_loss <= loss].min())
        text = f"of training to {loss:.4f} (nan: never); at best {rows.val_loss.min():.4f}"
        line(f"ours, seed {seed}, s", f"{reached[-1]:.1f}", text)
    ours = np.median(reached)
    line("ours, median, s", f"{ours:.1f}", f"nanoGPT's takes {theirs / ours:.1f} times as long")

def main():
    parser = argparse.ArgumentParser(usage=__doc__, allow_abbrev=False)
    parser.add_argument("--data", help="a text")
    parser.add_argument("--nanogpt", action="store_true")
    bench, bench.flags = parser.parse_known_args()
    failed = False
    parts = [speed, nanogpt_step]
    if DEVICE == "cuda":
        parts += [resume, gpt2, gpt2_nanogpt]
    if bench.data:
        bench.flags.append(f"--data={bench.data}")
        parts.append(recipe_loss)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as bench.folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{bench.folder}/compiled"  # as on the first day
        os.environ["WANDB_DIR"] = bench.folder
        for part in parts:
            try:
                part(bench)
            except Exception as error:
                failed = True
                line(part.__name__, "failed:", str(error).splitlines()[-1])
    sys.exit(failed)

if __name__ == "__main__":
    if sys.argv[1:2] == ["inside"]:
        print(json.dumps(inside(sys.argv[2:])))
    else:
        main()
