"""Every knob of the experiment in one flat dataclass. A new flag is a new line in it; the comment is its --help."""
import contextlib, io, re, sys
from dataclasses import dataclass
from typing import Literal
import tyro

@dataclass
class Config:
    """Train a small GPT. The same line again resumes an unfinished --run-dir; a finished one is left alone."""
    data: str = "stdlib"  # a file of bytes, a .bin of uint16 token ids, or stdlib: Python's own standard library
    val_data: str = ""  # validation file; empty: the last tenth of --data
    vocab_size: int = 256  # number of token ids: 256 for bytes, 50304 for a .bin of GPT-2 tokens
    seq_len: int = 128  # tokens in a training window
    batch_size: int = 32  # sequences per optimizer step, over all processes and micro-batches
    micro_batch_size: int = 0  # sequences per forward pass of a process; 0: its whole share of the batch

    n_layer: int = 4  # transformer blocks
    n_head: int = 2  # attention heads
    n_embd: int = 128  # width of the residual stream

    optimizer: Literal["muon", "adamw"] = "muon"  # for the matrices; embedding and head always take AdamW
    lr: float = 1.5e-2  # peak learning rate, for Muon and AdamW alike
    weight_decay: float = 0.1  # decoupled: a step scales the matrices by 1 - lr * weight_decay (adamw: 1 - 0.2 * lr * weight_decay)
    warmup: int = 0  # steps in which the learning rate rises to its peak
    cooldown: float = 0.5  # final fraction of the run, over which the learning rate falls to 0

    steps: int = 400  # optimizer steps
    log_every: int = 10  # steps between two lines of metrics.jsonl
    eval_every: int = 50  # steps between two evaluations
    eval_tokens: int = 32768  # validation tokens in an evaluation, always the same ones
    save_every: int = 50  # steps between two checkpoints
    sample_tokens: int = 512  # length of the text written at the end

    seed: int = 1337  # of the weights, the batches and the sample
    device: str = "auto"  # cpu, cuda, cuda:1, mps; auto: the best available
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of the matrix products; auto: bfloat16 where the GPU or the CPU (AMX) has it
    compile: Literal["auto", "on", "off"] = "auto"  # torch.compile; auto: on CUDA, if there is a g++

    run_dir: str = ""  # where everything is written; empty: runs/<start time>
    wandb: Literal["online", "offline", "disabled"] = "offline"  # tracking; offline needs no account
    wandb_project: str = "gpt"  # wandb's project
    wandb_group: str = ""  # wandb's group, such as the name of a sweep

    def __post_init__(self):  # a ValueError of one line for nonsense
        positive = "vocab_size seq_len batch_size n_layer n_head n_embd steps log_every eval_every eval_tokens save_every".split()
        for name in positive + "micro_batch_size weight_decay warmup sample_tokens seed".split():
            least = int(name in positive)
            if not getattr(self, name) >= least:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be {least} or more")
        if not 0 < self.lr < float("inf"):
            raise ValueError(f"--lr {self.lr}: must be a positive number")
        if not 0 <= self.cooldown <= 1:
            raise ValueError(f"--cooldown {self.cooldown}: must be between 0 and 1")
        if self.n_embd % (2 * self.n_head):
            raise ValueError(f"--n-embd {self.n_embd} must be a multiple of twice --n-head {self.n_head}")
        if self.micro_batch_size and self.batch_size % self.micro_batch_size:
            raise ValueError(f"--micro-batch-size {self.micro_batch_size} must divide --batch-size {self.batch_size}")

def parse(defaults: Config) -> Config:
    """The flags of the command line over `defaults`; in a notebook, `defaults` as they are."""
    if "ipykernel" in sys.modules:
        return defaults
    try:
        with contextlib.redirect_stderr(io.StringIO()) as box:
            return tyro.cli(Config, default=defaults)
    except SystemExit as stop:  # tyro frames an error in a box of many lines: make it one; --help leaves with code 0
        sys.exit(stop.code and "error:" + re.sub(r"([╭╮╰╯│─\s]|Error parsing Config:)+", " ", box.getvalue().partition("\n")[2]).rstrip())
