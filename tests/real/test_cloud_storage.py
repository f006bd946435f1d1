"""A run whose images and workdir are in a bucket of Google Cloud Storage, as an emulator has it."""

import pathlib
import signal
import sys

import bucket as buckets
import programs
import pytest
from test_train import assert_same_run, paint

from sop_jax.errors import LOST

# One worker of pytest runs all tests with real programs, because each needs both cores.
pytestmark = [pytest.mark.xdist_group("real"), pytest.mark.slow]

CHANGES = {"data.source": "folder", "data.threads": 8, "mesh.data": 1, "steps": 12}


def finish(command: list[str], log: pathlib.Path, variables: dict[str, str]) -> None:
    """Runs a training to its end; starts it again while storage fails, as the launchers do."""
    for _ in range(10):
        with programs.start(command, log, variables) as program:
            code = program.end()
        if code != LOST:
            break
    assert code == 0, program.says()


def test_a_run_in_a_bucket_is_the_same_as_on_disk(tmp_path: pathlib.Path) -> None:
    """It is killed and resumed while one request in twenty fails or loses its reply."""
    for split, count in (("train", 12), ("val", 4)):
        for name in ("a", "b"):
            paint(tmp_path / "images" / split / name, count)
    run = tmp_path / "run"
    command = programs.training(run, **CHANGES | {"data.path": tmp_path / "images"})
    with programs.start(command, tmp_path / "disk.log") as program:
        assert program.end() == 0, program.says()

    with buckets.start(tmp_path, faults=True) as bucket:
        for file in (tmp_path / "images").rglob("*.png"):
            bucket.put(str(file.relative_to(tmp_path)), file.read_bytes())
        variables = bucket.variables()
        address = f"gs://{buckets.NAME}"
        command = programs.training(
            f"{address}/run", **CHANGES | {"data.path": f"{address}/images"}
        )
        log = tmp_path / "bucket.log"
        with programs.start(command, log, variables) as program:
            programs.wait_for(
                "step 7",
                lambda: "step 7/" in program.says() or program.popen.poll() == LOST,
                program.says,
            )
            program.popen.send_signal(signal.SIGKILL)
            program.end()
        finish(command, log, variables)
        bucket.download("run", tmp_path / "downloaded")
        assert_same_run(tmp_path / "downloaded", run)
        assert "run/owner.json" not in bucket.names("run/")
        assert bucket.refused and bucket.lost

        def call(name: str, *flags: str) -> None:
            module = [sys.executable, "-m", f"sop_jax.{name}", f"--workdir={address}/run", *flags]
            with programs.start(module, tmp_path / f"{name}.log", variables) as program:
                assert program.end() == 0, program.says()

        call("extract", f"--images={address}/images/val", f"--out={address}/features.npz")
        assert "features.npz" in bucket.names("features")
        call("evaluate", "--task=knn", f"--data.path={address}/images")
        assert any(name.endswith(".json") for name in bucket.names("run/evaluations/"))
        call("convert", "--export=ibot", f"--to={address}/ibot.safetensors")
        assert "ibot.safetensors" in bucket.names("ibot")
