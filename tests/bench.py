"""How fast train.py is on this machine. Run by hand, with nothing else running.

python tests/bench.py                            start-up, a step and its parts, memory;
                                                 with a CUDA GPU also a GPT-2 sized run beside
                                                 a model like nanoGPT's, Muon, kill -9 and resume
python tests/bench.py --only muon,resume         some parts of the table, see --help
python tests/bench.py --tiny                     every part, the GPU's too, in a tiny shape on any
                                                 device, which tries this script and no more
python tests/bench.py --data FILE --target 1.9   seconds to that validation loss, three seeds
python tests/bench.py --data FILE --nanogpt      the same, to the loss of nanoGPT's CPU recipe

Flags that it does not know go to train.py. A part of the table that fails says so in one line, the
others go on, and the exit code is then 1.
"""

import argparse
import contextlib
import itertools
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
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

ROOT = Path(__file__).parent.parent
TRAIN = str(ROOT / "train.py")
sys.path.insert(0, str(ROOT))
from config import Config

# GPT-2's small shape. A step has 480 x 1024 tokens, as in nanoGPT's config for it.
GPT2 = "--n-layer 12 --n-head 12 --n-embd 768 --seq-len 1024 --vocab-size 50304 --batch-size 480"
TINY = "--n-layer 2 --n-head 2 --n-embd 64 --seq-len 64 --vocab-size 512 --batch-size 16"
# One evaluation before the first step, one after the last.
QUIET = ["--eval-every", "1000", "--sample-tokens", "0"]
# Seconds after which a part of the GPU's is given up.
LIMIT = 200


# --- the table


def line(name, value, text=""):
    print(f"{name:24} {value:>9}  {text}"[:100], flush=True)


def megabytes(value):
    # Memory is measured where CUDA counts it.
    if value == 0:
        return "n/a"
    return f"{value:.0f}"


class Failed(Exception):
    """A process that failed; its text is what it wrote to standard error."""


def last_line(error):
    """The one line of an error that says most, without the rank that torch puts before it."""
    if not isinstance(error, Failed):
        return f"{type(error).__name__}: {error}".splitlines()[0]
    lines = [text.strip() for text in str(error).splitlines() if text.strip()]
    # torchrun ends with a summary of its own; the cause is further up.
    causes = []
    for text in lines:
        warning = text.startswith("[rank") and "]:[" in text
        if text.startswith(("error:", "[rank")) and not warning:
            causes.append(text.split("]: ")[-1])
    if causes:
        return causes[-1]
    if lines:
        return lines[-1]
    return "it wrote nothing"


# --- processes


def read_rows(run_dir):
    """The rows of metrics.jsonl, without one that is only half written."""
    path = Path(run_dir, "metrics.jsonl")
    if not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    return [json.loads(text) for text in lines if text.endswith("\n")]


def run(command, limit=None, **kwargs):
    """The standard output of a command that ends well within `limit` seconds."""
    # These are files, as a pipe stays open as long as any of the compiler's workers.
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(command, stdout=out, stderr=err, **kwargs)
        try:
            process.wait(limit)
        except subprocess.TimeoutExpired:
            raise Failed(f"it did not end in {limit} seconds")
        finally:
            stop(process)
        out.seek(0)
        err.seek(0)
        if process.returncode != 0:
            raise Failed(err.read() or f"exit code {process.returncode}")
        return out.read()


def stop(process):
    if process.poll() is not None:
        return
    # torchrun ends its processes when it is asked to, and leaves them behind when it is killed.
    process.terminate()
    try:
        process.wait(60)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def kill_after(step, command, run_dir):
    """Seconds from a command to its row of `step`; there it is killed, as by kill -9."""
    begin = time.perf_counter()
    with tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=err)
        try:
            seen = -1
            while seen < step:
                if process.poll() is not None:
                    err.seek(0)
                    raise Failed(err.read())
                if time.perf_counter() - begin > LIMIT:
                    raise Failed(f"no step {step} in {LIMIT} seconds")
                time.sleep(0.01)
                rows = read_rows(run_dir)
                if rows:
                    seen = rows[-1]["step"]
            return time.perf_counter() - begin
        finally:
            process.kill()
            process.wait()


def call(child, flags, limit=None):
    """What a function of CHILDREN answers. It has a process, and a GPU's memory, of its own."""
    out = run([sys.executable, __file__, "--child", child, *flags], limit)
    return json.loads(out.splitlines()[-1])


def train(bench, flags, limit=None):
    """One run of train.py: its rows, and what child_train answers."""
    run_dir = tempfile.mkdtemp(dir=bench.folder)
    try:
        answer = call("train", [*flags, "--run-dir", run_dir], limit)
        return read_rows(run_dir), answer
    finally:
        shutil.rmtree(run_dir)  # A checkpoint of GPT-2's shape has gigabytes.


def train_two(bench, flags, limit=None):
    """The rows of one run of train.py in two processes, which share the cores."""
    run_dir = tempfile.mkdtemp(dir=bench.folder)
    threads = max(1, os.cpu_count() // 2)
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", TRAIN, *flags, "--run-dir", run_dir]
    run(command, limit, env=environment)
    return read_rows(run_dir)


def largest_that_fits(measure, sizes):
    """The first of some micro-batch sizes that the memory has room for, and its measurement."""
    for size in sizes:
        try:
            return size, measure(["--micro-batch-size", str(size)])
        except Failed as error:
            text = str(error).lower()
            # cuBLAS has a code of its own for it.
            if "out of memory" not in text and "alloc_failed" not in text:
                raise
    raise Failed(f"CUDA out of memory with every micro-batch of {sizes}")


# --- children: functions that run in a process of their own, and answer with a dict


def run_train(flags):
    """The variables of train.py after it ran in this process."""
    sys.argv = ["train.py", *flags]
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        return runpy.run_path(TRAIN, run_name="__main__")


def synchronize():
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def cuda_peak():
    """The most memory that tensors had at one time, in MB; 0 where there is no CUDA."""
    if not torch.cuda.is_initialized():
        return 0
    return torch.cuda.max_memory_allocated() / 2**20


def flops_per_token(weights, cfg):
    # Operations of forward and backward (Chowdhery et al., 2022): 6 for each weight of a matrix
    # product, and 12 for each layer, channel and position of attention.
    return 6 * weights + 12 * cfg.n_layer * cfg.n_embd * cfg.seq_len


def product_rate(device, dtype):
    """Operations per second of a large matrix product, (n, n) by (n, n), the best of 20."""
    n = 8192 if device.type == "cuda" else 2048
    a = torch.randn(n, n, device=device, dtype=dtype)
    times = []
    for _ in range(20):
        synchronize()
        begin = time.perf_counter()
        a @ a
        synchronize()
        times.append(time.perf_counter() - begin)
    return 2 * n**3 / min(times)


def child_machine(flags):
    """The device and dtype that train.py takes here, and how fast a large product is there."""
    variables = run_train(flags)
    device = variables["device"]
    card = "CPU"
    if device.type == "cuda":
        card = torch.cuda.get_device_name(device)
    return dict(
        device=str(device),
        dtype=variables["dtype_name"],
        card=card,
        product=product_rate(device, variables["dtype"]),
    )


def child_train(flags):
    """A run of train.py, with the most memory in MB of training and of evaluation."""
    peaks = {"training": 0, "evaluation": 0}
    set_mode = nn.Module.train

    def set_mode_and_measure(self, mode=True):
        # train.py calls model.eval() where an evaluation begins, which is model.train(False), and
        # model.train() where it has ended.
        ended = "evaluation" if mode else "training"
        peaks[ended] = max(peaks[ended], cuda_peak())
        if torch.cuda.is_initialized():
            torch.cuda.reset_peak_memory_stats()
        return set_mode(self, mode)

    nn.Module.train = set_mode_and_measure
    variables = run_train(flags)
    cfg = variables["cfg"]
    weights = sum(p.numel() for p in variables["matrices"])
    weights += cfg.vocab_size * cfg.n_embd  # the head
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return peaks | dict(flops=flops_per_token(weights, cfg), host=usage.ru_maxrss / 1024)


def timed_steps(flags, passes):
    """The seconds of each step of train.py by part, and its variables.

    A part lasts from the mark of its name to the next mark. With `passes` forward and backward
    are a part of their own; that is not for a compiled model, which hooks would change.
    """
    marks = []
    hooks = []

    def mark(name):
        synchronize()
        marks.append((name, time.perf_counter()))

    def before_forward(module, inputs):
        if type(module).__name__ == "GPT":
            mark("passes")

    def before_step(optimizer, *arguments):
        mark(type(optimizer).__name__)

    def after_step(optimizer, *arguments):
        mark(f"after {type(optimizer).__name__}")

    backward = torch.Tensor.backward

    def marked_backward(self, *args, **kwargs):
        backward(self, *args, **kwargs)
        mark("after passes")

    hooks.append(register_optimizer_step_pre_hook(before_step))
    hooks.append(register_optimizer_step_post_hook(after_step))
    if passes:
        hooks.append(register_module_forward_pre_hook(before_forward))
        torch.Tensor.backward = marked_backward
    variables = run_train(flags)
    torch.Tensor.backward = backward
    for hook in hooks:
        hook.remove()

    # The mark after the last optimizer begins the last part of a step.
    last_optimizer = variables["optimizers"][-1]
    last = f"after {type(last_optimizer).__name__}"
    steps = []
    parts = {}
    for (name, begin), (_, end) in itertools.pairwise(marks):
        parts[name] = parts.get(name, 0.0) + end - begin
        if name == last:
            steps.append(parts)
            parts = {}
    return steps, variables


def child_split(flags):
    """Median milliseconds in a step of the passes, of the optimizers, and of all else."""
    steps, variables = timed_steps(flags, passes=True)
    optimizers = [type(optimizer).__name__ for optimizer in variables["optimizers"]]
    columns = {"passes": [], "optimizers": [], "rest": []}
    for parts in steps[10:]:
        passes = parts["passes"]
        optimizing = sum(parts[name] for name in optimizers)
        rest = sum(parts.values()) - passes - optimizing
        columns["passes"].append(1000 * passes)
        columns["optimizers"].append(1000 * optimizing)
        columns["rest"].append(1000 * rest)
    answer = {}
    for name, column in columns.items():
        answer[name] = statistics.median(column)
    return answer


def child_muon(flags):
    """Muon's milliseconds in a step, and of Muon alone, batched and one matrix at a time."""
    steps, variables = timed_steps(flags, passes=False)
    in_step = statistics.median(parts["Muon"] for parts in steps[4:])
    whole = statistics.median(sum(parts.values()) for parts in steps[4:])

    # Muon batches the matrices of one group, so a group for each matrix takes them one by one.
    batched = variables["muon"]
    groups = []
    for p in variables["matrices"]:
        p.grad = torch.randn_like(p)
        groups.append(dict(params=[p]))
    single = variables["Muon"](groups, batched.defaults)
    return dict(
        in_step=1000 * in_step,
        whole=1000 * whole,
        batched=median_step_ms(batched),
        single=median_step_ms(single),
        matrices=len(groups),
    )


def median_step_ms(optimizer):
    times = []
    for _ in range(13):
        synchronize()
        begin = time.perf_counter()
        optimizer.step()
        synchronize()
        times.append(1000 * (time.perf_counter() - begin))
    return statistics.median(times[3:])


# --- a model like nanoGPT's, to compare with


class NanoNorm(nn.Module):
    """LayerNorm with a weight and without a bias."""

    def __init__(self, C):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(C))

    def forward(self, x):
        return F.layer_norm(x, self.weight.shape, self.weight)


class NanoBlock(nn.Module):
    def __init__(self, C, H, layers):
        super().__init__()
        self.H = H
        self.norm1 = NanoNorm(C)
        self.norm2 = NanoNorm(C)
        self.qkv = nn.Linear(C, 3 * C, bias=False)
        self.out = nn.Linear(C, C, bias=False)
        self.up = nn.Linear(C, 4 * C, bias=False)
        self.down = nn.Linear(4 * C, C, bias=False)
        # GPT-2's deviations. What is added to the residual stream is smaller in a deeper model.
        small = 0.02 / (2 * layers) ** 0.5
        nn.init.normal_(self.qkv.weight, 0, 0.02)
        nn.init.normal_(self.up.weight, 0, 0.02)
        nn.init.normal_(self.out.weight, 0, small)
        nn.init.normal_(self.down.weight, 0, small)

    def heads(self, x):
        B, T, C = x.shape
        return x.view(B, T, self.H, C // self.H).transpose(1, 2)  # (B, H, T, D)

    def forward(self, x):
        B, T, C = x.shape
        q, k, v = self.qkv(self.norm1(x)).split(C, dim=2)  # (B, T, C)
        q = self.heads(q)
        k = self.heads(k)
        v = self.heads(v)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(B, T, C))
        h = F.gelu(self.up(self.norm2(x)))
        return x + self.down(h)


class NanoGPT(nn.Module):
    def __init__(self, V, T, C, H, layers):
        super().__init__()
        self.tokens = nn.Embedding(V, C)
        self.positions = nn.Embedding(T, C)
        self.blocks = nn.Sequential(*[NanoBlock(C, H, layers) for _ in range(layers)])
        self.norm = NanoNorm(C)
        nn.init.normal_(self.tokens.weight, 0, 0.02)
        nn.init.normal_(self.positions.weight, 0, 0.02)

    def forward(self, windows):
        # the mean cross-entropy of windows, (B, T + 1)
        inputs = windows[:, :-1]
        targets = windows[:, 1:]
        x = self.tokens(inputs) + self.positions.weight  # (B, T, C)
        x = self.norm(self.blocks(x))
        logits = F.linear(x, self.tokens.weight)  # (B, T, V); the embedding is the head
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def nano_groups(model):
    """AdamW's groups: weight decay for matrices and embeddings, none for the norms."""
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim != 2]
    return [
        dict(params=matrices, weight_decay=0.1),
        dict(params=vectors, weight_decay=0.0),
    ]


def child_nano(flags):
    """Training steps of the model like nanoGPT's, by the flags of train.py: the seconds of each.

    float32 weights under autocast, fused AdamW, gradients summed over micro-batches and clipped.
    """
    cfg = tyro.cli(Config, args=flags)
    device = torch.device(cfg.device)
    dtype = getattr(torch, cfg.dtype)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(cfg.seed)
    model = NanoGPT(cfg.vocab_size, cfg.seq_len, cfg.n_embd, cfg.n_head, cfg.n_layer).to(device)
    optimizer = torch.optim.AdamW(nano_groups(model), lr=6e-4, betas=(0.9, 0.95), fused=True)
    train_model = torch.compile(model)
    # The compiler itself starts before the clock does, as in train.py.
    torch.compile(torch.neg)(torch.ones(1, device=device))

    ids = np.load(cfg.data, mmap_mode="r")
    rng = np.random.default_rng(cfg.seed)
    micro_steps = cfg.batch_size // cfg.micro_batch_size
    seconds = []
    for _ in range(cfg.steps):
        begin = time.perf_counter()
        for _ in range(micro_steps):
            offsets = rng.integers(len(ids) - cfg.seq_len, size=cfg.micro_batch_size)
            windows = ids[offsets[:, None] + np.arange(cfg.seq_len + 1)]  # (B, T + 1)
            windows = torch.from_numpy(windows.astype(np.int64))
            if device.type == "cuda":
                windows = windows.pin_memory()
            windows = windows.to(device, non_blocking=True)
            with torch.autocast(device.type, dtype, enabled=cfg.dtype == "bfloat16"):
                loss = train_model(windows) / micro_steps
            loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        synchronize()
        seconds.append(time.perf_counter() - begin)
    weights = sum(p.numel() for name, p in model.named_parameters() if name != "positions.weight")
    return dict(seconds=seconds, training=cuda_peak(), flops=flops_per_token(weights, cfg))


CHILDREN = {
    "machine": child_machine,
    "train": child_train,
    "split": child_split,
    "muon": child_muon,
    "nano": child_nano,
}


# --- parts of the table. Each takes the same `bench`, see table() below


def machine(bench):
    flags = [*bench.small, *QUIET, *bench.flags]
    flags += ["--steps", "1", "--eval-tokens", "1", "--compile", "off", "--wandb", "disabled"]
    run_dir = tempfile.mkdtemp(dir=bench.folder)
    answer = call("machine", [*flags, "--run-dir", run_dir])
    bench.device = answer["device"]
    bench.dtype = answer["dtype"]
    bench.card = answer["card"]
    bench.product = answer["product"]
    line("device", bench.device, f"{bench.card}, {bench.dtype}, torch {torch.__version__}")
    rate = f"{bench.product / 1e9:.0f}"
    line("large product, GFLOP/s", rate, f"matrices of {bench.dtype}, the best of 20")


def start_up(bench):
    """Seconds from the command to the loss of the first batch."""
    times = []
    for _ in range(5):
        run_dir = tempfile.mkdtemp(dir=bench.folder)
        command = [sys.executable, TRAIN, *bench.small]
        command += ["--eval-tokens", "1", "--log-every", "1", "--wandb", "offline"]
        command += [*bench.flags, "--run-dir", run_dir]
        times.append(kill_after(0, command, run_dir))
    text = f"command to first loss, wandb offline; median of 5, first {times[0]:.2f}"
    line("start-up, s", f"{statistics.median(times):.2f}", text)


def speed_after(rows, step):
    """Tokens per second from the row of `step` to the last, evaluations not counted."""
    first = next(row for row in rows if row["step"] == step)
    last = rows[-1]
    # The seconds of a row count its own step, its tokens do not, but for the last row.
    tokens = last["tokens"] - first["tokens"] * (step + 1) / step
    return tokens / (last["seconds"] - first["seconds"])


def speed(bench):
    flags = [*bench.small, "--steps", "50", *QUIET, *bench.flags]
    rows, answer = train(bench, flags)
    bench.speed = speed_after(rows, 10)
    achieved = bench.speed * answer["flops"]
    share = achieved / bench.product
    line("tokens per second", f"{bench.speed:.0f}", "the default shape, steps 10 to 50")
    line("GFLOP/s", f"{achieved / 1e9:.1f}", f"{share:.1%} of the large product's")
    line("peak memory, MB", f"{answer['host']:.0f}", "of the process")
    if bench.device != "cpu":
        text = f"in evaluation {megabytes(answer['evaluation'])}"
        line("the same, CUDA", megabytes(answer["training"]), text)


def split(bench):
    flags = [*bench.small, "--steps", "41", *QUIET, "--eval-tokens", "1", "--compile", "off"]
    run_dir = tempfile.mkdtemp(dir=bench.folder)
    answer = call("split", [*flags, *bench.flags, "--run-dir", run_dir])
    whole = sum(answer.values())
    names = {
        "passes": "forward, backward, ms",
        "optimizers": "optimizers, ms",
        "rest": "the rest, ms",
    }
    for part, name in names.items():
        text = f"{answer[part] / whole:.1%} of a step, not compiled"
        line(name, f"{answer[part]:.1f}", text)


def two_processes(bench):
    if bench.device != "cpu" or os.cpu_count() == 1:
        return
    flags = [*bench.small, "--steps", "50", *QUIET, *bench.flags]
    both = speed_after(train_two(bench, flags), 10)
    text = f"tokens per second on the same cores, {both / bench.speed:.2f} of one's"
    line("two processes", f"{both:.0f}", text)


# --- parts for a GPU


def default_run(bench):
    run_dir = tempfile.mkdtemp(dir=bench.folder)
    begin = time.perf_counter()
    command = [sys.executable, TRAIN, *bench.small, *bench.flags]
    if bench.tiny:
        command += ["--steps", "50", "--sample-tokens", "16"]
    # Compiled anew, though start_up has compiled this shape.
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": tempfile.mkdtemp(dir=bench.folder)}
    run([*command, "--run-dir", run_dir], LIMIT, env=environment)
    seconds = time.perf_counter() - begin
    rows = read_rows(run_dir)
    result = json.loads(Path(run_dir, "result.json").read_text())
    meta = json.loads(Path(run_dir, "meta.json").read_text())
    compiled = "compiled" if meta["compile"] else "not compiled"
    text = f"python train.py, {meta['device']}, {meta['dtype']}, {compiled}"
    line("default run, s", f"{seconds:.1f}", text)
    text = f"of it training; {result['tokens_per_second']:.0f} tokens per second"
    line("its loop, s", f"{result['train_seconds']:.1f}", f"{text}, compiling counted")
    text = f"val_loss at step {result['steps']}; at step 0 {rows[0]['val_loss']:.4f}"
    line("its loss", f"{result['val_loss']:.4f}", text)


def large_flags(bench, steps):
    """The flags of a GPT-2 sized run that logs each step; its shape is stronger than yours."""
    flags = [*bench.flags, *bench.large, *QUIET]
    # There is nothing to learn in random ids, so the rate only has to be harmless.
    flags += ["--log-every", "1", "--wandb", "disabled", "--lr", "1e-3"]
    return [*flags, "--steps", str(steps), "--device", bench.device, "--dtype", bench.dtype]


def sizes_up_to(bench):
    return [size for size in bench.micro_batches if size <= bench.micro_batch]


def train_large(bench, steps, flags):
    """The largest micro-batch that fits, the seconds of each step, and child_train's answer."""

    def measure(size):
        # One evaluation of a whole micro-batch, as a user's would be.
        tokens = int(size[-1]) * bench.seq_len
        evaluating = ["--eval-tokens", str(tokens)]
        return train(bench, [*large_flags(bench, steps), *evaluating, *size, *flags], LIMIT)

    size, (rows, answer) = largest_that_fits(measure, sizes_up_to(bench))
    # The last row has no step of its own, only an evaluation.
    clock = [row["seconds"] for row in rows if "train_loss" in row]
    seconds = np.diff(clock, prepend=0.0)
    return size, seconds, answer


def large_lines(bench, name, size, seconds, answer):
    """Prints the lines of a GPT-2 sized run. Returns its tokens per second."""
    step = statistics.median(seconds[3:])
    tokens = bench.tokens_per_step / step
    text = f"micro-batch {size}, {bench.tokens_per_step} tokens a step, {bench.dtype}, compiled"
    line(f"{name}, tokens/s", f"{tokens:.0f}", text)
    achieved = tokens * answer["flops"]
    text = f"{achieved / 1e9:.0f} GFLOP/s, of the large product's {bench.product / 1e9:.0f}"
    line(f"{name}, MFU", f"{achieved / bench.product:.1%}", text)
    # The data sheet's figure, dense bfloat16, is for the SXM cards.
    sxm = not any(word in bench.card for word in ["PCIe", "NVL", "MIG"])
    if sxm and bench.dtype == "bfloat16" and ("H100" in bench.card or "H200" in bench.card):
        line(f"{name}, MFU", f"{achieved / 989e12:.1%}", "of the data sheet's 989 TFLOP/s")
    line(f"{name}, memory, MB", megabytes(answer["training"]), "the most in a training step")
    compiling = seconds[0] - step
    line(f"{name}, compile, s", f"{compiling:.1f}", "the first step less a later one's time")
    return tokens


def gpt2(bench):
    size, seconds, answer = train_large(bench, 15, ["--compile", "on"])
    bench.micro_batch = size
    bench.gpt2_speed = large_lines(bench, "GPT-2", size, seconds, answer)
    text = f"the most in evaluate(), on {size} sequences at once, not compiled"
    line("GPT-2, evaluation, MB", megabytes(answer["evaluation"]), text)


def nano_like(bench):
    """The model like nanoGPT's with the same shape, tokens per step and micro-batch."""

    def measure(size):
        return call("nano", [*large_flags(bench, 15), *size], LIMIT)

    size, answer = largest_that_fits(measure, sizes_up_to(bench))
    tokens = large_lines(bench, "like nanoGPT", size, answer["seconds"], answer)
    line("ours / like nanoGPT", f"{bench.gpt2_speed / tokens:.3f}", "in tokens per second")


def not_compiled(bench):
    size, seconds, answer = train_large(bench, 8, ["--compile", "off"])
    tokens = bench.tokens_per_step / statistics.median(seconds[3:])
    share = tokens / bench.gpt2_speed
    text = f"tokens per second, micro-batch {size}, {share:.2f} of the compiled"
    line("GPT-2, --compile off", f"{tokens:.0f}", text)
    line("its memory, MB", megabytes(answer["training"]), "the most in a training step")


def muon(bench):
    """Muon's part in a step of few tokens, 32 x 1024, where it weighs most."""

    def measure(size):
        run_dir = tempfile.mkdtemp(dir=bench.folder)
        flags = large_flags(bench, 12)
        flags += ["--compile", "on", "--optimizer", "muon", "--eval-tokens", "1"]
        flags += ["--batch-size", str(bench.muon_batch)]
        return call("muon", [*flags, *size, "--run-dir", run_dir], LIMIT)

    halves = [bench.muon_batch, bench.muon_batch // 2, bench.muon_batch // 4]
    size, answer = largest_that_fits(measure, halves)
    share = answer["in_step"] / answer["whole"]
    tokens = bench.muon_batch * bench.seq_len
    text = f"of a step of {tokens} tokens: {answer['in_step']:.1f} of {answer['whole']:.1f} ms"
    line("Muon's share", f"{share:.1%}", f"{text}, micro-batch {size}")
    line("Muon batched, ms", f"{answer['batched']:.2f}", f"{answer['matrices']} matrices by shape")
    ratio = answer["single"] / answer["batched"]
    line("one at a time, ms", f"{answer['single']:.2f}", f"{ratio:.2f} times the batched")


def resume(bench):
    """A run that is killed and resumed against one that is not, both on the default shape."""
    kept = tempfile.mkdtemp(dir=bench.folder)
    killed = tempfile.mkdtemp(dir=bench.folder)
    flags = [*bench.flags, *bench.small]
    flags += ["--steps", "200", "--log-every", "1", "--eval-every", "50", "--eval-tokens", "1024"]
    flags += ["--sample-tokens", "0", "--wandb", "disabled"]
    command = [sys.executable, TRAIN, *flags, "--run-dir"]
    run([*command, kept], LIMIT)
    kill_after(120, [*command, killed], killed)
    if Path(killed, "result.json").exists():
        raise Failed("the run had finished before it was killed")
    run([*command, killed], LIMIT)

    # The checkpoint is of step 100. What comes before it shows how two undisturbed runs differ.
    before = []
    after = []
    for row, other in zip(read_rows(kept), read_rows(killed), strict=True):
        if "train_loss" in row:
            difference = abs(row["train_loss"] - other["train_loss"])
            if row["step"] < 100:
                before.append(difference)
            else:
                after.append(difference)
    text = "greatest difference of train_loss to a run left alone"
    line("kill -9 and resume", f"{max(after):.2g}", text)
    line("the same, before it", f"{max(before):.2g}", "steps 0 to 99, where both were left alone")


def two_on_one_gpu(bench):
    """Whether the processes can share a device. If not that is no failure, but an answer."""
    flags = [*bench.small, "--steps", "20", *QUIET, "--compile", "off"]
    flags += [*bench.flags, "--device", bench.device]
    name = "two on one device"
    try:
        rows = train_two(bench, [*flags, "--wandb", "disabled"], limit=90)
    except Failed as error:
        line(name, "no", last_line(error))
        return
    line(name, "ok", f"torchrun, --device {bench.device}, loss {rows[-1]['val_loss']:.4f}")


PARTS = [start_up, speed, split, two_processes]
GPU_PARTS = [default_run, gpt2, nano_like, not_compiled, muon, resume, two_on_one_gpu]


def write_random_ids(path, vocab_size):
    rng = np.random.default_rng(0)
    np.save(path, rng.integers(vocab_size, size=10_000_000, dtype=np.uint16))


def table(folder, only, tiny, flags):
    """Prints the table, part by part. Returns how many of them failed."""
    bench = SimpleNamespace(folder=folder, tiny=tiny, flags=flags)
    # What machine() finds replaces these guesses.
    bench.device = "cuda:0" if torch.cuda.is_available() else "cpu"
    bench.dtype = "bfloat16" if torch.cuda.is_available() else "float32"
    bench.card = ""
    # These stay if the part that measures them fails.
    bench.product = math.nan
    bench.speed = math.nan
    bench.gpt2_speed = math.nan

    ids = str(Path(folder, "ids.npy"))
    if tiny:
        write_random_ids(ids, 512)
        bench.small = [*TINY.split(), "--data", ids]
        bench.large = bench.small
        bench.seq_len = 64
        bench.tokens_per_step = 16 * 64
        bench.micro_batches = [8]
        bench.muon_batch = 8
    else:
        write_random_ids(ids, 50304)
        bench.small = []
        bench.large = [*GPT2.split(), "--data", ids]
        bench.seq_len = 1024
        bench.tokens_per_step = 480 * 1024
        bench.micro_batches = [60, 48, 32, 24, 16, 8]
        bench.muon_batch = 32
    bench.micro_batch = bench.micro_batches[0]

    begin = time.perf_counter()
    failed = attempt(machine, bench)
    parts = PARTS
    if bench.device.startswith("cuda") or tiny:
        parts = PARTS + GPU_PARTS
    for part in parts:
        if not only or part.__name__ in only:
            failed += attempt(part, bench)
    line("this benchmark, s", f"{time.perf_counter() - begin:.0f}", f"parts that failed: {failed}")
    return failed


def attempt(part, bench):
    """Runs a part of the table. Returns 1 if it failed, else 0."""
    try:
        part(bench)
    except Exception as error:
        line(part.__name__, "failed", last_line(error))
        return 1
    return 0


# --- seconds to a loss


def target(loss, flags):
    """Median seconds until the validation loss, over three seeds; None if one misses it."""
    print("seed  steps    tokens  seconds   final")
    reached = []
    for seed in (1, 2, 3):
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, TRAIN, "--seed", str(seed), "--wandb", "disabled"]
            command += ["--eval-every", "10", "--eval-tokens", "1000000000", "--sample-tokens", "0"]
            run([*command, *flags, "--run-dir", folder])
            rows = [row for row in read_rows(folder) if "val_loss" in row]
        final = rows[-1]["val_loss"]
        low = [row for row in rows if row["val_loss"] <= loss]
        if low:
            row = low[0]
            reached.append(row)
            text = f"{row['step']:5d}  {row['tokens']:8d}  {row['seconds']:7.1f}  {final:.4f}"
            print(f"{seed:4d}  {text}", flush=True)
        else:
            print(f"{seed:4d}  not reached; {final:.4f} at the end", flush=True)
    if len(reached) < 3:
        return None
    step = statistics.median(row["step"] for row in reached)
    tokens = statistics.median(row["tokens"] for row in reached)
    seconds = statistics.median(row["seconds"] for row in reached)
    print(f"median {step:4d}  {tokens:8d}  {seconds:7.1f}")
    return seconds


def nanogpt(name, steps):
    """Seconds of nanoGPT's recipe for a CPU on the text `name`, and its loss on the last tenth.

    Karpathy's README gives the flags; the operations are its own, in float32 and without
    evaluations: 12 x 64 characters, 4 layers, 4 heads, width 128, 2000 steps of AdamW.
    """
    B = 12
    T = 64
    text = Path(name).read_text()
    characters = sorted(set(text))
    number = {character: i for i, character in enumerate(characters)}
    ids = torch.tensor([number[character] for character in text])
    cut = len(ids) * 9 // 10
    torch.manual_seed(1337)
    model = NanoGPT(len(characters), T, C=128, H=4, layers=4)
    optimizer = torch.optim.AdamW(nano_groups(model), betas=(0.9, 0.99))
    begin = time.perf_counter()
    for step in range(steps):
        # The rate rises to 1e-3 in 100 steps, and falls to 1e-4 along half a cosine.
        lr = 1e-3 * step / 100
        if step >= 100:
            done = (step - 100) / (steps - 100)
            lr = 1e-4 + 9e-4 * 0.5 * (1 + math.cos(math.pi * done))
        for group in optimizer.param_groups:
            group["lr"] = lr
        offsets = torch.randint(cut - T, (B,))
        windows = torch.stack([ids[i : i + T + 1] for i in offsets])  # (B, T + 1)
        loss = model(windows)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    seconds = time.perf_counter() - begin

    losses = []
    with torch.no_grad():
        for window in ids[cut:].unfold(0, T + 1, T):
            losses.append(model(window[None]).item())
    loss = statistics.mean(losses)
    count = sum(p.numel() for p in model.parameters())
    words = f"{count} parameters: {steps} steps, {seconds:.1f} s, {loss:.4f}"
    print(f"nanoGPT's recipe, float32, {words}", flush=True)
    return seconds, loss


def against_nanogpt(name, steps, flags):
    theirs, loss = nanogpt(name, steps)
    shape = ["--seq-len", "64", "--vocab-size", "128", "--steps", "60"]
    shape += ["--device", "cpu"]  # as theirs is
    ours = target(loss, [*shape, *flags])
    if ours:
        print(f"{theirs / ours:.1f} times faster")
    else:
        print("not reached by every seed")


def main():
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    names = [part.__name__ for part in PARTS + GPU_PARTS]
    parser.add_argument("--only", default="", help=f"some of: {', '.join(names)}")
    parser.add_argument("--tiny", action="store_true", help="every part in a tiny shape")
    parser.add_argument("--target", type=float, help="a validation loss")
    parser.add_argument("--nanogpt", action="store_true", help="take nanoGPT's loss as target")
    parser.add_argument("--nanogpt-steps", type=int, default=2000, help="of its recipe")
    parser.add_argument("--child", choices=CHILDREN, help=argparse.SUPPRESS)
    arguments, flags = parser.parse_known_args()
    only = [name for name in arguments.only.split(",") if name]
    for name in only:
        if name not in names:
            parser.error(f"--only: there is no part {name}")
    if arguments.child:
        answer = CHILDREN[arguments.child](flags)
        print(json.dumps(answer))
    elif arguments.nanogpt:
        if "--data" not in flags:
            parser.error("--nanogpt needs --data FILE")
        name = flags[flags.index("--data") + 1]
        against_nanogpt(name, arguments.nanogpt_steps, flags)
    elif arguments.target:
        target(arguments.target, flags)
    else:
        with tempfile.TemporaryDirectory() as folder:
            os.environ["WANDB_DIR"] = folder
            # An empty cache, or the seconds to compile would be those of a second time.
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{folder}/compiled"
            failed = table(folder, only, arguments.tiny, flags)
        if failed:
            sys.exit(1)


if __name__ == "__main__":
    main()
