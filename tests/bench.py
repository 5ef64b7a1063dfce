"""How fast train.py is on this machine. Run by hand, with nothing else running; flags it does not know go to train.py.

python tests/bench.py                                start-up, a step and its parts, memory: about two minutes
python tests/bench.py --data FILE --target 1.9       steps, tokens and seconds to that validation loss, over three seeds
python tests/bench.py --data FILE --nanogpt          the same to the loss of nanoGPT's recipe for a CPU, which is run first
"""

import argparse
import json
import math
import os
import resource
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

ROOT = Path(__file__).parent.parent
TRAIN = str(ROOT / "train.py")


def metrics(run_dir):
    return [json.loads(line) for line in Path(run_dir, "metrics.jsonl").read_text().splitlines()]


def start_up(folder, flags):
    """Seconds from the command to the loss of the first batch, wandb offline."""
    run_dir = Path(folder, "start")
    begin = time.perf_counter()
    command = [sys.executable, TRAIN, "--run-dir", run_dir, "--eval-tokens", "1", "--log-every", "1", *flags]
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL)
    while not (run_dir / "metrics.jsonl").exists() or not metrics(run_dir):
        assert process.poll() is None, "train.py failed"
        time.sleep(0.01)
    seconds = time.perf_counter() - begin
    process.kill()
    process.wait()
    subprocess.run(["rm", "-r", run_dir], check=True)
    return seconds


def speed(folder, flags, processes=1):
    """Tokens per second in the loop, evaluations and checkpoints not counted, and the peak memory of a process in MB."""
    run_dir, cores = Path(folder, f"speed{processes}"), os.cpu_count()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes, TRAIN]
    command = command if processes > 1 else [sys.executable, TRAIN]
    command += ["--run-dir", run_dir, "--steps", 50, "--eval-every", 1000, "--save-every", 1000, "--sample-tokens", 1, *flags]
    environ = os.environ | {"OMP_NUM_THREADS": str(max(1, cores // processes))} if processes > 1 else os.environ
    subprocess.run(list(map(str, command)), stdout=subprocess.DEVNULL, check=True, env=environ)
    rows = {row["step"]: row for row in metrics(run_dir)}
    memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    return (rows[50]["tokens"] - rows[10]["tokens"]) / (rows[50]["seconds"] - rows[10]["seconds"]), memory


def split(folder, flags):
    """Median ms of a step in the real loop: forward and backward, optimizers, all the rest; and the variables of train.py."""
    marks = []

    def mark(name):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        marks.append((name, time.perf_counter()))

    backward = torch.Tensor.backward

    def timed_backward(self, *args, **kwargs):
        backward(self, *args, **kwargs)
        mark("backward")

    hooks = [
        torch.nn.modules.module.register_module_forward_pre_hook(lambda module, _: mark("forward") if type(module).__name__ == "GPT" else None),
        register_optimizer_step_pre_hook(lambda *_: mark("optimizer")),
        register_optimizer_step_post_hook(lambda *_: mark("stepped")),
    ]
    torch.Tensor.backward = timed_backward
    sys.argv = ["train.py", "--run-dir", f"{folder}/split", "--steps", "41", "--eval-every", "1000", "--eval-tokens", "1",
                "--save-every", "1000", "--sample-tokens", "1", "--compile", "off", *flags]  # fmt: skip
    sys.path.insert(0, str(ROOT))
    with open(os.devnull, "w") as sys.stdout:
        variables = runpy.run_path(TRAIN, run_name="__main__")
    sys.stdout = sys.__stdout__
    torch.Tensor.backward = backward
    for hook in hooks:
        hook.remove()
    steps = []  # a step lasts from the end of the last optimizer to the next time
    ends = [i for i, (name, _) in enumerate(marks) if name == "stepped"][len(variables["optimizers"]) - 1 :: len(variables["optimizers"])]
    for before, after in zip(ends[10:], ends[11:]):
        parts = dict(forward=0.0, optimizer=0.0)
        for (name, begin), (_, end) in zip(marks[before:after], marks[before + 1 : after + 1]):
            if name in parts:
                parts[name] += 1000 * (end - begin)
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


def table(flags):
    with tempfile.TemporaryDirectory() as folder:
        os.environ["WANDB_DIR"] = folder
        starts = [start_up(folder, flags) for _ in range(5)]
        tokens_per_second, memory = speed(folder, flags)
        (passes, optimizer, rest), variables = split(folder, flags)
        cfg, device = variables["cfg"], variables["device"]
        weights = sum(p.numel() for p in variables["matrices"]) + cfg.vocab_size * cfg.n_embd
        flops = 6 * weights + 12 * cfg.n_layer * cfg.n_embd * cfg.seq_len  # per token, forward and backward (Chowdhery et al., 2022)
        highest = peak(device, getattr(torch, cfg.dtype))
        whole = passes + optimizer + rest
        print(f"start-up               {statistics.median(starts):8.2f} s   command to first loss, wandb offline, median of 5")
        print(f"forward and backward   {passes:8.1f} ms  {passes / whole:6.1%} of a step")
        print(f"optimizers             {optimizer:8.1f} ms  {optimizer / whole:6.1%}")
        print(f"the rest               {rest:8.1f} ms  {rest / whole:6.1%}")
        print(f"tokens per second      {tokens_per_second:8.0f}     {cfg.batch_size} x {cfg.seq_len} tokens a step")
        print(f"GFLOP/s                {tokens_per_second * flops / 1e9:8.1f}     {tokens_per_second * flops / highest:.0%} of a large "
              f"{cfg.dtype} matrix product's {highest / 1e9:.0f}" + (" (MFU)" if device.type == "cuda" else ""))  # fmt: skip
        print(f"peak memory            {memory:8.0f} MB")
        if device.type == "cuda":
            print(f"peak memory, CUDA      {torch.cuda.max_memory_allocated() / 2**20:8.0f} MB")
        elif os.cpu_count() > 1:
            both = speed(folder, flags, processes=2)[0]
            print(f"two processes          {both:8.0f}     tokens per second on the same cores, {both / tokens_per_second:.2f} of one process's")


def target(loss, flags):
    print("seed  steps    tokens  seconds   final")
    results = []
    for seed in (1, 2, 3):
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, TRAIN, "--run-dir", folder, "--seed", str(seed), "--wandb", "disabled", "--eval-every", "10",
                       "--eval-tokens", str(10**9), "--save-every", str(10**9), "--sample-tokens", "1", *flags]  # fmt: skip
            subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
            rows = [row for row in metrics(folder) if "val_loss" in row]
        reached = next((row for row in rows if row["val_loss"] <= loss), None)
        if reached:
            results.append((reached["step"], reached["tokens"], reached["seconds"]))
            print(f"{seed:4d}  {reached['step']:5d}  {reached['tokens']:8d}  {reached['seconds']:7.1f}  {rows[-1]['val_loss']:.4f}", flush=True)
        else:
            print(f"{seed:4d}  not reached; {rows[-1]['val_loss']:.4f} after {rows[-1]['seconds']:.1f} s", flush=True)
    if len(results) == 3:
        steps, tokens, seconds = (statistics.median(column) for column in zip(*results))
        print(f"median {steps:4d}  {tokens:8d}  {seconds:7.1f}")
        return seconds


def nanogpt(name):
    """Seconds of nanoGPT's recipe for a CPU on the text `name`, and its loss on the last tenth. Karpathy's README gives the flags; the
    operations are its own, in float32 and without evaluations: 12 x 64 characters, 4 layers, 4 heads, width 128, 2000 steps of AdamW."""
    B, T, C, H, layers, steps = 12, 64, 128, 4, 4, 2000
    text = Path(name).read_text()
    characters = sorted(set(text))
    ids = torch.tensor(list(map(characters.index, text)))
    cut, V = len(ids) * 9 // 10, len(characters)
    torch.manual_seed(1337)

    class Norm(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(C))

        def forward(self, x):
            return F.layer_norm(x, (C,), self.weight)

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm1, self.norm2 = Norm(), Norm()
            for part, inputs, outputs in (("qkv", C, 3 * C), ("out", C, C), ("up", C, 4 * C), ("down", 4 * C, C)):
                setattr(self, part, nn.Linear(inputs, outputs, bias=False))
                nn.init.normal_(getattr(self, part).weight, 0, 0.02 / (2 * layers) ** 0.5 if part in ("out", "down") else 0.02)

        def forward(self, x):
            q, k, v = (z.view(*z.shape[:2], H, C // H).transpose(1, 2) for z in self.qkv(self.norm1(x)).split(C, dim=2))
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, H, T, D)
            x = x + self.out(y.transpose(1, 2).reshape(x.shape))
            return x + self.down(F.gelu(self.up(self.norm2(x))))

    class NanoGPT(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens, self.positions, self.norm = nn.Embedding(V, C), nn.Embedding(T, C), Norm()
            nn.init.normal_(self.tokens.weight, 0, 0.02)
            nn.init.normal_(self.positions.weight, 0, 0.02)
            self.blocks = nn.Sequential(*(Block() for _ in range(layers)))

        def forward(self, windows):  # (B, T + 1): the mean cross-entropy
            x = self.norm(self.blocks(self.tokens(windows[:, :-1]) + self.positions.weight))
            return F.cross_entropy((x @ self.tokens.weight.T).flatten(0, 1), windows[:, 1:].flatten())

    model = NanoGPT()
    matrices, vectors = ([p for p in model.parameters() if (p.ndim == 2) is wanted] for wanted in (True, False))
    optimizer = torch.optim.AdamW([dict(params=matrices, weight_decay=0.1), dict(params=vectors, weight_decay=0.0)], betas=(0.9, 0.99))
    begin = time.perf_counter()
    for step in range(steps):
        cosine = 0.5 * (1 + math.cos(math.pi * (step - 100) / (steps - 100)))
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * step / 100 if step < 100 else 1e-4 + cosine * 9e-4
        loss = model(torch.stack([ids[i : i + T + 1] for i in torch.randint(cut - T, (B,))]))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    seconds = time.perf_counter() - begin
    with torch.no_grad():
        losses = [model(window[None]).item() for window in ids[cut:].unfold(0, T + 1, T)]
    count = sum(p.numel() for p in model.parameters())
    print(f"nanoGPT's recipe, {count} parameters: {steps} steps, {seconds:.1f} s, {statistics.mean(losses):.4f}", flush=True)
    return seconds, statistics.mean(losses)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=float, help="a validation loss")
    parser.add_argument("--nanogpt", action="store_true", help="take the loss of nanoGPT's recipe as the target")
    arguments, flags = parser.parse_known_args()
    if arguments.nanogpt:
        if "--data" not in flags:
            parser.error("--nanogpt needs --data FILE")
        theirs, loss = nanogpt(flags[flags.index("--data") + 1])
        ours = target(loss, ["--seq-len", "64", "--vocab-size", "128", "--steps", "85", *flags])
        print(f"{theirs / ours:.1f} times faster" if ours else "not reached by every seed")
    elif arguments.target:
        target(arguments.target, flags)
    else:
        table(flags)
