"""How fast train.py is on this machine. Run by hand, with nothing else running.

python tests/bench.py                            start-up, a step and its parts, memory
python tests/bench.py --data FILE --target 1.9   seconds to that validation loss, three seeds
python tests/bench.py --data FILE --nanogpt      the same, to the loss of nanoGPT's CPU recipe

Flags that it does not know go to train.py.
"""

import argparse
import json
import math
import os
import resource
import runpy
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.optim.optimizer import register_optimizer_step_pre_hook

ROOT = Path(__file__).parent.parent
TRAIN = str(ROOT / "train.py")
QUIET = ["--eval-every", "1000", "--sample-tokens", "0"]


def metrics(run_dir):
    lines = Path(run_dir, "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def run(command, **kwargs):
    command = [str(word) for word in command]
    return subprocess.run(command, stdout=subprocess.DEVNULL, check=True, **kwargs)


def start_up(folder, flags):
    """Seconds from the command to the loss of the first batch, wandb offline."""
    run_dir = Path(folder, "start")
    begin = time.perf_counter()
    command = [sys.executable, TRAIN, "--run-dir", str(run_dir)]
    command += ["--eval-tokens", "1", "--log-every", "1", *flags]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while not (run_dir / "metrics.jsonl").exists() or not metrics(run_dir):
        assert process.poll() is None, "train.py failed"
        time.sleep(0.01)
    seconds = time.perf_counter() - begin
    process.kill()
    process.wait()
    shutil.rmtree(run_dir)
    return seconds


def speed(folder, flags, processes=1):
    """Tokens per second in the loop, evaluations not counted; peak memory of a process in MB."""
    run_dir = Path(folder, f"speed{processes}")
    command = [sys.executable]
    environment = dict(os.environ)
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes]
        environment["OMP_NUM_THREADS"] = str(max(1, os.cpu_count() // processes))
    command += [TRAIN, "--run-dir", run_dir, "--steps", 50]
    run([*command, *QUIET, *flags], env=environment)
    rows = {row["step"]: row for row in metrics(run_dir)}
    tokens = rows[50]["tokens"] - rows[10]["tokens"]
    seconds = rows[50]["seconds"] - rows[10]["seconds"]
    memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    return tokens / seconds, memory


def split(folder, flags):
    """Median ms of a step of the real loop: (forward and backward, optimizers, all the rest).

    Also the variables of train.py, which runs in this process, with marks at its borders.
    """
    marks = []

    def mark(name):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        marks.append((name, time.perf_counter()))

    def before_forward(module, _):
        if type(module).__name__ == "GPT":
            mark("forward")

    backward = torch.Tensor.backward

    def timed_backward(self, *args, **kwargs):
        backward(self, *args, **kwargs)
        mark("backward")

    hooks = [
        register_module_forward_pre_hook(before_forward),
        register_optimizer_step_pre_hook(lambda *_: mark("optimizer")),
        register_optimizer_step_post_hook(lambda *_: mark("stepped")),
    ]
    torch.Tensor.backward = timed_backward
    sys.argv = ["train.py", "--run-dir", f"{folder}/split", "--steps", "41"]
    sys.argv += [*QUIET, "--eval-tokens", "1", "--compile", "off", *flags]
    sys.path.insert(0, str(ROOT))
    with open(os.devnull, "w") as sys.stdout:
        variables = runpy.run_path(TRAIN, run_name="__main__")
    sys.stdout = sys.__stdout__
    torch.Tensor.backward = backward
    for hook in hooks:
        hook.remove()

    # a step lasts from the end of its last optimizer to the next time
    ends = [i for i, (name, _) in enumerate(marks) if name == "stepped"]
    n = len(variables["optimizers"])
    ends = ends[n - 1 :: n]
    steps = []
    for before, after in zip(ends[10:], ends[11:]):
        parts = {"forward": 0.0, "optimizer": 0.0}
        for i in range(before, after):
            name, begin = marks[i]
            if name in parts:
                parts[name] += 1000 * (marks[i + 1][1] - begin)
        whole = 1000 * (marks[after][1] - marks[before][1])
        steps.append((parts["forward"], parts["optimizer"], whole - sum(parts.values())))
    return [statistics.median(column) for column in zip(*steps)], variables


def peak(device, dtype):
    """Floating-point operations per second of a large matrix product."""
    n = 8192 if device.type == "cuda" else 2048
    a, times = torch.randn(n, n, device=device, dtype=dtype), []
    for _ in range(12):
        if device.type == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return 2 * n**3 / min(times)


def table(folder, flags):
    starts = [start_up(folder, flags) for _ in range(5)]
    tokens_per_second, memory = speed(folder, flags)
    (passes, optimizer, rest), variables = split(folder, flags)
    cfg, device, dtype_name = (variables[name] for name in ("cfg", "device", "dtype_name"))
    # operations per token, forward and backward (Chowdhery et al., 2022)
    weights = sum(p.numel() for p in variables["matrices"]) + cfg.vocab_size * cfg.n_embd
    flops = 6 * weights + 12 * cfg.n_layer * cfg.n_embd * cfg.seq_len
    achieved, highest = tokens_per_second * flops, peak(device, getattr(torch, dtype_name))
    whole = passes + optimizer + rest

    def line(name, value, text):
        print(f"{name:22} {value:>9}  {text}")

    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    line("device", device.type, f"{where}, {dtype_name}, torch {torch.__version__}")
    start = statistics.median(starts)
    line("start-up, s", f"{start:.2f}", "command to first loss, wandb offline, median of 5")
    line("forward, backward, ms", f"{passes:.1f}", f"{passes / whole:.1%} of a step")
    line("optimizers, ms", f"{optimizer:.1f}", f"{optimizer / whole:.1%}")
    line("the rest, ms", f"{rest:.1f}", f"{rest / whole:.1%}")
    line("tokens per second", f"{tokens_per_second:.0f}", f"{cfg.batch_size} x {cfg.seq_len}")
    share = f"{achieved / highest:.0%} of a large {dtype_name} matrix product's {highest / 1e9:.0f}"
    line("GFLOP/s", f"{achieved / 1e9:.1f}", share)
    line("peak memory, MB", f"{memory:.0f}", "")
    if device.type == "cuda":
        line("the same, CUDA", f"{torch.cuda.max_memory_allocated() / 2**20:.0f}", "")
    elif os.cpu_count() > 1:
        both = speed(folder, flags, processes=2)[0]
        text = f"tokens per second on the same cores, {both / tokens_per_second:.2f} of one's"
        line("two processes", f"{both:.0f}", text)


def target(loss, flags):
    """Median seconds until the validation loss, over three seeds; None if one misses it."""
    print("seed  steps    tokens  seconds   final")
    results = []
    for seed in (1, 2, 3):
        with tempfile.TemporaryDirectory() as folder:
            run_dir = Path(folder, "run")
            command = [sys.executable, TRAIN, "--run-dir", run_dir, "--seed", seed]
            command += ["--wandb", "disabled", "--eval-every", 10, "--eval-tokens", 10**9]
            run([*command, "--sample-tokens", 0, *flags])
            rows = [row for row in metrics(run_dir) if "val_loss" in row]
        final = f"{rows[-1]['val_loss']:.4f}"
        reached = [row for row in rows if row["val_loss"] <= loss]
        if reached:
            step, tokens, seconds = (reached[0][name] for name in ("step", "tokens", "seconds"))
            results.append((step, tokens, seconds))
            print(f"{seed:4d}  {step:5d}  {tokens:8d}  {seconds:7.1f}  {final}", flush=True)
        else:
            print(f"{seed:4d}  not reached; {final} at the end", flush=True)
    if len(results) < 3:
        return None
    step, tokens, seconds = (statistics.median(column) for column in zip(*results))
    print(f"median {step:4d}  {tokens:8d}  {seconds:7.1f}")
    return seconds


class NanoNorm(nn.Module):
    def __init__(self, C):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(C))

    def forward(self, x):
        return F.layer_norm(x, self.weight.shape, self.weight)


class NanoBlock(nn.Module):
    def __init__(self, C, H, layers):
        super().__init__()
        self.H = H
        self.norm1, self.norm2 = NanoNorm(C), NanoNorm(C)
        self.qkv = nn.Linear(C, 3 * C, bias=False)
        self.out = nn.Linear(C, C, bias=False)
        self.up = nn.Linear(C, 4 * C, bias=False)
        self.down = nn.Linear(4 * C, C, bias=False)
        for linear in (self.qkv, self.up):
            nn.init.normal_(linear.weight, 0, 0.02)
        for linear in (self.out, self.down):
            nn.init.normal_(linear.weight, 0, 0.02 / (2 * layers) ** 0.5)

    def forward(self, x):
        B, T, C = x.shape
        heads = []
        for z in self.qkv(self.norm1(x)).split(C, dim=2):
            heads.append(z.view(B, T, self.H, C // self.H).transpose(1, 2))  # (B, H, T, D)
        y = F.scaled_dot_product_attention(*heads, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(B, T, C))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class NanoGPT(nn.Module):
    def __init__(self, V, T, C, H, layers):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(V, C), nn.Embedding(T, C)
        self.norm = NanoNorm(C)
        nn.init.normal_(self.tokens.weight, 0, 0.02)
        nn.init.normal_(self.positions.weight, 0, 0.02)
        self.blocks = nn.Sequential(*[NanoBlock(C, H, layers) for _ in range(layers)])

    def forward(self, windows):  # (B, T + 1): the mean cross-entropy
        inputs, targets = windows[:, :-1], windows[:, 1:]
        x = self.norm(self.blocks(self.tokens(inputs) + self.positions.weight))  # (B, T, C)
        logits = x @ self.tokens.weight.T  # (B, T, V)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def nanogpt(name):
    """Seconds of nanoGPT's recipe for a CPU on the text `name`, and its loss on the last tenth.

    Karpathy's README gives the flags; the operations are its own, in float32 and without
    evaluations: 12 x 64 characters, 4 layers, 4 heads, width 128, 2000 steps of AdamW.
    """
    B, T, steps = 12, 64, 2000
    text = Path(name).read_text()
    characters = sorted(set(text))
    ids = torch.tensor([characters.index(c) for c in text])
    cut = len(ids) * 9 // 10
    torch.manual_seed(1337)
    model = NanoGPT(len(characters), T, C=128, H=4, layers=4)
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim != 2]
    groups = [dict(params=matrices, weight_decay=0.1), dict(params=vectors, weight_decay=0.0)]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99))
    begin = time.perf_counter()
    for step in range(steps):
        cosine = 0.5 * (1 + math.cos(math.pi * (step - 100) / (steps - 100)))
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * step / 100 if step < 100 else 1e-4 + cosine * 9e-4
        starts = torch.randint(cut - T, (B,))
        loss = model(torch.stack([ids[i : i + T + 1] for i in starts]))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    seconds = time.perf_counter() - begin
    with torch.no_grad():
        losses = [model(window[None]).item() for window in ids[cut:].unfold(0, T + 1, T)]
    loss = statistics.mean(losses)
    count = sum(p.numel() for p in model.parameters())
    words = f"{count} parameters: {steps} steps, {seconds:.1f} s, {loss:.4f}"
    print(f"nanoGPT's recipe, float32, {words}", flush=True)
    return seconds, loss


if __name__ == "__main__":
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--target", type=float, help="a validation loss")
    parser.add_argument("--nanogpt", action="store_true", help="take nanoGPT's loss as target")
    arguments, flags = parser.parse_known_args()
    if arguments.nanogpt:
        if "--data" not in flags:
            parser.error("--nanogpt needs --data FILE")
        theirs, loss = nanogpt(flags[flags.index("--data") + 1])
        shape = ["--seq-len", "64", "--vocab-size", "128", "--steps", "85"]
        ours = target(loss, [*shape, *flags])
        print(f"{theirs / ours:.1f} times faster" if ours else "not reached by every seed")
    elif arguments.target:
        target(arguments.target, flags)
    else:
        with tempfile.TemporaryDirectory() as folder:
            os.environ["WANDB_DIR"] = folder
            table(folder, flags)
