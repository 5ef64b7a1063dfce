"""Another kind of experiment, made from train.py by tests/classifier.patch, goes the whole way."""

import json
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from test_train import (  # noqa: F401 (workdir is a fixture)
    ROOT,
    TWO_PROCESSES,
    has_rows,
    kill,
    metrics,
    start,
    trained,
    wait_until,
    workdir,
)

SMALL = ["--steps", "60", "--batch-size", "64", "--lr", "1e-2", "--script-of", "mine"]


@pytest.fixture
def mine(workdir):  # noqa: F811
    """mine.py: train.py after the patch, beside config.py."""
    for name in ("config.py", "train.py"):
        shutil.copy(ROOT / name, name)
    patch = ROOT / "tests/classifier.patch"
    assert patch.read_text().count("\n@@ ") <= 10
    subprocess.run(["patch", "-s", "train.py", "-o", "mine.py", patch], check=True)
    Path("data.txt").unlink()
    return Path("mine.py")
