"""What launch/kubernetes.sh asks of Kubernetes, and what its pods run, without a cluster."""

import contextlib
import pathlib
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator

import programs
import pytest
import yaml
from test_train import assert_same_run

from sop_jax.training import checkpoint

# One worker of pytest runs all tests with real programs, because each needs both cores.
pytestmark = [pytest.mark.xdist_group("real"), pytest.mark.slow]

DOCKERFILE = programs.ROOT / "launch" / "Dockerfile"
TRAINING = ["--image=repository/image:1", "--config=digits", "--workdir=gs://bucket/run"]
HOSTS = pathlib.Path("/etc/hosts")
VOLUME = pathlib.Path("/data")  # where --claim is mounted


def manifest(*arguments: str) -> str:
    """Returns what launch/kubernetes.sh would apply."""
    script = [programs.ROOT / "launch" / "kubernetes.sh", "--dry-run", *arguments]
    return subprocess.run(script, check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize("version", ["1.28", "1.37"])  # the oldest that is supported, and a new one
def test_manifests_have_no_unknown_or_misplaced_field(tmp_path: pathlib.Path, version: str) -> None:
    validate = programs.installed("kubernetes-validate")
    options = {
        "gpus": ["--gpus=8", "--hosts=4", "--claim=disk"],
        "one": ["--gpus=1"],
        "tpus": ["--tpu=tpu-v6e-slice", "--topology=4x8", "--spot"],
    }
    for name, given in options.items():
        (tmp_path / f"{name}.yaml").write_text(manifest(*given, *TRAINING))
    wrong = (tmp_path / "one.yaml").read_text().replace("backoffLimit", "backofLimit")
    command = [validate, f"--kubernetes-version={version}", "--strict"]
    files = sorted(tmp_path.glob("*.yaml"))
    done = subprocess.run([*command, *files], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("passed for resource job/") == len(files)
    (tmp_path / "wrong.yaml").write_text(wrong)
    done = subprocess.run([*command, tmp_path / "wrong.yaml"], capture_output=True, text=True)
    assert done.returncode != 0 and "backofLimit" in done.stdout + done.stderr


def test_the_dockerfile_is_clean() -> None:
    hadolint = programs.installed("hadolint")
    done = subprocess.run([hadolint, DOCKERFILE], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def build(image: pathlib.Path, extra: str) -> subprocess.CompletedProcess[str]:
    """Does what the Dockerfile says in a folder, except that pip only says what it would install.

    Args:
        image: the folder, which must not exist.
        extra: the value of EXTRA.
    """
    image.mkdir()
    text = DOCKERFILE.read_text().replace("\\\n", "")
    steps = [line.partition(" ")[::2] for line in text.splitlines() if line[:1].isupper()]
    assert [step for step, _ in steps] == ["FROM", "ARG", "WORKDIR", *["COPY"] * 4, "RUN"]
    run = ""
    for step, words in steps:
        if step == "COPY":
            *files, to = words.split()
            for file in files:
                source, target = programs.ROOT / file, image / to
                if to.endswith("/"):
                    target.mkdir(exist_ok=True)
                if source.is_dir():
                    shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
                else:
                    shutil.copy(source, target)
        elif step == "RUN":
            run = words
    return subprocess.run(
        ["sh", "-c", f'pip() {{ echo "$@"; }}; {run}'],
        cwd=image,
        env={"EXTRA": extra},
        capture_output=True,
        text=True,
    )


def test_the_image_has_what_its_devices_need(tmp_path: pathlib.Path) -> None:
    setup = (programs.ROOT / "setup.py").read_text()
    for extra, installed in {"cuda": "cuda,gcs", "tpu": "tpu,gcs", "cpu": "gcs"}.items():
        built = build(tmp_path / extra, extra)
        assert built.stdout.split()[-2:] == ["-e", f".[{installed}]"], built.stderr
        assert all(f'"{name}": [' in setup for name in installed.split(","))
    wrong = build(tmp_path / "wrong", "gpu")
    assert wrong.returncode == 2 and "give cuda, tpu or cpu" in wrong.stderr


@contextlib.contextmanager
def cluster(name: str, volume: pathlib.Path) -> Iterator[None]:
    """Gives this machine the name of the first pod, and mounts the volume."""
    before = HOSTS.read_bytes()
    VOLUME.symlink_to(volume)
    try:
        HOSTS.write_bytes(before.rstrip(b"\n") + f"\n127.0.0.1 {name}-0.{name}\n".encode())
        yield
    finally:
        VOLUME.unlink()
        HOSTS.write_bytes(before)


def test_two_pods_find_each_other_stop_and_resume(
    whole: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """They run the container's command in the image's folder; one is evicted, and all restart."""
    programs.need_root()
    if VOLUME.exists() or VOLUME.is_symlink():
        pytest.skip(f"needs the place of {VOLUME}, which exists")
    image, volume = tmp_path / "image", tmp_path / "volume"
    build(image, "cpu")
    volume.mkdir()
    workdir = VOLUME / "run"
    _, job = yaml.safe_load_all(
        manifest(
            *("--image=i", "--gpus=1", "--hosts=2", "--claim=disk", "--name=run-a"),
            *("--config=digits", *programs.arguments(workdir)[1:]),
        )
    )
    (container,) = job["spec"]["template"]["spec"]["containers"]

    def pods(stack: contextlib.ExitStack) -> list[programs.Program]:
        """Starts both pods with only the variables that they would have."""
        started = []
        for index in range(2):
            indexed = {
                "HOME": "/root",
                "HOSTNAME": f"run-a-{index}",
                "JOB_COMPLETION_INDEX": str(index),
                "KUBERNETES_SERVICE_HOST": "10.0.0.1",
                "KUBERNETES_SERVICE_PORT": "443",
                "PATH": f"{pathlib.Path(sys.executable).parent}:/usr/bin:/bin",
            }
            command = [expand(word, indexed) for word in container["command"]]
            here = programs.environment(PYTHONPATH=str(image))  # as `pip install -e` does
            jax = {key: here[key] for key in here if re.match("JAX_|XLA_|PYTHON|NPROC|OMP_", key)}
            log = tmp_path / f"{index}.log"
            started.append(stack.enter_context(programs.start(command, log, indexed | jax, image)))
        return started

    with cluster("run-a", volume):
        with contextlib.ExitStack() as stack:
            both = pods(stack)
            programs.wait_for_step(workdir, 4, both[0].says)
            both[1].popen.send_signal(signal.SIGTERM)
            saved = job["spec"]["podFailurePolicy"]["rules"][1]["onExitCodes"]["values"]
            assert [[pod.end()] for pod in both] == [saved, saved], both[0].says()
        step = checkpoint.latest_step(workdir)
        assert step is not None and step >= 4
        with contextlib.ExitStack() as stack:
            both = pods(stack)
            assert [pod.end() for pod in both] == [0, 0], both[0].says()
        assert f"steps {step} to {programs.STEPS}" in both[0].says()
        assert "on 2 cpu devices of 2 processes" in both[0].says()
        assert "--xla_gpu_enable_latency_hiding_scheduler=true" in both[0].says()
        assert_same_run(volume / "run", whole)


def expand(word: str, variables: dict[str, str]) -> str:
    """Returns a word of a container's command as Kubernetes expands it."""
    return re.sub(
        r"\$\$|\$\((\w+)\)",
        lambda found: "$" if found[0] == "$$" else variables.get(found[1], found[0]),
        word,
    )
