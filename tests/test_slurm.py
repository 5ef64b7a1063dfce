"""slurm.sbatch on a real Slurm: munged, slurmctld and slurmd of a two-node cluster on this machine, in a temporary folder."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
os.environ["PATH"] += ":/usr/sbin"
MISSING = [name for name in ("munged", "slurmctld", "slurmd", "sbatch", "srun") if not shutil.which(name)]
REASON = f"needs Debian's slurm-wlm and munge (not here: {MISSING})" if MISSING else "needs root" if os.geteuid() else ""
assert not (REASON and os.environ.get("SLURM_TESTS") == "required"), REASON
pytestmark = pytest.mark.skipif(bool(REASON), reason=REASON)

TINY = ("--data data.txt --n-layer 1 --n-head 1 --n-embd 16 --seq-len 32 --batch-size 8 --log-every 1 --eval-every 50 "
        "--eval-tokens 1024 --save-every 1000 --sample-tokens 16 --device cpu --dtype float32 --wandb disabled").split()  # fmt: skip
HOST = socket.gethostname().split(".")[0]
# pgid: a signal to a step reaches few of its processes, as on a cluster with cgroups
CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CryptoType=crypto/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldPidFile={folder}/slurmctld.pid
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
ReturnToService=2
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1
KillWait=10
NodeName={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=8
NodeName=zz NodeAddr=127.0.0.1 Port={ports[2]} CPUs=8
PartitionName=cpu Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def ports(n):
    sockets = [socket.socket() for _ in range(n)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    return [s.getsockname()[1] for s in sockets]


def shell(*command):
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def wait_for(condition, seconds=120):
    deadline = time.time() + seconds
    while not condition():
        assert time.time() < deadline, "waited too long: " + shell("scontrol", "show", "jobs")
        time.sleep(0.2)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """A Slurm of two nodes, in whose folder lies a copy of the repo, edited for a partition with no GPU."""
    folder = tmp_path_factory.mktemp("slurm")
    os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
    (folder / "slurm.conf").write_text(CONF.format(folder=folder, host=HOST, ports=ports(3)))
    (folder / "munge.key").write_bytes(os.urandom(1024))
    (folder / "munge.key").chmod(0o400)
    folder.chmod(0o755)
    for parent in folder.parents:  # munge wants to be reachable by every user
        if parent != Path("/tmp") and str(parent).startswith("/tmp"):
            parent.chmod(0o755)
    daemons = []

    def daemon(*command):
        log = open(folder / f"{len(daemons)}-{command[0]}.log", "w")
        daemons.append(subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True))

    files = [f"--{name}={folder}/munge.{end}" for name, end in [("socket", "socket"), ("key-file", "key"), ("log-file", "log"),
                                                               ("pid-file", "pid"), ("seed-file", "seed")]]  # fmt: skip
    daemon("munged", "--foreground", "--force", "--num-threads=2", *files)
    wait_for((folder / "munge.socket").exists)
    daemon("slurmctld", "-D")
    daemon("slurmd", "-D", "-N", HOST)
    daemon("slurmd", "-D", "-N", "zz")
    repo = folder / "repo"
    repo.mkdir()
    for name in ("train.py", "config.py", "sweep.sh", "slurm.sbatch"):
        shutil.copy(ROOT / name, repo)
    shutil.copytree(ROOT / "logs", repo / "logs")
    batch = re.sub("#SBATCH --gpus-per-node.*\n", "", (repo / "slurm.sbatch").read_text())
    (repo / "slurm.sbatch").write_text(batch.replace("--cpus-per-task=4", "--cpus-per-task=1"))
    (repo / "data.txt").write_bytes(Path(os.__file__).parent.joinpath("argparse.py").read_bytes())
    os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    os.environ["OMP_NUM_THREADS"] = "1"
    before = Path.cwd()
    os.chdir(repo)
    try:
        wait_for(lambda: subprocess.run(["sinfo", "-h", "-o", "%D %t"], capture_output=True, text=True).stdout == "2 idle\n", 60)
        yield repo
    finally:
        subprocess.run(["scancel", "--user=root"])
        time.sleep(1)
        for process in reversed(daemons):
            process.terminate()
            process.wait(20)
        os.chdir(before)


def sbatch(*flags):
    return shell("sbatch", "--parsable", *flags).strip()


def state(job):
    return re.findall(r"JobState=(\w+)", shell("scontrol", "show", "job", job))


def ended(job):
    wait_for(lambda: all(s in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT") for s in state(job)), 240)
    return state(job)


def metrics(run_dir):
    rows = [json.loads(line) for line in Path(run_dir, "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


def test_one_run_and_its_log(cluster):
    job = sbatch("slurm.sbatch", *TINY, "--steps", 20)
    assert ended(job) == ["COMPLETED"], Path(f"logs/gpt-{job}.log").read_text()
    log = Path(f"logs/gpt-{job}.log").read_text()
    assert log.startswith("train.py --data") and f"--run-dir runs/gpt-{job}\njob {job}, start 0, on " in log and "commit" in log
    assert len(metrics(f"runs/gpt-{job}")) == 21


def test_requeued_and_time_limited_runs_equal_an_uninterrupted_one(cluster):
    steps = ("--steps", 12000)
    whole = sbatch("--job-name=whole", "slurm.sbatch", *TINY, *steps)
    limited = sbatch("--job-name=limited", "--time=1", "--signal=B:USR1@50", "slurm.sbatch", *TINY, *steps)
    requeued = sbatch("--job-name=requeued", "slurm.sbatch", *TINY, *steps, "--save-every", 500)
    wait_for(Path(f"runs/requeued-{requeued}/checkpoint.pt").exists)
    shell("scontrol", "requeue", requeued)
    for job, name in ((whole, "whole"), (limited, "limited"), (requeued, "requeued")):
        assert ended(job) == ["COMPLETED"], Path(f"logs/{name}-{job}.log").read_text()
    assert metrics(f"runs/limited-{limited}") == metrics(f"runs/requeued-{requeued}") == metrics(f"runs/whole-{whole}")
    log = Path(f"logs/limited-{limited}.log").read_text()
    assert "stopped by SIGUSR1 at step" in log and f"requeued to go on; scancel {limited} ends it" in log
    assert "Restarts=0" not in shell("scontrol", "show", "job", limited)
    assert "start 1" in Path(f"logs/requeued-{requeued}.log").read_text()


def test_failing_run_is_not_requeued_and_scancel_ends_one(cluster):
    failing = sbatch("slurm.sbatch", *TINY, "--data", "nowhere.txt")
    running = sbatch("slurm.sbatch", *TINY, "--steps", 1000000)
    wait_for(lambda: Path(f"runs/gpt-{running}/metrics.jsonl").exists() and len(metrics(f"runs/gpt-{running}")) > 3)
    shell("scancel", running)
    assert ended(running) == ["CANCELLED"] and ended(failing) == ["FAILED"]
    assert "Restarts=0" in shell("scontrol", "show", "job", failing)
    assert "No such file or directory: 'nowhere.txt'" in Path(f"logs/gpt-{failing}.log").read_text()
    wait_for(Path(f"runs/gpt-{running}/checkpoint.pt").exists, 20)  # saved all the same
    assert "requeued to go on" not in Path(f"logs/gpt-{running}.log").read_text()


def test_array_of_a_sweep(cluster):
    text = Path("sweep.sh").read_text().replace("1e-3 3e-3 1e-2 3e-2 1e-1", "1e-3 1e-2").replace("seed in 1 2", "seed in 1")
    Path("sweep.sh").write_text(text)
    job = shell("bash", "sweep.sh", "slurm", *TINY, "--steps", 20).split()[-1]
    assert ended(job) == ["COMPLETED"] * 4
    assert {path.parent.name for path in Path("runs/muon-or-adamw").glob("*/sample.txt")} == {
        "muon-lr1e-3-seed1", "muon-lr1e-2-seed1", "adamw-lr1e-3-seed1", "adamw-lr1e-2-seed1"}  # fmt: skip
    assert len(list(Path("logs").glob(f"muon-or-adamw-{job}_*.log"))) == 4


def test_two_nodes_are_one_run_and_stop_together(cluster):
    one = sbatch("--job-name=one", "slurm.sbatch", *TINY, "--steps", 2000)
    two = sbatch("--job-name=two", "--nodes=2", "slurm.sbatch", *TINY, "--steps", 2000)
    wait_for(lambda: Path(f"runs/two-{two}/metrics.jsonl").exists() and len(metrics(f"runs/two-{two}")) > 30)
    shell("scancel", "--batch", "--signal=USR1", two)  # as near the time limit
    assert ended(one) == ended(two) == ["COMPLETED"], Path(f"logs/two-{two}.log").read_text()
    log = Path(f"logs/two-{two}.log").read_text()
    assert f"on {HOST},zz" in log and "start 1" in log and log.count("stopped by SIGUSR1") == 1
    theirs, ours = metrics(f"runs/one-{one}"), metrics(f"runs/two-{two}")
    assert [row["step"] for row in ours] == list(range(2001))
    for row, other in zip(ours[:20], theirs):  # float rounding, which training amplifies
        assert row == pytest.approx(other, rel=1e-3)
