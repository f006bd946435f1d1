"""The launch scripts: what they would do, what they do to a simulated cloud, and how they fail.

No script finds anything here but the tools that are linked into its PATH and the stand-ins below.
"""

import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import yaml

ROOT = pathlib.Path(__file__).parents[1]
STARTERS = ("quickstart.sh", "test.sh")
SCRIPTS = ("gpu_local.sh", "gpu_slurm.sh", "kubernetes.sh", "tpu_pod.sh")
TOOLS = (
    "basename bash cat cp date dirname env flock grep gzip head mkdir mktemp nohup rm sed sh sleep "
    "tail tar touch tr true wc"
).split()
AWKWARD = """--config.data.path=a 'b'  "c" $(d) ${e} `f` & \\ * #"""
TRAINING = ["--config=configs/digits.py", "--workdir=gs://bucket/a run", AWKWARD]
UP = ["up", "--zone=z", "--type=v6e-16", "--poll=0.05"]
NEEDED = {
    "gpu_local.sh": [],
    "gpu_slurm.sh": [],
    "kubernetes.sh": ["--image=repository/image:1", "--gpus=8"],
    "tpu_pod.sh": UP,
}

RECORD = """#!/usr/bin/env bash
{ printf '%q ' "$(basename "$0")" "$@"; echo; } >> "$WORLD/calls"
"""
# Ends as the next line of `endings` says: with an exit code, by a preemption, or when `now` exists.
# Without a further line it ends with 0.
TRAINING_PROGRAM = """#!/usr/bin/env bash
printf '%s\\0' "$@" > "$WORLD/argv"
echo "a line of the log"
code="$(head -n 1 "$WORLD/endings" 2> /dev/null || true)"
[[ -z "$code" ]] || sed -i 1d "$WORLD/endings"
case "$code" in
  preempted) echo PREEMPTED > "$WORLD/state" && exit 143 ;;
  later) until [[ -f "$WORLD/now" ]]; do sleep 0.02; done && exit 0 ;;
  *) exit "${code:-0}" ;;
esac
"""
# One host represents all: their commands run here, with its folder as the home folder.
GCLOUD = (
    RECORD
    + """
state="$(cat "$WORLD/state" 2> /dev/null)"
case "$*" in
  *describe*)
    [[ ! -f "$WORLD/offline" ]] || { echo "ERROR: no route to host" >&2; exit 1; }
    if [[ "$3" == queued-resources && -n "$state" ]]; then
      echo "$state"
      [[ "$state" == FAILED ]] || echo READY > "$WORLD/state"
    elif [[ "$state" == READY || "$state" == PREEMPTED ]]; then
      echo "$state"
    else
      echo "ERROR: (gcloud.compute.tpus.$3.describe) NOT_FOUND: Resource 'x' was not found" >&2
      exit 1
    fi
    ;;
  *create*) echo WAITING_FOR_RESOURCES > "$WORLD/state" && mkdir -p "$WORLD/host" ;;
  *delete*) rm -rf "$WORLD/state" "$WORLD/host" || true ;;
  *scp*) cp "$5" "$WORLD/host/" ;;
  *ssh*)
    [[ "$*" != *"tail -n 5"* || ! -f "$WORLD/host/sop_jax/run.log" ]] || echo >> "$WORLD/looks"
    [[ ! -f "$WORLD/looks" || "$(wc -l < "$WORLD/looks")" -lt 3 ]] || touch "$WORLD/now"
    for argument; do
      if [[ "$argument" == --command=* ]]; then
        cd "$WORLD/host" && HOME="$PWD" exec bash -c "${argument#--command=}"
      fi
    done
    ;;
esac
"""
)
UV = (
    RECORD
    + """
[[ "$1" != venv ]] || { mkdir -p .venv/bin && cp "$WORLD/bin/python" .venv/bin/python; }
"""
)
# Installs uv in the folder that is asked for.
PIP = (
    RECORD
    + """
for argument; do
  [[ "$argument" != --target=* ]] || folder="${argument#--target=}"
done
mkdir -p "$folder/bin" && cp "$WORLD/bin/uv" "$folder/bin/uv"
"""
)


class World:
    """A checkout, and a PATH with only the programs that a test puts there."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder = folder
        self.bin = folder / "bin"
        self.bin.mkdir()
        for tool in TOOLS:
            path = shutil.which(tool)
            if path is None:
                pytest.skip(f"needs {tool}")
            (self.bin / tool).symlink_to(path)
        self.checkout = folder / "check out"
        shutil.copytree(ROOT / "launch", self.checkout / "launch")
        for name in ("setup.py", "pyproject.toml", "configs/digits.py", "sop_jax/__init__.py"):
            (self.checkout / name).parent.mkdir(exist_ok=True)
            shutil.copy(ROOT / name, self.checkout / name)
        # A test installs nothing.
        (self.checkout / "launch" / "environment.sh").write_text('use_environment() { uv "$1"; }\n')

    def put(self, **programs: str) -> None:
        for name, text in programs.items():
            program = self.bin / name.replace("_", "-")
            program.write_text(text)
            program.chmod(0o755)

    def cloud(self, *endings: str, state: str = "") -> None:
        """Simulates gcloud with a slice, whose trainings end as given, and succeed after that."""
        self.put(gcloud=GCLOUD, python=TRAINING_PROGRAM, uv=UV, python3=PIP, pkill=RECORD)
        (self.folder / "endings").write_text("".join(f"{ending}\n" for ending in endings))
        if state:
            (self.folder / "state").write_text(f"{state}\n")
            (self.folder / "host").mkdir()

    def environment(self) -> dict[str, str]:
        folder = str(self.folder)
        return {"PATH": str(self.bin), "WORLD": folder, "HOME": "/nowhere", "TMPDIR": folder}

    def run(
        self, script: str, *arguments: str, code: int = 0, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [self.checkout / "launch" / script, *arguments],
            cwd=self.checkout,
            env={**self.environment(), **variables},
            capture_output=True,
            text=True,
            timeout=20,
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done

    def calls(self) -> list[list[str]]:
        calls = self.folder / "calls"
        return (
            [shlex.split(line) for line in calls.read_text().splitlines()] if calls.exists() else []
        )

    def verbs(self) -> list[str]:
        """Returns the changes that gcloud was asked for, in order."""
        verbs = []
        for call in self.calls():
            if call[0] != "gcloud" or call[4] == "describe":
                continue
            text = " ".join(call)
            kind = "install" if "uv pip" in text else "start" if "nohup" in text else "look"
            verbs.append(kind if call[4] == "ssh" else call[4])
        return [verb for verb in verbs if verb != "look"]

    def argv(self) -> list[str]:
        """Returns the arguments of the training."""
        return (self.folder / "argv").read_text().split("\0")[:-1]


@pytest.fixture
def world(tmp_path: pathlib.Path) -> World:
    return World(tmp_path)


def commands(text: str) -> list[list[str]]:
    """Returns what a dry run printed."""
    return [shlex.split(line) for line in text.splitlines() if not line.startswith("#")]


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_the_words_at_the_head_of_the_script(world: World, script: str) -> None:
    done = world.run(script, "--help")
    assert done.stdout.startswith("Pretrains on ")
    assert f"launch/{script}" in done.stdout and "--dry-run" in done.stdout
    assert "#" not in done.stdout and "set -e" not in done.stdout and not done.stderr


@pytest.mark.parametrize("script", [*STARTERS, *SCRIPTS])
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_does_nothing_else_and_has_an_example(world: World, script: str, flag: str) -> None:
    world.put(python3=RECORD, python=RECORD, uv=RECORD, nvidia_smi=RECORD, srun=RECORD)
    world.put(ruff=RECORD, gcloud=RECORD, kubectl=RECORD)
    done = world.run(script, flag, *([] if script in STARTERS else ["--config=no/such"]))
    assert not world.calls() and not done.stderr
    assert f"launch/{script}" in done.stdout
    assert "For example" in done.stdout or "--config=NAME" in done.stdout
    assert not list(world.checkout.glob(".venv*"))


# Makes virtual environments, whose Python is this program again.
PYTHON = (
    RECORD
    + """
[[ "$*" != "-m venv "* ]] || { mkdir -p "$3/bin" && cp "$0" "$3/bin/python"; }
"""
)


def test_tests_have_an_environment_of_their_own(world: World) -> None:
    """Their compiler for TPUs makes every command print errors on a machine without TPUs."""
    shutil.copy(ROOT / "launch" / "environment.sh", world.checkout / "launch")
    world.put(python3=PYTHON, ruff=RECORD, mypy=RECORD, shellcheck=RECORD, cmp="exit 1")
    environments = {}
    for script in STARTERS:
        world.run(script)
        installs = [call for call in world.calls() if call[1:4] == ["-m", "pip", "install"]]
        (venv,) = [call[3] for call in world.calls() if call[1:3] == ["-m", "venv"]]
        environments[venv] = installs[0][-1]
        (world.folder / "calls").unlink()
    assert environments == {".venv": ".[plot]", ".venv-test": ".[test]"}


def test_every_tier_of_tests_is_part_of_the_next(world: World) -> None:
    shutil.copy(ROOT / "launch" / "environment.sh", world.checkout / "launch")
    world.put(python3=PYTHON, ruff=RECORD, mypy=RECORD, shellcheck=RECORD, cmp="exit 1")
    marked = [set(), {"medium"}, {"slow"}, {"medium", "slow"}]
    tiers = []
    for tier in (["--fast"], [], ["--all"]):
        world.run("test.sh", *tier, "-k", "memory")
        *_, expression, also, words = next(call for call in world.calls() if "pytest" in call)
        assert (also, words) == ("-k", "memory")
        (world.folder / "calls").unlink()
        names = [{name: name in marks for name in ("medium", "slow")} for marks in marked]
        tiers.append([not expression or eval(expression, {}, marks) for marks in names])
    assert tiers == [
        [True, False, False, False],
        [True, True, False, False],
        [True, True, True, True],
    ]
    tests = "".join(file.read_text() for file in (ROOT / "tests").rglob("test_*.py"))
    used = re.findall(r"^(?:@|pytestmark = )pytest\.mark\.(medium|slow)$", tests, re.MULTILINE)
    assert set(used) == {"medium", "slow"}


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(
    ("option", "words"),
    [
        (
            "--config=configs/digts.py",
            "there is no recipe configs/digts.py; --config must be .* one of: digits",
        ),
        ("--config=digit", "there is no recipe digit; --config must be .* one of: digits"),
        ("--workdir=", "--workdir is empty; give it a value .is a shell variable not set"),
        ("--config=", "--config is empty"),
        ("--config.data.path=", "--config.data.path is empty"),
    ],
)
def test_dry_run_refuses_what_cannot_be(world: World, script: str, option: str, words: str) -> None:
    done = world.run(script, "--dry-run", *NEEDED[script], *TRAINING, option, code=2)
    assert re.search(f"^error: .*{words}", done.stderr), done.stderr
    assert done.stderr.count("\n") == 1 and not done.stdout


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("config", ["digits", "digits:argument", "configs/digits.py"])
def test_recipes_are_found_by_name_and_by_file(world: World, script: str, config: str) -> None:
    arguments = ["--dry-run", *NEEDED[script], f"--config={config}", "--workdir=gs://bucket/run"]
    assert f"--config={config}" in world.run(script, *arguments).stdout


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("option", ["--confg=x", "--dry-runs", "word", "--zoned=x", "--poll 3="])
def test_an_unknown_option_is_one_line(world: World, script: str, option: str) -> None:
    done = world.run(script, *NEEDED[script], *TRAINING, option, code=2)
    assert f"error: unknown option {option}" in done.stderr
    assert done.stderr.count("\n") == 1 and not done.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_what_is_missing_is_named(world: World, script: str) -> None:
    given = [*NEEDED[script], "--config=configs/digits.py", "--workdir=gs://bucket/run"]
    for option in given:
        name, equals, _ = option.partition("=")
        if not equals or name == "--poll":
            continue
        done = world.run(script, *(other for other in given if other != option), code=2)
        assert re.search(rf"^error: {name}=\S* .*missing", done.stderr), done.stderr
        assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_dry_run_needs_nothing_and_starts_nothing(world: World, script: str) -> None:
    arguments = ["--dry-run", *NEEDED[script], *TRAINING]
    bare = world.run(script, *arguments)
    world.put(**dict.fromkeys(("gcloud", "kubectl", "python", "srun", "scontrol"), RECORD))
    world.put(nvidia_smi=RECORD, uv=RECORD, python3=RECORD)
    again = world.run(script, *arguments)
    assert not world.calls()
    assert not bare.stderr and not again.stderr
    assert "sop_jax.train" in bare.stdout
    temporary = re.compile(r"\S+/sop_jax.tgz")
    assert temporary.sub("", bare.stdout) == temporary.sub("", again.stdout)


class TestLocal:
    def test_dry_run(self, world: World) -> None:
        done = world.run("gpu_local.sh", "--dry-run", *TRAINING, "--", "--alsologtostderr")
        smi, environment, flags, training = commands(done.stdout)
        assert smi[0] == "nvidia-smi"
        assert environment == ["use_environment", ".[cuda,gcs]"]  # for the bucket
        assert flags == ["use_gpu_flags"]
        module = ["exec", "python", "-m", "sop_jax.train", "--processes=1"]
        assert training == [*module, *TRAINING, "--alsologtostderr"]

    def test_run(self, world: World) -> None:
        world.put(nvidia_smi=RECORD + "echo 0, NVIDIA X, 80 GB, 580\n", uv=UV)
        world.put(python=TRAINING_PROGRAM)
        local = ["--config=configs/digits.py", "--workdir=runs/x", AWKWARD]
        done = world.run("gpu_local.sh", *local)
        assert "NVIDIA X" in done.stdout
        assert [call[:2] for call in world.calls()][1:] == [["uv", ".[cuda]"]]
        assert world.argv() == ["-m", "sop_jax.train", "--processes=1", *local]

    def test_the_exit_code_is_the_training_s(self, world: World) -> None:
        world.put(nvidia_smi=RECORD, uv=RECORD, python="#!/usr/bin/env bash\nexit 130\n")
        world.run("gpu_local.sh", *TRAINING, code=130)

    def test_without_a_gpu(self, world: World) -> None:
        world.put(uv=RECORD, python=RECORD)
        done = world.run("gpu_local.sh", *TRAINING, code=1)
        assert "there is no nvidia-smi" in done.stderr
        assert not world.calls()


OVERLAP = [
    "--xla_gpu_enable_latency_hiding_scheduler=true",
    "--xla_gpu_enable_pipelined_all_reduce=true",
    "--xla_gpu_enable_pipelined_all_gather=true",
    "--xla_gpu_enable_pipelined_reduce_scatter=true",
]


class TestFlags:
    """Flags of XLA, which a stand-in for Python records, as XLA reads them in any process."""

    PYTHON = '#!/usr/bin/env bash\necho "$XLA_FLAGS" >> "$WORLD/flags"\n'

    def seen(self, world: World, **variables: str) -> list[list[str]]:
        local = ["--config=configs/digits.py", "--workdir=runs/x"]
        world.run("gpu_local.sh", *local, **variables)
        return [line.split() for line in (world.folder / "flags").read_text().splitlines()]

    def test_they_are_tried_before_the_training_has_them(self, world: World) -> None:
        world.put(nvidia_smi=RECORD, uv=RECORD, python=self.PYTHON)
        assert self.seen(world) == [OVERLAP, OVERLAP]

    def test_those_of_the_user_are_kept(self, world: World) -> None:
        world.put(nvidia_smi=RECORD, uv=RECORD, python=self.PYTHON)
        own = "--xla_dump_to=x --xla_gpu_enable_pipelined_all_gather=false"
        tried, used = self.seen(world, XLA_FLAGS=own)
        assert tried == used == [*own.split(), *OVERLAP[:2], OVERLAP[3]]

    def test_without_them_it_trains_where_xla_does_not_know_them(self, world: World) -> None:
        refuses = self.PYTHON + '[[ "$*" == *sop_jax* ]] || exit 1\n'
        world.put(nvidia_smi=RECORD, uv=RECORD, python=refuses)
        assert self.seen(world) == [OVERLAP, []]

    @pytest.mark.medium
    def test_the_installed_xla_knows_them_and_ends_with_others(self) -> None:
        def code(flags: str) -> int:
            command = [sys.executable, "-c", "import jax; jax.devices()"]
            variables = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
            return subprocess.run(command, env=variables, capture_output=True).returncode

        assert code(" ".join(OVERLAP)) == 0
        assert code("--xla_gpu_enable_what_no_xla_knows=true") != 0


class TestSlurm:
    JOB = {"SLURM_JOB_ID": "77", "SLURM_CPUS_PER_TASK": "5"}

    def test_what_the_job_asks_for(self) -> None:
        lines = (ROOT / "launch" / "gpu_slurm.sh").read_text().splitlines()
        asked = [line.split()[1] for line in lines if line.startswith("#SBATCH")]
        before = lines[: lines.index("set -euo pipefail")]
        assert sum(line.startswith("#SBATCH") for line in before) == len(asked)  # SLURM stops here
        values = dict(option.partition("=")[::2] for option in asked)
        assert values["--ntasks-per-node"] == values["--gpus-per-node"]
        assert values["--signal"] == "INT@120"  # to the tasks: no B:
        assert "--requeue" in values and values["--open-mode"] == "append"
        assert not [option for option in values if option.startswith("--gpus-per-task")]

    def test_dry_run(self, world: World) -> None:
        done = world.run("gpu_slurm.sh", "--dry-run", *TRAINING)
        environment, flags, srun, requeue = commands(done.stdout)
        assert environment == ["use_environment", ".[cuda,gcs]"]
        assert flags == ["use_gpu_flags"]
        assert srun[0] == "srun" and "--cpus-per-task=8" in srun and "--gpu-bind=none" in srun
        waiting = ["sop_jax.train", "--wait=600"]  # for the previous job, which may still be saving
        assert srun[-7:] == [".venv/bin/python", "-m", *waiting, *TRAINING]
        assert requeue[-3:] == ["scontrol", "requeue", "JOB"]

    @pytest.mark.parametrize("code", [0, 1, 2, 130, 137])
    def test_a_saved_run_goes_back_to_the_queue(self, world: World, code: int) -> None:
        world.put(uv=RECORD, srun=f"{RECORD}exit {code}\n", scontrol=RECORD)
        world.run("gpu_slurm.sh", *TRAINING, code=code, **self.JOB)
        environment, srun, *requeue = world.calls()
        assert environment[0] == "uv"
        assert "--cpus-per-task=5" in srun and srun[-3:] == TRAINING
        assert requeue == ([["scontrol", "requeue", "77"]] if code == 130 else [])

    def test_a_job_that_may_not_be_requeued(self, world: World) -> None:
        world.put(uv=RECORD, srun="#!/usr/bin/env bash\nexit 130\n", scontrol=f"{RECORD}exit 1\n")
        done = world.run("gpu_slurm.sh", *TRAINING, code=130, **self.JOB)
        assert "submit it again" in done.stderr

    def test_tasks_that_are_not_as_many_as_gpus(self, world: World) -> None:
        world.put(uv=RECORD, srun=RECORD)
        job = self.JOB | {"SLURM_NTASKS_PER_NODE": "8", "SLURM_GPUS_ON_NODE": "4"}
        done = world.run("gpu_slurm.sh", *TRAINING, code=2, **job)
        assert "8 tasks and 4 GPUs" in done.stderr and not world.calls()

    def test_the_runs_of_a_job_array_have_workdirs_of_their_own(self, world: World) -> None:
        world.put(uv=RECORD, srun=RECORD)
        job = self.JOB | {"SLURM_ARRAY_TASK_ID": "3"}
        done = world.run("gpu_slurm.sh", *TRAINING, code=2, **job)
        assert "would share --workdir=gs://bucket/a run; write %a" in done.stderr
        assert not world.calls()
        own = ["--config=digits", "--workdir=runs/%a", "--config.seed=%a", "--", "--x=%a"]
        world.run("gpu_slurm.sh", *own, **job)
        expected = ["--config=digits", "--workdir=runs/3", "--config.seed=3", "--x=3"]
        assert world.calls()[-1][-4:] == expected

    def test_outside_a_job(self, world: World) -> None:
        world.put(uv=RECORD, srun=RECORD)
        assert "sbatch" in world.run("gpu_slurm.sh", *TRAINING, code=2).stderr
        assert not world.calls()

    def test_a_copy_that_slurm_runs_says_where_it_belongs(self, world: World) -> None:
        copied = world.folder / "slurm_script"
        shutil.copy(ROOT / "launch" / "gpu_slurm.sh", copied)
        for folder, code in ((world.folder, 2), (world.checkout, 0)):
            done = subprocess.run(
                [copied, "--dry-run", *TRAINING],
                cwd=folder,
                env={"PATH": str(world.bin)},
                capture_output=True,
                text=True,
            )
            assert done.returncode == code, done.stderr
            assert ("root of the checkout" in done.stderr) == (code == 2)


class TestKubernetes:
    def manifest(self, world: World, *arguments: str) -> tuple[dict, dict]:
        text = world.run("kubernetes.sh", "--dry-run", *arguments, *TRAINING).stdout
        assert "__" not in text.split("apiVersion", 1)[1]
        service, job = yaml.safe_load_all(text)
        return service, job

    def consistent(self, service: dict, job: dict, hosts: int) -> dict:
        """Checks what all jobs have in common, and returns the spec of the pods."""
        name = job["metadata"]["name"]
        spec = job["spec"]
        pod = spec["template"]["spec"]
        assert (service["kind"], job["kind"]) == ("Service", "Job")
        assert service["metadata"]["name"] == pod["subdomain"] == name
        assert service["spec"]["clusterIP"] == "None"
        assert service["spec"]["selector"] == {"job-name": name}
        assert spec["completionMode"] == "Indexed"
        assert spec["completions"] == spec["parallelism"] == hosts
        assert spec["backoffLimit"] == 10 * hosts
        disruption, saved, fatal = spec["podFailurePolicy"]["rules"]
        assert disruption["action"] == saved["action"] == "Ignore"
        assert disruption["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
        assert saved["onExitCodes"]["values"] == [130]
        assert (fatal["action"], fatal["onExitCodes"]["values"]) == ("FailJob", [1, 2])
        (container,) = pod["containers"]
        assert {saved["onExitCodes"]["containerName"], container["name"]} == {"train"}
        assert pod["restartPolicy"] == "Never"
        assert container["image"] == "i"
        command = container["command"]
        if "nvidia.com/gpu" in container["resources"]["limits"]:
            assert command[:2] == ["bash", "-c"] and command[3] == "bash"
            assert command[2] == 'source launch/flags.sh && use_gpu_flags && exec "$@"'
            command = command[4:]
        assert command[:3] == ["python", "-m", "sop_jax.train"]
        processes = [f"--coordinator={name}-0.{name}:8476", f"--processes={hosts}"]
        processes += ["--process=$(JOB_COMPLETION_INDEX)"]
        expected = processes if hosts > 1 else ["--processes=1"]
        assert command[3:-3] == [*expected, "--wait=600"]
        # Kubernetes reads $$ as $, and expands variables after a single $.
        given = command[-3:]
        assert not re.search(r"(?<!\$)(\$\$)*\$(?!\$)", " ".join(given))
        assert [argument.replace("$$", "$") for argument in given] == TRAINING
        assert {mount["name"] for mount in container["volumeMounts"]} == {
            volume["name"] for volume in pod["volumes"]
        }
        return pod

    def test_gpus(self, world: World) -> None:
        made = self.manifest(world, "--image=i", "--gpus=8", "--hosts=4", "--name=run-b")
        pod = self.consistent(*made, hosts=4)
        assert made[1]["metadata"]["name"] == "run-b"
        assert pod["containers"][0]["resources"] == {"limits": {"nvidia.com/gpu": "8"}}
        assert pod["nodeSelector"] == {}

    def test_one_host(self, world: World) -> None:
        self.consistent(*self.manifest(world, "--image=i", "--gpus=1"), hosts=1)

    @pytest.mark.parametrize(
        ("kind", "topology", "chips", "hosts"),
        [
            ("tpu-v6e-slice", "4x8", 4, 8),
            ("tpu-v5p-slice", "4x4x8", 4, 32),
            ("tpu-v5-lite-podslice", "2x4", 8, 1),
        ],
    )
    def test_tpus(self, world: World, kind: str, topology: str, chips: int, hosts: int) -> None:
        options = [f"--tpu={kind}", f"--topology={topology}", f"--chips={chips}", "--spot"]
        pod = self.consistent(*self.manifest(world, "--image=i", *options), hosts=hosts)
        assert pod["containers"][0]["resources"] == {"limits": {"google.com/tpu": str(chips)}}
        assert pod["nodeSelector"] == {
            "cloud.google.com/gke-tpu-accelerator": kind,
            "cloud.google.com/gke-tpu-topology": topology,
            "cloud.google.com/gke-spot": "true",
        }
        assert "cloud.google.com/gke-spot" in [rule["key"] for rule in pod["tolerations"]]

    def test_a_claim(self, world: World) -> None:
        options = ["--image=i", "--gpus=8", "--hosts=2", "--claim=disk"]
        pod = self.consistent(*self.manifest(world, *options), hosts=2)
        claims = [v["persistentVolumeClaim"] for v in pod["volumes"] if v["name"] == "data"]
        assert claims == [{"claimName": "disk"}]
        config = "--config=configs/digits.py"
        world.run("kubernetes.sh", "--dry-run", *options, config, "--workdir=/data/run")

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (["--gpus=8", "--workdir=/data/x"], "--workdir must be gs://"),
            (["--gpus=8", "--claim=c", "--workdir=/elsewhere"], "--workdir must be gs://"),
            (["--gpus=8", "--tpu=tpu-v6e-slice"], "exclude each other"),
            (["--tpu=tpu-v6e-slice"], "--topology=... is missing"),
            (["--tpu=tpu-v6e-slice", "--topology=4*8"], "--topology=4*8"),
            (["--tpu=tpu-v6e-slice", "--topology=1x2"], "hosts of 4 chips"),
            (["--tpu=tpu-v6e-slice", "--topology=4x9"], "no --topology=4x9; did you mean 4x8"),
            (["--tpu=tpu-v5p-slice", "--topology=4x8"], "--topology=4x8 must have the form 2x2x4"),
            (["--tpu=tpu-v6e-slice", "--topology=4x8", "--hosts=3"], "--hosts is for GPUs"),
            (["--gpus=8", "--topology=4x8"], "--topology and --chips are for TPUs"),
            (["--gpus=8", "--chips=4"], "--topology and --chips are for TPUs"),
            (["--gpus=8", "--claim="], "--claim is empty"),
            (["--gpus=eight"], "eight is not a number"),
            (["--gpus=8", "--name=A_b"], "--name=A_b"),
            (["--gpus=8", "--config.x=a\nb"], "more than one line"),
        ],
    )
    def test_what_cannot_be(self, world: World, arguments: list[str], words: str) -> None:
        world.put(kubectl=RECORD)
        done = world.run("kubernetes.sh", "--image=i", *TRAINING, *arguments, code=2)
        assert words in done.stderr
        assert not world.calls()

    def test_kubectl_gets_what_the_dry_run_prints(self, world: World) -> None:
        world.put(kubectl=f'{RECORD}cat > "$WORLD/applied"\n')
        arguments = ["--image=i", "--gpus=8", "--namespace=space", *TRAINING]
        world.run("kubernetes.sh", *arguments)
        assert world.calls() == [["kubectl", "apply", "--namespace=space", "--filename=-"]]
        printed = world.run("kubernetes.sh", "--dry-run", *arguments).stdout
        assert (world.folder / "applied").read_text() == printed


class TestTpu:
    def test_dry_run(self, world: World) -> None:
        options = ["--spot", "--create=--reserved", "--name=n", "--project=p"]
        done = world.run("tpu_pod.sh", *UP, "--dry-run", *options, *TRAINING)
        create, describe, tar, scp, install, start, look, delete = commands(done.stdout)
        tpus = ["gcloud", "compute", "tpus"]
        where = ["--zone=z", "--project=p"]
        assert create == [
            *(*tpus, "queued-resources", "create", "n", "--node-id=n"),
            *("--accelerator-type=v6e-16", "--runtime-version=v2-alpha-tpuv6e"),
            *("--spot", "--reserved", *where),
        ]
        assert describe == [*tpus, "tpu-vm", "describe", "n", "--format=value(state)", *where]
        assert tar[0] == "tar" and tar[-4:] == ["setup.py", "pyproject.toml", "sop_jax", "configs"]
        assert scp == [*tpus, "tpu-vm", "scp", tar[2], "n:", "--worker=all", *where]
        for ssh, worker in ((install, "all"), (start, "all"), (look, "0")):
            assert ssh[:7] == [*tpus, "tpu-vm", "ssh", "n", f"--worker={worker}"]
            assert ssh[7].startswith("--command=") and ssh[8:] == where
        assert ".[tpu,gcs]" in install[7] and "nohup" in start[7] and "run.log" in look[7]
        assert delete == [*tpus, "queued-resources", "delete", "n", "--force", "--quiet", *where]

    @pytest.mark.parametrize(
        ("kind", "runtime"),
        [
            ("v5litepod-64", "v2-alpha-tpuv5-lite"),
            ("v5p-128", "v2-alpha-tpuv5"),
            ("v6e-64", "v2-alpha-tpuv6e"),
            ("v4-32", "tpu-ubuntu2204-base"),
        ],
    )
    def test_the_runtime_follows_from_the_type(self, world: World, kind: str, runtime: str) -> None:
        arguments = ["create", "--dry-run", "--zone=z", f"--type={kind}"]
        assert f"--runtime-version={runtime} " in world.run("tpu_pod.sh", *arguments).stdout
        own = world.run("tpu_pod.sh", *arguments, "--runtime=mine").stdout
        assert "--runtime-version=mine " in own

    @pytest.mark.parametrize(
        ("option", "words"),
        [
            ("--type=v6e-65", "there is no --type=v6e-65; did you mean v6e-64"),
            ("--type=v5litepod-3", "did you mean v5litepod-4"),
            ("--type=v5p-130", "did you mean v5p-128"),
            ("--type=v7-8", "give v2, v3, v4, v5litepod, v5p or v6e and a size"),
            ("--type=v6e", "--type=v6e has no valid size"),
            ("--type=v6e-4x4", "--type=v6e-4x4 has no valid size"),
            ("--type=", "--type is empty"),
            ("--zone=", "--zone is empty"),
            ("--poll=soon", "--poll=soon is not a number of seconds"),
            ("--config=sop_jax/__init__.py", "must be a file in configs/"),
        ],
    )
    def test_what_cannot_be(self, world: World, option: str, words: str) -> None:
        done = world.run("tpu_pod.sh", *UP, "--dry-run", *TRAINING, option, code=2)
        assert words in done.stderr and not done.stdout

    @pytest.mark.parametrize("action", ["create", "install", "run", "status", "stop", "delete"])
    def test_each_action_has_a_dry_run(self, world: World, action: str) -> None:
        world.put(gcloud=RECORD)
        arguments = [action, "--dry-run", "--zone=z", "--type=v6e-8", *TRAINING]
        assert commands(world.run("tpu_pod.sh", *arguments).stdout)
        assert not world.calls()

    @pytest.mark.parametrize(
        ("changed", "words"),
        [
            ("--workdir=runs/x", "--workdir must be gs://"),
            ("--workdir=gs://", "--workdir must be gs://"),
            ("--config=configs/none.py", "there is no recipe configs/none.py"),
            ("--config=/etc/passwd", "--config must be a file in configs/"),
        ],
    )
    def test_checked_before_anything_costs_money(
        self, world: World, changed: str, words: str
    ) -> None:
        world.cloud()
        assert words in world.run("tpu_pod.sh", *UP, *TRAINING, changed, code=2).stderr
        assert not world.calls()

    def test_from_nothing_to_a_finished_run(self, world: World) -> None:
        world.cloud()
        done = world.run("tpu_pod.sh", *UP, *TRAINING)
        assert world.verbs() == ["create", "scp", "install", "start"]
        assert world.argv() == ["-m", "sop_jax.train", "--wait=600", *TRAINING]
        assert "a line of the log" in done.stdout
        assert "tpu_pod.sh delete --name=sop-jax --zone=z" in done.stdout
        assert (world.folder / "host/sop_jax/configs/digits.py").exists()
        uv = [call for call in world.calls() if call[0] == "uv"]
        assert uv[-1] == ["uv", "pip", "install", "--quiet", "-e", ".[tpu,gcs]"]
        (pip,) = [call for call in world.calls() if call[0] == "python3"]
        assert re.fullmatch(r"uv==[0-9.]+", pip[-1])

    def test_prepare(self, world: World) -> None:
        world.cloud(state="READY")
        command = "--prepare=echo 'a  b' > data.txt; false || true"
        world.run("tpu_pod.sh", "install", "--zone=z", command)
        assert (world.folder / "host/sop_jax/data.txt").read_text() == "a  b\n"
        world.run("tpu_pod.sh", "install", "--zone=z", "--prepare=exit 3", code=3)

    def test_release_gives_the_slice_back(self, world: World) -> None:
        world.cloud()
        world.run("tpu_pod.sh", *UP, "--release", *TRAINING)
        assert world.verbs()[-1] == "delete" and not (world.folder / "state").exists()

    def test_a_preemption(self, world: World) -> None:
        world.cloud("preempted")
        world.run("tpu_pod.sh", *UP, *TRAINING)
        once = ["create", "scp", "install", "start"]
        assert world.verbs() == [*once, "delete", *once]

    @pytest.mark.parametrize("code", [1, 2])
    def test_what_a_person_must_mend_ends_it(self, world: World, code: int) -> None:
        world.cloud(str(code))
        done = world.run("tpu_pod.sh", *UP, *TRAINING, code=code)
        assert world.verbs() == ["create", "scp", "install", "start"]
        assert f"ended with {code}" in done.stdout

    def test_an_error_of_before_is_none_of_now(self, world: World) -> None:
        world.cloud("1")
        world.run("tpu_pod.sh", *UP, *TRAINING, code=1)
        world.run("tpu_pod.sh", *UP, *TRAINING)
        assert world.verbs().count("start") == 2 and world.verbs().count("create") == 1

    def test_a_saved_or_crashed_training_is_started_again(self, world: World) -> None:
        world.cloud("134", "130")
        world.run("tpu_pod.sh", *UP, *TRAINING)
        assert world.verbs() == ["create", *(["scp", "install", "start"] * 3)]

    def test_but_not_for_ever(self, world: World) -> None:
        world.cloud(*["134"] * 20)
        done = world.run("tpu_pod.sh", *UP, *TRAINING, code=1)
        assert world.verbs().count("start") == 10
        assert "crashed 10 times on this slice" in done.stdout

    def test_a_training_that_runs_is_left_alone(self, world: World) -> None:
        world.cloud("later", state="READY")
        run = ["run", "--zone=z", *TRAINING]
        world.run("tpu_pod.sh", "install", "--zone=z")
        world.run("tpu_pod.sh", *run)
        assert "it is already running" in world.run("tpu_pod.sh", *run).stdout
        refused = world.run("tpu_pod.sh", "install", "--zone=z", code=1)
        assert "a training is running here" in refused.stdout
        status = world.run("tpu_pod.sh", "status", "--zone=z").stdout.splitlines()
        assert (status[0], status[-1]) == ("READY", "running")
        before = world.verbs()
        done = world.run("tpu_pod.sh", *UP, *TRAINING)
        assert world.verbs() == before
        assert "running" in done.stdout and "finished" in done.stdout

    def test_create_waits_for_the_slice(self, world: World) -> None:
        world.cloud()
        arguments = ["create", "--zone=z", "--type=v6e-8", "--poll=0.05"]
        done = world.run("tpu_pod.sh", *arguments)
        assert world.verbs() == ["create"]
        assert done.stdout.splitlines()[-1].endswith("READY")

    def test_a_request_that_fails(self, world: World) -> None:
        world.cloud(state="FAILED")
        done = world.run("tpu_pod.sh", *UP, *TRAINING, code=1)
        assert "describe sop-jax" in done.stdout and not world.verbs()

    def test_what_gcloud_cannot_report_is_waited_for(self, world: World) -> None:
        """The slice is neither created again nor deleted, because it may be training."""
        world.cloud(state="READY")
        (world.folder / "offline").touch()
        with pytest.raises(subprocess.TimeoutExpired):
            subprocess.run(
                [world.checkout / "launch" / "tpu_pod.sh", *UP, *TRAINING],
                env=world.environment(),
                capture_output=True,
                timeout=2,
            )
        assert len(world.calls()) > 1 and not world.verbs()

    def test_stop_signals_only_the_training(self, world: World) -> None:
        world.cloud(state="READY")
        world.run("tpu_pod.sh", "stop", "--zone=z")
        pkill = world.calls()[-1]
        assert pkill[:3] == ["pkill", "-TERM", "-f"]
        assert re.match(pkill[3], ".venv/bin/python -m sop_jax.train --config=x")
        assert not re.match(pkill[3], f"bash -c pkill -TERM -f {pkill[3]}")

    def test_delete(self, world: World) -> None:
        world.cloud(state="READY")
        world.run("tpu_pod.sh", "delete", "--zone=z")
        assert world.verbs() == ["delete"]


def test_the_scripts_can_be_started() -> None:
    for script in SCRIPTS:
        assert os.access(ROOT / "launch" / script, os.X_OK)
