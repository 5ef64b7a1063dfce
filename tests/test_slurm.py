"""slurm.sbatch, as it stands, on a real Slurm.

munged, slurmctld and the slurmd of three nodes run on this machine, in a temporary folder. The
GPUs are pretended: Slurm counts a device file for each and hands them out, the runs use the CPU.
"""
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
from test_sweep import TOP, write_sweep

ROOT = Path(__file__).parent.parent
os.environ["PATH"] += ":/usr/sbin"
NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "srun")
REASON = ""
if not all(map(shutil.which, NEEDED)):
    REASON = "slurm.sbatch is not tested: that needs Debian's slurm-wlm and munge"
elif os.geteuid():
    REASON = "slurm.sbatch is not tested: that needs root"
assert not (REASON and os.environ.get("SLURM_TESTS") == "required"), REASON
pytestmark = [pytest.mark.skipif(bool(REASON), reason=REASON), pytest.mark.xdist_group("slurm")]

TINY = (
    "--data data.txt --n-layer 1 --n-head 1 --n-embd 16 --seq-len 32 --batch-size 8 "
    "--log-every 1 --eval-every 50 --eval-tokens 1024 --sample-tokens 16 --steps 300 "
    "--device cpu --dtype float32 --wandb disabled"
).split()
# What Slurm sees of a training script, without torch: with --waits it ends when it is signalled,
# and the next time; with --fails the second process ends at once, and the first one waits for it.
STUB = """
import os, signal, sys, time
from pathlib import Path

def save(number, _):
    saved.touch()
    sys.exit(128 + number if rank == 0 else 0)

signal.signal(signal.SIGTERM, save)
signal.signal(signal.SIGUSR1, save)
rank = int(os.environ.get("RANK", 0))
run_dir = Path(sys.argv[sys.argv.index("--run-dir") + 1])
run_dir.mkdir(parents=True, exist_ok=True)
saved = run_dir / f"saved-{rank}"
assert "--fails" not in sys.argv or rank != 1
(run_dir / f"started-{rank}").touch()
while "--waits" in sys.argv and not saved.exists():
    time.sleep(0.1)
(run_dir / "result.json").write_text('{"val_loss": 1.5}')
"""
HOST = socket.gethostname().split(".")[0]
NODES = (HOST, "yy", "zz")
GPUS = "/dev/null /dev/zero /dev/full /dev/random /dev/urandom /dev/ptmx".split()
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
ProctrackType=proctrack/{proctrack}
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
ReturnToService=2
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1,batch_sched_delay=0,bf_interval=1
KillWait=10
MaxArraySize=4
GresTypes=gpu
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=16 Gres=gpu:{gpus}
NodeName=yy NodeAddr=127.0.0.1 Port={ports[2]} CPUs=16 Gres=gpu:{gpus}
NodeName=zz NodeAddr=127.0.0.1 Port={ports[3]} CPUs=16 Gres=gpu:{gpus}
PartitionName=gpu Nodes=ALL Default=YES MaxTime=INFINITE State=UP
PartitionName=grace Nodes=ALL MaxTime=INFINITE State=UP GraceTime=60
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
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

def wait_for(condition):
    deadline = time.time() + 120
    while not condition():
        assert time.time() < deadline, "waited too long: " + shell("scontrol", "show", "jobs")
        time.sleep(0.2)

@pytest.fixture
def proctrack():
    return "linuxproc"

@pytest.fixture
def cluster(tmp_path_factory, monkeypatch, proctrack):
    """The repo on a login node of a Slurm, which follows a job's processes in one of its ways."""
    folder = tmp_path_factory.mktemp("slurm")
    (folder / "repo").mkdir()
    monkeypatch.chdir(folder / "repo")
    monkeypatch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
    monkeypatch.setenv("SBATCH_CPUS_PER_GPU", "1")  # there are but a few
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    for name in ("train.py", "config.py", "slurm.sbatch"):
        shutil.copy(ROOT / name, ".")
    Path("data.txt").write_bytes(Path(os.__file__).with_name("argparse.py").read_bytes())
    Path("stub.py").write_text(STUB)
    if Path(sys.prefix, "bin/activate").exists():
        Path(".venv").symlink_to(sys.prefix)
    # Steps at a pace that leaves time to disturb them, until there is a file called fast.
    log_line = "    run.log(row, all_reduce"
    pace = '    __import__("time").sleep(0 if os.path.exists("fast") else 0.2)\n'
    text = Path("train.py").read_text()
    assert text.count(log_line) == 1
    Path("train.py").write_text(text.replace(log_line, pace + log_line))

    names = dict(folder=folder, host=HOST, ports=ports(4), proctrack=proctrack, gpus=len(GPUS))
    (folder / "slurm.conf").write_text(CONF.format(**names))
    gres = [f"NodeName={node} Name=gpu File={gpu}\n" for node in NODES for gpu in GPUS]
    (folder / "gres.conf").write_text("".join(gres))
    (folder / "cgroup.conf").write_text("CgroupAutomount=yes\nCgroupPlugin=cgroup/v1\n")
    (folder / "munge.key").write_bytes(os.urandom(1024))
    (folder / "munge.key").chmod(0o400)
    for parent in (folder, *folder.parents[:-2]):  # munge wants to be reachable by every user
        parent.chmod(0o755)
    daemons = []

    def daemon(*command):
        log = open(folder / f"{len(daemons)}-{command[0]}.log", "w")
        daemons.append(subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True))

    def up():
        sinfo = ["sinfo", "-h", "-p", "gpu", "-o", "%D %t"]
        return subprocess.run(sinfo, capture_output=True, text=True).stdout == "3 idle\n"

    try:
        files = [f"--{kind}-file={folder}/munge.{kind}" for kind in ("key", "log", "pid", "seed")]
        daemon("munged", "--foreground", "--force", f"--socket={folder}/munge.socket", *files)
        wait_for((folder / "munge.socket").exists)
        daemon("slurmctld", "-D")
        for node in NODES:
            daemon("slurmd", "-D", "-N", node)
        wait_for(up)
        yield
    finally:
        subprocess.run(["scancel", "--user=root"])
        wait_for(lambda: not shell("squeue", "-h"))
        for process in reversed(daemons):
            process.terminate()
            process.wait(20)

def sbatch(*flags):
    return shell("sbatch", "--parsable", *flags).strip()

def states(job):
    return re.findall(r"JobState=(\w+)", shell("scontrol", "show", "job", job))

def ended(job):
    over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
    wait_for(lambda: all(state in over for state in states(job)))
    return states(job)

def restarts(job):
    return int(re.search(r"Restarts=(\d+)", shell("scontrol", "show", "job", job))[1])

def log(job):
    return Path(f"slurm-{job}.log").read_text()

def metrics(run_dir):
    path = Path(run_dir, "metrics.jsonl")
    lines = path.read_text().splitlines() if path.exists() else []
    rows = [json.loads(line) for line in lines]
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]

def trains(job, run_dir, starts=0):
    """Wait until the job has been started so many times again, and then until it takes steps."""
    wait_for(lambda: restarts(job) >= starts and states(job) == ["RUNNING"])
    there = len(metrics(run_dir))
    wait_for(lambda: len(metrics(run_dir)) > there + 2)

def test_what_can_be_wrong(cluster, tmp_path):
    tasks = sbatch("--ntasks=2", "slurm.sbatch", *TINY)
    typo = sbatch("slurm.sbatch", "--lrr", 1)
    away = sbatch(f"--chdir={tmp_path}", "slurm.sbatch", *TINY)
    for job in (tasks, typo, away):
        assert ended(job) == ["FAILED"]
    assert "error: 2 tasks for 1 GPUs" in log(tasks)
    assert "Unrecognized options: --lrr" in log(typo)
    assert "error: no train.py in" in (tmp_path / f"slurm-{away}.log").read_text()

def test_disturbed_runs_end_with_the_numbers_of_a_whole_one(cluster):
    # Slurm looks at the time limits twice a minute.
    limited = sbatch(f"--nodelist={HOST}", "--time=1", "--signal=USR1@50", "slurm.sbatch", *TINY)
    both = sbatch("--nodes=2", f"--nodelist={HOST},zz", "slurm.sbatch", *TINY)
    preempted = sbatch("--nodelist=yy", "slurm.sbatch", *TINY)
    graceful = ("--partition=grace", "slurm.sbatch", "train.py", *TINY, "--run_dir", "runs/mine")
    graceful = sbatch("--nodelist=yy", *graceful)
    dirs = {job: f"runs/gpt-{job}" for job in (limited, both, preempted)} | {graceful: "runs/mine"}
    for job in (preempted, graceful, both):
        trains(job, dirs[job])
    urgent = sbatch("--partition=urgent", "--nodelist=yy", "--exclusive", "--wrap", "sleep 1")
    shell("scancel", "--signal=USR1", both)  # as near the time limit
    whole = sbatch("--job-name=a/b c", "--export=NONE", "slurm.sbatch", *TINY)
    pair = sbatch(f"--nodelist={HOST}", "--gpus-per-node=2", "slurm.sbatch", *TINY)
    trains(both, dirs[both], starts=1)
    shell("scontrol", "update", "nodename=zz", "state=down", "reason=test")
    wait_for(lambda: restarts(both) == 2)
    resume = ["scontrol", "update", "nodename=zz", "state=resume"]
    subprocess.run(resume, stderr=subprocess.DEVNULL)  # it may be back already
    assert ended(urgent) == ["COMPLETED"]
    wait_for(lambda: restarts(preempted) == restarts(graceful) == 1)
    wait_for(lambda: "saved at step" in log(limited))
    Path("fast").touch()

    assert ended(whole) == ["COMPLETED"] and restarts(whole) == 0, log(whole)
    rows = metrics(f"runs/a/b c-{whole}")
    assert len(rows) == 301
    for job in (limited, preempted, graceful):
        assert ended(job) == ["COMPLETED"], log(job)
        assert metrics(dirs[job]) == rows
        assert f"start {restarts(job)}, on " in log(job) and "saved at step" in log(job)
    for job in (limited, graceful):
        assert f"requeued to go on; scancel {job} ends it" in log(job)
    assert log(whole).startswith("python train.py --run-dir runs/a/b\\ c-")
    assert f"\njob {whole}, start 0, on " in log(whole) and "commit" in log(whole)

    assert ended(both) == ended(pair) == ["COMPLETED"], log(both) + log(pair)
    assert f"on {HOST},zz" in log(both) and "saved at step" in log(both)
    assert metrics(dirs[both]) == metrics(f"runs/gpt-{pair}")
    for row, other in zip(metrics(dirs[both])[:20], rows):
        assert row == pytest.approx(other, rel=1e-3)  # training amplifies float rounding

WAYS = ["linuxproc", "pgid"]
if os.access("/sys/fs/cgroup/freezer", os.W_OK):
    WAYS.append("cgroup")

@pytest.mark.parametrize("proctrack", WAYS)
def test_a_signal_a_failure_or_scancel_ends_a_job(cluster):
    waits = ("slurm.sbatch", "stub.py", "--waits")
    failing = sbatch("--gpus-per-node=2", "--export=ALL,SLURM_WAIT=3", *waits, "--fails")
    warned = sbatch("--gpus-per-node=2", *waits)
    requeued = sbatch(*waits)
    refused = sbatch("--no-requeue", *waits)
    cancelled = sbatch(*waits)
    for job in (warned, requeued, refused, cancelled):
        wait_for(Path(f"runs/gpt-{job}/started-0").exists)
    wait_for(Path(f"runs/gpt-{warned}/started-1").exists)
    for job in (warned, refused):
        shell("scancel", "--signal=USR1", job)
    shell("scontrol", "requeue", requeued)
    shell("scancel", cancelled)
    for job in (failing, refused):
        assert ended(job) == ["FAILED"] and restarts(job) == 0, log(job)
        assert "requeued to go on" not in log(job)
    assert "AssertionError" in log(failing)
    again = f"to go on: sbatch slurm.sbatch stub.py --run-dir runs/gpt-{refused} --waits"
    assert again in log(refused)
    assert ended(cancelled) == ["CANCELLED"] and restarts(cancelled) == 0
    wait_for(Path(f"runs/gpt-{cancelled}/saved-0").exists)
    assert "requeued to go on" not in log(cancelled)
    for job in (warned, requeued):
        assert ended(job) == ["COMPLETED"] and restarts(job) == 1, log(job)
    assert Path(f"runs/gpt-{warned}/saved-1").exists()

def test_a_sweep_is_arrays_and_can_grow_while_they_wait(cluster, monkeypatch):
    top = TOP.replace("(python train.py)", "(python stub.py)")
    top = top.replace("1e-3 3e-3 1e-2 3e-2 1e-1", "1e-3 1e-2").replace("in 1 2", "in 1")
    write_sweep(top)
    sweep = ("bash", "sweep.sh", "slurm", "--partition=grace", "--hold", "--", "--batch-size", 4)
    monkeypatch.setenv("JOBS", "2")
    out = shell(*sweep)
    monkeypatch.delenv("JOBS")
    jobs = re.findall("Submitted batch job (.*)", out)  # two arrays: 3 rows each at most
    assert len(jobs) == 2 and "0 of 4 runs are finished or in the queue" in out
    rows = shell("scontrol", "show", "job", jobs[0])
    assert "ArrayTaskId=1-3%2" in rows and "Partition=grace" in rows
    assert f"Dependency=afterany:{jobs[0]}" in shell("scontrol", "show", "job", jobs[1])
    write_sweep(top.replace("1e-3 1e-2", "1e-3 3e-3 1e-2"))
    out = shell(*sweep)
    assert "4 of 6 runs are finished or in the queue" in out
    jobs += re.findall("Submitted batch job (.*)", out)
    shell("scontrol", "release", *jobs)
    assert [ended(job) for job in jobs] == [["COMPLETED"] * 3, ["COMPLETED"], ["COMPLETED"] * 2]
    assert len(list(Path("runs/muon-or-adamw").glob("*/result.json"))) == 6
    first = Path(f"runs/muon-or-adamw/slurm-{jobs[0]}_3.log").read_text()
    assert first.startswith("python stub.py --run-dir runs/muon-or-adamw/")
    assert "6 of 6 runs are finished" in shell(*sweep)
    assert shell("bash", "sweep.sh", "--batch-size", 4).count("\n1.5 ") == 6
