"""Runs that SLURM starts, on a cluster of two nodes that are both this machine."""

import contextlib
import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator

import processes
import programs
import pytest
from test_train import assert_same_run

from sop_jax.monitor.metrics import read_metrics
from sop_jax.training import checkpoint

# One worker of pytest runs all tests with real programs, because each needs both cores.
pytestmark = [pytest.mark.xdist_group("real"), pytest.mark.slow]

# JAX finds process 0 by the name of the first node, which must be a name of this machine. Nothing
# here has privileges or accounts to protect, so nobody proves who they are.
CONF = """
ClusterName=test
SlurmctldHost=localhost
SlurmctldPort={controller}
AuthType=auth/none
CredType=cred/none
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/controller.pid
SlurmdPidFile={folder}/%n.pid
ProctrackType=proctrack/pgid
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=none
GresTypes=gpu
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0
KillWait=5
NodeName={host} NodeHostname={host} NodeAddr=localhost Port={first} CPUs=1 Gres=gpu:1
NodeName={host}-b NodeHostname={host} NodeAddr=localhost Port={second} CPUs=1 Gres=gpu:1
PartitionName=all Nodes=ALL Default=YES
"""
# The training has a GPU by SLURM's count, but uses the CPU.
GRES = "NodeName={0},{0}-b Name=gpu File=/dev/null\n"
PYTHON = f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n'


class Cluster:
    """A cluster, and a checkout from which jobs are submitted."""

    def __init__(self, folder: pathlib.Path, stack: contextlib.ExitStack) -> None:
        self.stack = stack
        self.conf = folder / "slurm.conf"
        self.checkout = folder / "checkout"
        self.log = folder / "log"
        host = socket.gethostname()
        self.nodes = [host, f"{host}-b"]
        names = ("controller", "first", "second")
        ports = {name: processes.free_port() for name in names}
        self.conf.write_text(CONF.format(folder=folder, host=host, **ports))
        (folder / "gres.conf").write_text(GRES.format(host))
        (folder / "state").mkdir()
        shutil.copytree(programs.ROOT / "launch", self.checkout / "launch")
        shutil.copy(programs.ROOT / "setup.py", self.checkout)
        # The environment that a user installs before the first job.
        (self.checkout / ".venv" / "bin").mkdir(parents=True)
        shutil.copy(programs.ROOT / "setup.py", self.checkout / ".venv" / "installed-cuda")
        python = self.checkout / ".venv" / "bin" / "python"
        python.write_text(PYTHON)
        python.chmod(0o755)

    def variables(self, **more: str) -> dict[str, str]:
        return programs.environment(SLURM_CONF=str(self.conf), **more)

    def start(self) -> None:
        """Starts the cluster, which the stack stops, and waits until both nodes are idle."""
        self.stack.callback(self.kill)  # also jobs, which have sessions of their own
        self.stack.enter_context(programs.start(["slurmctld", "-D"], self.log, self.variables()))
        for node in self.nodes:
            self.start_node(node)

        def idle() -> bool:
            sinfo = ["sinfo", "--noheader", "--Node", "--format=%T"]
            found = subprocess.run(sinfo, env=self.variables(), capture_output=True, text=True)
            return found.stdout.split() == ["idle", "idle"]

        programs.wait_for("two idle nodes", idle, self.says, timeout=60)

    def start_node(self, node: str) -> None:
        """Starts the daemon of a node, and waits until it takes jobs."""
        says = f"slurmd-{node}: slurmd started"
        before = self.log.read_text().count(says)
        # All that runs on the node has this variable: SLURM gives it to the tasks of jobs.
        variables = self.variables(SLURMD_NODENAME=node)
        self.stack.enter_context(programs.start(["slurmd", "-D", "-N", node], self.log, variables))
        programs.wait_for(
            says, lambda: self.log.read_text().count(says) > before, self.says, timeout=60
        )

    def kill(self, **variables: str) -> None:
        """Kills all processes of the cluster, or those with the given variables."""
        wanted = {"SLURM_CONF": str(self.conf)} | variables
        for pid in programs.processes(lambda each: each.variables.items() >= wanted.items()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def call(self, *command: object) -> str:
        """Runs a command of SLURM as a user does, and returns its output."""
        done = subprocess.run(
            list(map(str, command)),
            cwd=self.checkout,
            env=self.variables(),
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def submit(self, *command: object) -> str:
        """Submits launch/gpu_slurm.sh, and returns the number of the job."""
        size = ["--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1"]
        return self.call("sbatch", "--parsable", *size, *command)

    def state(self, job: str) -> str:
        """Returns the state of a job, or of one of an array; "" if it is no longer known."""
        return self.call("squeue", "--noheader", "--states=all", "--format=%T", f"--jobs={job}")

    def says(self) -> str:
        """Returns the output of all jobs and daemons."""
        files = [*self.checkout.glob("slurm-*.out"), self.log]
        return "\n".join(f"{file.name}:\n{file.read_text()[-4000:]}" for file in files)

    def wait(self, job: str, *states: str) -> None:
        programs.wait_for(f"{states} of {job}", lambda: self.state(job) in states, self.says)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    programs.need("slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "squeue")
    programs.need_root()
    with contextlib.ExitStack() as stack:
        cluster = Cluster(tmp_path_factory.mktemp("slurm"), stack)
        cluster.start()
        yield cluster


def test_a_job_goes_on_after_it_was_requeued_and_after_a_node_was_lost(
    cluster: Cluster, whole: pathlib.Path
) -> None:
    """Two tasks find each other; the run ends as if it had not been interrupted."""
    workdir = cluster.checkout / "runs" / "two"
    job = cluster.submit("--nodes=2", "launch/gpu_slurm.sh", *programs.arguments(workdir))
    programs.wait_for_step(workdir, 4, cluster.says)
    cluster.call("scontrol", "requeue", job)
    cluster.wait(job, "PENDING")
    saved = checkpoint.latest_step(workdir)
    assert saved is not None and saved >= 4
    cluster.call("scontrol", "update", f"JobId={job}", "StartTime=now")  # not in two minutes

    programs.wait_for_step(workdir, saved + 3, cluster.says)
    lost = cluster.nodes[1]
    cluster.call("scontrol", "update", f"NodeName={lost}", "State=DOWN", "Reason=test")
    cluster.wait(job, "PENDING")
    assert not (workdir / "summary.json").exists()
    # The node comes back as after a reboot. If its daemon went on instead, it could report the end
    # of the lost job when the next has begun, and SLURM would take the node from that one.
    cluster.kill(SLURMD_NODENAME=lost)
    cluster.start_node(lost)
    cluster.call("scontrol", "update", f"NodeName={lost}", "State=RESUME")
    cluster.call("scontrol", "update", f"JobId={job}", "StartTime=now")
    cluster.wait(job, "COMPLETED")
    log = (cluster.checkout / f"slurm-{job}.out").read_text()
    assert len(re.findall("on 2 cpu devices of 2 processes", log)) == 3, log
    assert f"steps {saved} to {programs.STEPS}" in log
    assert_same_run(workdir, whole)


def test_runs_of_an_array_save_before_their_time_limit_and_when_they_are_stopped(
    cluster: Cluster,
) -> None:
    """Each has its own workdir; one reaches its time limit, and both are stopped as documented."""
    flags = programs.arguments("runs/%a", steps=10**6, checkpoint_every=10**5)
    array = cluster.submit(
        *("--nodes=1", "--array=0-1", "launch/gpu_slurm.sh", *flags, "--config.seed=%a")
    )
    runs = [cluster.checkout / "runs" / str(index) for index in range(2)]
    for run in runs:
        programs.wait_for_step(run, 2, cluster.says)
    limited, other = (f"{array}_{index}" for index in range(2))
    elapsed = cluster.call("squeue", "--noheader", "--format=%M", f"--jobs={limited}")
    minutes = int(elapsed.split(":")[-2]) + 2  # the script asks for a signal before that is over
    cluster.call("scontrol", "update", f"JobId={limited}", f"TimeLimit={minutes}")
    programs.wait_for(
        "the save before the time limit",
        lambda: checkpoint.latest_step(runs[0]) and cluster.state(limited) == "PENDING",
        cluster.says,
    )
    saved = checkpoint.latest_step(runs[0])
    assert saved is not None
    cluster.call("scontrol", "update", f"JobId={limited}", "TimeLimit=60", "StartTime=now")
    programs.wait_for_step(runs[0], saved + 1, cluster.says)
    assert cluster.state(other) == "RUNNING" and checkpoint.latest_step(runs[1]) is None

    for job in (limited, other):
        cluster.call("scontrol", "update", f"JobId={job}", "Requeue=0")
        cluster.call("scancel", "--signal=INT", job)
    for job, run in zip((limited, other), runs, strict=True):
        cluster.wait(job, "FAILED")  # with exit code 130
        assert json.loads((run / "config.json").read_text())["seed"] == int(run.name)
        assert checkpoint.latest_step(run) == read_metrics(run)[-1]["step"]
