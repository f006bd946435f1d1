"""What launch/tpu_pod.sh does on the hosts of a slice, in empty home folders of this machine.

Only `gcloud` is a stand-in: it runs the commands for each host in its home folder. The hosts have
CPU devices, but find each other as on a slice, by the names of the workers.
"""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys

import bucket as buckets
import processes
import programs
import pytest

# One worker of pytest runs all tests with real programs, because each needs both cores.
pytestmark = [pytest.mark.xdist_group("real"), pytest.mark.slow]

HOSTS = 2
PORT = 8482  # of the first worker, where the others find it
FILES = programs.ROOT / ".venv-real"
GCLOUD = f"""#!{sys.executable}
import json, os, pathlib, shutil, subprocess, sys

verb = sys.argv[4]
options = dict(word[2:].partition("=")[::2] for word in sys.argv if word.startswith("--"))
hosts = json.loads(pathlib.Path(__file__).with_name("hosts.json").read_text())
chosen = hosts if options.get("worker") == "all" else hosts[:1]
if verb == "describe":
    print("READY")
elif verb == "scp":
    for host in chosen:
        shutil.copy(sys.argv[5], host["HOME"])
elif verb == "ssh":
    shell = ["bash", "-c", options["command"]]
    running = [subprocess.Popen(shell, cwd=host["HOME"], env=host) for host in chosen]
    sys.exit(max(each.wait() for each in running))
else:
    sys.exit(f"unexpected: {{sys.argv}}")
"""


class Slice:
    """The hosts of a slice, whose workdir is in a bucket."""

    def __init__(self, folder: pathlib.Path, bucket: buckets.Bucket) -> None:
        self.bin, self.hosts = folder / "bin", [folder / f"home-{i}" for i in range(HOSTS)]
        of_bucket = bucket.variables()
        names = ("GCSFS_", "GOOGLE_", "STORAGE_", "TENSORSTORE_", "XLA_", "JAX_", "NPROC", "OMP_")
        common = {name: of_bucket[name] for name in of_bucket if name.startswith(names)} | {
            "PATH": os.environ["PATH"],
            "JAX_FORCE_TPU_INIT": "1",  # looks for a slice although there is no TPU
            "TPU_WORKER_HOSTNAMES": ",".join(["localhost"] * HOSTS),
            # Of several slices; JAX would ask the metadata server of the cloud for them.
            **{
                f"MEGASCALE_{name}": ""
                for name in ("COORDINATOR_ADDRESS", "NUM_SLICES", "SLICE_ID")
            },
            # The files of .ci/install stand for PyPI.
            "PIP_NO_INDEX": "1",
            "PIP_FIND_LINKS": str(FILES / "wheels"),
            "UV_OFFLINE": "1",
            "UV_CACHE_DIR": str(FILES / "uv"),
            "UV_PYTHON_DOWNLOADS": "never",
        }
        for home in self.hosts:
            home.mkdir()
        self.bin.mkdir()
        own = [
            common | {"HOME": str(home), "TPU_WORKER_ID": str(i)}
            for i, home in enumerate(self.hosts)
        ]
        (self.bin / "hosts.json").write_text(json.dumps(own))
        (self.bin / "gcloud").write_text(GCLOUD)
        (self.bin / "gcloud").chmod(0o755)

    def call(self, action: str, *arguments: str) -> str:
        """Runs launch/tpu_pod.sh as a user does, and returns its output."""
        done = subprocess.run(
            [programs.ROOT / "launch" / "tpu_pod.sh", action, "--zone=z", *arguments],
            env=os.environ | {"PATH": f"{self.bin}:{os.environ['PATH']}"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, f"{done.stdout}\n{self.says()}"
        return done.stdout

    def says(self) -> str:
        """Returns the logs of the training on all hosts."""
        logs = [home / "sop_jax" / "run.log" for home in self.hosts]
        return "\n".join(log.read_text() for log in logs if log.exists())

    def trainings(self, host: int) -> list[int]:
        """Returns the numbers of the processes that train on a host."""
        home = str(self.hosts[host])
        return programs.processes(
            lambda each: (
                each.command.startswith(".venv/bin/python -m sop_jax.train")
                and each.variables.get("HOME") == home
            )
        )

    def step(self) -> int:
        """Returns the last step that the first host's log shows."""
        shown = re.findall(r"^step (\d+)/", self.says(), re.MULTILINE)
        return int(shown[-1]) if shown else 0

    def code(self) -> str:
        """Returns what `status` says of the training: running, or its exit code."""
        return self.call("status").splitlines()[-1]

    def wait_for_end(self) -> str:
        programs.wait_for(
            "the end of the training",
            lambda: not any(map(self.trainings, range(HOSTS))),
            self.says,
        )
        return self.code()


def test_hosts_install_train_and_go_on_after_one_was_lost_and_after_a_stop(
    tmp_path: pathlib.Path,
) -> None:
    if not (FILES / "host-files").exists():
        pytest.skip("needs what a host of a slice installs; .ci/install gets it")
    if processes.taken(PORT):
        pytest.skip(f"needs the port {PORT}, which is taken")
    with buckets.start(tmp_path, faults=False) as bucket:
        pod = Slice(tmp_path, bucket)
        workdir = f"gs://{buckets.NAME}/run"
        run = ["--config=digits", *programs.arguments(workdir)[1:]]
        pod.call("install")
        for home in pod.hosts:
            assert (home / "sop_jax" / ".venv" / "bin" / "python").exists()

        pod.call("run", *run)
        assert pod.code() == "running"
        programs.wait_for("step 6", lambda: pod.step() >= 6, pod.says)
        (lost,) = pod.trainings(1)
        os.kill(lost, signal.SIGKILL)  # as a preemption does that gives no notice
        assert pod.wait_for_end() not in ("0", "2", "130", "running"), pod.says()

        before = len(pod.says())
        pod.call("run", *run)
        programs.wait_for(
            "a step", lambda: re.search(r"\nstep \d+/", pod.says()[before:]), pod.says
        )
        pod.call("stop")
        assert pod.wait_for_end() == "130", pod.says()
        saved = re.findall(r"interrupted; step (\d+) of \d+ is saved", pod.says())[0]

        pod.call("run", *run)
        assert pod.wait_for_end() == "0", pod.says()
        assert f"steps {saved} to {programs.STEPS}" in pod.says()
        assert "on 2 cpu devices of 2 processes" in pod.says()
        bucket.download("run", tmp_path / "downloaded")
        rows = (tmp_path / "downloaded" / "metrics.jsonl").read_text().splitlines()
        steps = [json.loads(row)["step"] for row in rows]
        assert steps == list(range(1, programs.STEPS + 1))
