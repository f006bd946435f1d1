"""Tasks that two processes of a test do together: `python two_hosts.py TASK OUT.npz ... FLAGS`."""

import json
import pathlib
import sys
from typing import Any

import jax
import layouts
import numpy as np
import pytest
from absl import flags
from jax.experimental.multihost_utils import process_allgather

from sop_jax import cli
from sop_jax import config as config_lib
from sop_jax.data.pipeline import train_batches
from sop_jax.data.sources import open_source
from sop_jax.evaluate import Asked, evaluate
from sop_jax.parallel.mesh import host_rows, make_mesh, to_devices
from sop_jax.training import checkpoint
from sop_jax.training.assemble import assemble


def trajectory(folder: str) -> None:
    """Saves the trajectories of the small run on eight devices, for mesh.fsdp=1 and mesh.fsdp=2."""
    assert (jax.process_count(), jax.device_count()) == (2, 8)
    for fsdp in (1, 2):
        with pytest.MonkeyPatch.context() as monkeypatch:
            save(f"{folder}/{fsdp}.npz", layouts.trajectory(monkeypatch, data=0, fsdp=fsdp))


def methods(folder: str) -> None:
    """Saves the trajectory of every method's small run on eight devices."""
    for method in layouts.METHODS:
        with pytest.MonkeyPatch.context() as monkeypatch:
            save(f"{folder}/{method}.npz", layouts.trajectory(monkeypatch, data=0, method=method))


def restore(out: str, workdir: str) -> None:
    """Saves the newest state of a run and the batch of its next step."""
    config = config_lib.read_config(workdir)
    config.mesh.data = 0
    mesh = make_mesh()
    run = assemble(config, mesh, images=100)
    state = checkpoint.restore(workdir, run.abstract)
    source = open_source(config.data, "train")
    assert source is not None
    rows = host_rows(mesh, config.batch_size)
    batches = train_batches(source, config, run.model.patch, int(state.step), rows)
    batch = to_devices(mesh, next(batches))
    batches.close()
    state = state._replace(key=jax.random.key_data(state.key))
    save(out, layouts.named(process_allgather({"state": state, "batch": batch}, tiled=True)))


def shuffle(out: str) -> None:
    """Saves a batch put on devices in an unusual order, and the rows that each process made."""
    batch = np.arange(24).reshape(8, 3)
    found = {}
    for order in ((0, 2, 1, 3), (3, 0, 2, 1)):
        mesh = make_mesh(devices=[jax.devices()[i] for i in order])
        rows = np.array(host_rows(mesh, len(batch)))
        name = "".join(map(str, order))
        found[f"{name}/rows"] = process_allgather(rows)
        found |= process_allgather(to_devices(mesh, {name: batch[rows]}), tiled=True)
    save(out, found)


def evaluations(out: str, workdir: str, plan: str) -> None:
    """Evaluates a run by several tasks, and saves the results as JSON, from both processes.

    The plan is a JSON file with the name of each task, its settings and its data.
    """
    asked = Asked(workdir=workdir, out=f"{out}-files")
    results = [
        evaluate(asked, name, {key: _tuple(x) for key, x in changes.items()}, data)["results"]
        for name, changes, data in json.loads(pathlib.Path(plan).read_text())
    ]
    pathlib.Path(f"{out}-{jax.process_index()}.json").write_text(json.dumps(results))


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def save(out: str, arrays: dict[str, np.ndarray]) -> None:
    if jax.process_index() == 0:
        np.savez(out, **arrays)


def main() -> None:
    tasks = (trajectory, methods, restore, shuffle, evaluations)
    {task.__name__: task for task in tasks}[TASK](*arguments)


if __name__ == "__main__":
    TASK = sys.argv.pop(1)
    arguments = [word for word in sys.argv[1:] if not word.startswith("--")]
    sys.argv = [sys.argv[0], *(word for word in sys.argv if word.startswith("--"))]
    cli.run(main)
    assert flags.FLAGS.is_parsed()
