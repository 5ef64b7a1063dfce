"""slurm.sbatch, as it stands, on a real Slurm.

munged, slurmctld and the slurmd of two nodes run on this machine, in a temporary folder. The
GPUs are pretended: Slurm counts a device file for each and hands them out, the runs use the CPU.
"""

import contextlib
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
MISSING = [
    name for name in ("munged", "slurmctld", "slurmd", "sbatch", "srun") if not shutil.which(name)
]
REASON = ""
if MISSING:
    REASON = f"needs Debian's slurm-wlm and munge (not here: {MISSING})"
elif os.geteuid():
    REASON = "needs root"
assert not (REASON and os.environ.get("SLURM_TESTS") == "required"), REASON
pytestmark = [
    pytest.mark.skipif(bool(REASON), reason=REASON),
    pytest.mark.xdist_group("one cluster"),
]

TINY = (
    "--data data.txt --n-layer 1 --n-head 1 --n-embd 16 --seq-len 32 --batch-size 8 "
    "--log-every 1 --eval-every 50 --eval-tokens 1024 --sample-tokens 16 "
    "--device cpu --dtype float32 --wandb disabled"
).split()
HOST = socket.gethostname().split(".")[0]
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
SchedulerParameters=sched_interval=1
KillWait=10
MaxArraySize=4
GresTypes=gpu
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=16 Gres=gpu:{gpus}
NodeName=zz NodeAddr=127.0.0.1 Port={ports[2]} CPUs=16 Gres=gpu:{gpus}
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


def wait_for(condition, seconds=120):
    deadline = time.time() + seconds
    while not condition():
        assert time.time() < deadline, "waited too long: " + shell("scontrol", "show", "jobs")
        time.sleep(0.2)


@contextlib.contextmanager
def slurm(folder, proctrack):
    """A Slurm of two nodes that follows the processes of a job in one of its ways."""
    os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
    conf = CONF.format(
        folder=folder, host=HOST, ports=ports(3), proctrack=proctrack, gpus=len(GPUS)
    )
    (folder / "slurm.conf").write_text(conf)
    gres = [f"NodeName={node} Name=gpu File={gpu}\n" for node in (HOST, "zz") for gpu in GPUS]
    (folder / "gres.conf").write_text("".join(gres))
    (folder / "cgroup.conf").write_text("CgroupAutomount=yes\nCgroupPlugin=cgroup/v1\n")
    (folder / "munge.key").write_bytes(os.urandom(1024))
    (folder / "munge.key").chmod(0o400)
    folder.chmod(0o755)
    for parent in folder.parents:  # munge wants to be reachable by every user
        if parent != Path("/tmp") and str(parent).startswith("/tmp"):
            parent.chmod(0o755)
    daemons = []

    def daemon(*command):
        log = open(folder / f"{len(daemons)}-{command[0]}.log", "w")
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        daemons.append(process)

    files = [
        f"--socket={folder}/munge.socket",
        f"--key-file={folder}/munge.key",
        f"--log-file={folder}/munge.log",
        f"--pid-file={folder}/munge.pid",
        f"--seed-file={folder}/munge.seed",
    ]
    daemon("munged", "--foreground", "--force", "--num-threads=2", *files)
    wait_for((folder / "munge.socket").exists)
    daemon("slurmctld", "-D")
    daemon("slurmd", "-D", "-N", HOST)
    daemon("slurmd", "-D", "-N", "zz")

    def up():
        sinfo = ["sinfo", "-h", "-p", "gpu", "-o", "%D %t"]
        return subprocess.run(sinfo, capture_output=True, text=True).stdout == "2 idle\n"

    try:
        wait_for(up, 60)
        yield
    finally:
        os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
        subprocess.run(["scancel", "--user=root"])
        wait_for(lambda: not shell("squeue", "-h"), 30)
        for process in reversed(daemons):
            process.terminate()
            process.wait(20)


def copy_repo(repo):
    repo.mkdir()
    for name in ("train.py", "config.py", "sweep.sh", "slurm.sbatch"):
        shutil.copy(ROOT / name, repo)
    (repo / "data.txt").write_bytes(Path(os.__file__).with_name("argparse.py").read_bytes())
    if Path(sys.prefix, "bin/activate").exists():
        (repo / ".venv").symlink_to(sys.prefix)
    # the same at a pace that leaves time to disturb it
    text = (repo / "train.py").read_text()
    assert text.count("    # Report.\n") == 1
    pace = '    time.sleep(float(os.environ.get("PACE", 0.05)))\n'
    text = text.replace("    # Report.\n", pace + "    # Report.\n")
    (repo / "paced.py").write_text(text)
    # the same, but a process fails: in the fifth step, or before they have met
    text = text.replace("    # Report.\n", "    assert step < 5 or rank != 1\n    # Report.\n")
    (repo / "failing.py").write_text(text)
    text = text.replace("torch.manual_seed", "assert rank != 1\ntorch.manual_seed", 1)
    (repo / "stillborn.py").write_text(text)


@pytest.fixture(scope="module", autouse=True)
def environment():
    """As on a cluster's login node, with one CPU for each GPU: there are but a few."""
    before = Path.cwd(), dict(os.environ)
    os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    os.environ["SBATCH_CPUS_PER_GPU"] = "1"
    yield
    os.chdir(before[0])
    os.environ.clear()
    os.environ.update(before[1])


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slurm")
    copy_repo(folder / "repo")
    os.chdir(folder / "repo")
    with slurm(folder, "linuxproc"):
        yield


def sbatch(*flags):
    return shell("sbatch", "--parsable", *flags).strip()


def states(job):
    return re.findall(r"JobState=(\w+)", shell("scontrol", "show", "job", job))


def ended(job):
    over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
    wait_for(lambda: all(state in over for state in states(job)), 240)
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


def trains(job, name="gpt", starts=0):
    """Wait until the job has been started so many times again, and then until it takes steps."""
    wait_for(lambda: restarts(job) >= starts and states(job) == ["RUNNING"])
    run_dir = f"runs/{name}-{job}"
    there = len(metrics(run_dir))
    wait_for(lambda: len(metrics(run_dir)) > there + 5)


def test_a_run_its_log_and_what_can_be_wrong(cluster, tmp_path):
    os.environ["SBATCH_EXPORT"] = "NONE"
    plain = sbatch("--job-name=a/b c", "slurm.sbatch", *TINY, "--steps", 20)
    del os.environ["SBATCH_EXPORT"]
    named = sbatch("slurm.sbatch", "train.py", *TINY, "--steps", 20, "--run_dir", "runs/mine")
    tasks = sbatch("--ntasks=2", "slurm.sbatch", *TINY)
    typo = sbatch("slurm.sbatch", "--lrr", 1)
    away = sbatch(f"--chdir={tmp_path}", "slurm.sbatch", *TINY)
    for job in (plain, named):
        assert ended(job) == ["COMPLETED"], log(job)
    assert len(metrics(f"runs/a/b c-{plain}")) == len(metrics("runs/mine")) == 21
    assert log(plain).startswith("python train.py --run-dir runs/a/b\\ c-")
    assert f"\njob {plain}, start 0, on " in log(plain) and "commit" in log(plain)
    for job in (tasks, typo, away):
        assert ended(job) == ["FAILED"]
    assert "error: 2 tasks for 1 GPUs" in log(tasks)
    assert "Unrecognized options: --lrr" in log(typo)
    assert "error: no train.py in" in (tmp_path / f"slurm-{away}.log").read_text()


def test_disturbed_runs_end_with_the_numbers_of_a_whole_one(cluster):
    run = ("slurm.sbatch", "paced.py", *TINY, "--steps", 300)
    here = f"--nodelist={HOST}"
    both = sbatch("--nodes=2", *run)
    preempted = sbatch("--nodelist=zz", *run)
    graceful = sbatch("--nodelist=zz", "--partition=grace", *run)
    # Slurm looks at the time limits twice a minute
    limited = sbatch(here, "--time=1", "--signal=USR1@50", "--export=ALL,PACE=0.16", *run)
    requeued = sbatch(here, *run)
    whole = sbatch(here, *run)
    pair = sbatch(here, "--gpus-per-node=2", *run)  # as many processes as `both`
    for job in (both, requeued, preempted, graceful):
        trains(job)
    shell("scontrol", "requeue", requeued)
    urgent = sbatch("--partition=urgent", "--nodelist=zz", "--exclusive", "--wrap", "sleep 1")
    assert ended(urgent) == ["COMPLETED"]
    for job in (preempted, graceful, both):
        trains(job, starts=1)
    shell("scancel", "--signal=USR1", both)  # as near the time limit
    trains(both, starts=2)
    shell("scontrol", "update", "nodename=zz", "state=down", "reason=test")
    wait_for(lambda: restarts(both) == 3)
    resume = ["scontrol", "update", "nodename=zz", "state=resume"]
    subprocess.run(resume, stderr=subprocess.DEVNULL)  # it may be back already

    for job in (whole, limited, requeued, preempted, graceful):
        assert ended(job) == ["COMPLETED"], log(job)
        assert metrics(f"runs/gpt-{job}") == metrics(f"runs/gpt-{whole}")
        assert f"start {restarts(job)}, on " in log(job)
    assert len(metrics(f"runs/gpt-{whole}")) == 301 and restarts(whole) == 0
    assert "stopped by SIGUSR1 at step" in log(limited)
    assert f"requeued to go on; scancel {limited} ends it" in log(limited)
    assert "stopped by SIGTERM at step" in log(preempted)
    assert f"requeued to go on; scancel {graceful} ends it" in log(graceful)

    assert ended(both) == ended(pair) == ["COMPLETED"], log(both)
    assert f"on {HOST},zz" in log(both)
    assert log(both).count("stopped by SIGUSR1") == 1 and "stopped by SIGTERM" in log(both)
    assert metrics(f"runs/gpt-{both}") == metrics(f"runs/gpt-{pair}")
    for row, other in zip(metrics(f"runs/gpt-{pair}")[:20], metrics(f"runs/gpt-{whole}")):
        assert row == pytest.approx(other, rel=1e-3)  # float rounding, which training amplifies


def test_a_failure_or_scancel_ends_a_job(cluster):
    os.environ["SLURM_WAIT"] = "5"
    failing = sbatch("--gpus-per-node=2", "slurm.sbatch", "failing.py", *TINY)
    stillborn = sbatch("--gpus-per-node=2", "slurm.sbatch", "stillborn.py", *TINY)
    del os.environ["SLURM_WAIT"]
    run = ("slurm.sbatch", "paced.py", *TINY, "--steps", 5000)
    refused = sbatch("--no-requeue", *run)
    cancelled = sbatch(*run)
    trains(refused)
    trains(cancelled)
    shell("scancel", "--signal=USR1", refused)
    shell("scancel", cancelled)
    for job in (failing, stillborn, refused):
        assert ended(job) == ["FAILED"] and restarts(job) == 0, log(job)
        assert "requeued to go on" not in log(job)
    assert "AssertionError" in log(failing)
    again = f"to go on: sbatch slurm.sbatch paced.py --run-dir runs/gpt-{refused} --data"
    assert again in log(refused)
    assert ended(cancelled) == ["CANCELLED"] and restarts(cancelled) == 0
    wait_for(Path(f"runs/gpt-{cancelled}/checkpoint.pt").exists, 20)  # saved all the same
    assert "requeued to go on" not in log(cancelled)


def test_a_sweep_is_arrays_and_can_grow_while_they_wait(cluster):
    text = Path("sweep.sh").read_text()
    text = text.replace("1e-3 3e-3 1e-2 3e-2 1e-1", "1e-3 1e-2").replace("in 1 2", "in 1")
    Path("sweep.sh").write_text(text)
    sweep = ("bash", "sweep.sh", "slurm", "--partition=grace", "--hold", "--", *TINY, "--steps", 20)
    os.environ["JOBS"] = "2"
    out = shell(*sweep)
    del os.environ["JOBS"]
    jobs = re.findall("Submitted batch job (.*)", out)  # two arrays: 3 rows each at most
    assert len(jobs) == 2 and "0 of 4 runs are finished or in the queue" in out
    rows = shell("scontrol", "show", "job", jobs[0])
    assert "ArrayTaskId=1-3%2" in rows and "Partition=grace" in rows
    assert f"Dependency=afterany:{jobs[0]}" in shell("scontrol", "show", "job", jobs[1])
    Path("sweep.sh").write_text(text.replace("1e-3 1e-2", "1e-3 3e-3 1e-2"))
    out = shell(*sweep)
    assert "4 of 6 runs are finished or in the queue" in out
    jobs += re.findall("Submitted batch job (.*)", out)
    shell("scontrol", "release", *jobs)
    assert [ended(job) for job in jobs] == [["COMPLETED"] * 3, ["COMPLETED"], ["COMPLETED"] * 2]
    assert len(list(Path("runs/muon-or-adamw").glob("*/result.json"))) == 6
    assert Path(f"runs/muon-or-adamw/slurm-{jobs[0]}_3.log").exists()
    assert "6 of 6 runs are finished" in shell(*sweep)
    table = shell("bash", "sweep.sh", *TINY, "--steps", 20).splitlines()[-7:]
    assert table[0].startswith("val_loss") and table[1] < table[6]


@pytest.mark.parametrize("proctrack", ["pgid", "cgroup"])
def test_other_ways_to_follow_processes(proctrack, tmp_path_factory):
    """A signal reaches other processes of a job; the first cluster's way is linuxproc."""
    if proctrack == "cgroup" and not os.access("/sys/fs/cgroup/freezer", os.W_OK):
        pytest.skip("needs cgroups")
    folder = tmp_path_factory.mktemp(proctrack)
    copy_repo(folder / "repo")
    os.chdir(folder / "repo")
    with slurm(folder, proctrack):
        run = ("slurm.sbatch", "paced.py", *TINY, "--steps", 60)
        warned = sbatch("--gpus-per-node=2", *run)
        cancelled = sbatch(*run[:-1], 5000)
        trains(warned)
        shell("scancel", "--signal=USR1", warned)
        trains(cancelled)
        shell("scancel", cancelled)
        assert ended(warned) == ["COMPLETED"] and restarts(warned) == 1, log(warned)
        assert len(metrics(f"runs/gpt-{warned}")) == 61
        assert ended(cancelled) == ["CANCELLED"]
        wait_for(Path(f"runs/gpt-{cancelled}/checkpoint.pt").exists, 20)
        assert restarts(cancelled) == 0
