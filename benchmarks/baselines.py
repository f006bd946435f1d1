"""Measures raw pixels, or an untrained network, by a task of sop_jax.evaluate.

    python benchmarks/baselines.py --workdir=RUN --network=pixels --task=knn
    python benchmarks/baselines.py --workdir=RUN --network=untrained --task=linear --set epochs=20

The data, the sizes of images and the network are those of the run. The features of an image are
the pixels of its crop minus the mean image of the train split, or those of the network that the run
started with. --data is other data, and --set changes a setting of the task.
"""

import argparse
import ast
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sop_jax.data.sources import Source  # noqa: E402
from sop_jax.evaluation.features import host_batches  # noqa: E402
from sop_jax.evaluation.task import Subject, View  # noqa: E402
from sop_jax.evaluation.tasks import TASKS  # noqa: E402
from sop_jax.evaluation.tools import Toolbox  # noqa: E402
from sop_jax.evaluation.views import view_of  # noqa: E402
from sop_jax.models import Model, Params, build  # noqa: E402
from sop_jax.parallel.mesh import make_mesh, put, replicated  # noqa: E402
from sop_jax.pretrained import settings_of  # noqa: E402


def mean_image(source: Source, view: View) -> np.ndarray:
    """Returns the mean of the crops of a source, float32 [crop, crop, 3]."""
    total, count = np.zeros((view.crop, view.crop, 3)), 0
    for batch in host_batches(source, view, 500, 0, 1):
        total += batch["image"][batch["valid"]].sum(axis=0, dtype=np.float64)
        count += int(batch["valid"].sum())
    return (total / count).astype(np.float32)


def pixels(config: ml_collections.ConfigDict, mean: np.ndarray) -> tuple[Model, Params]:
    """Returns a network whose only token is all pixels, in [0, 1], minus the mean image."""
    model = build(config, config.augment.global_size)

    def features(params, images, mask=None, last=1, norm=True):
        return [((images.astype(jnp.float32) - params["mean"]) / 255).reshape(len(images), 1, -1)]

    return model._replace(features=features), {"mean": jnp.asarray(mean)}


def untrained(config: ml_collections.ConfigDict) -> tuple[Model, Params]:
    """Returns the network with which a run begins."""
    model = build(config, config.augment.global_size)
    _, key, _ = jax.random.split(jax.random.key(config.seed), 3)  # as `state.init_state`
    return model, jax.jit(model.init)(key)


def main() -> None:
    """Prints the table of the task and a JSON line with its results."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--workdir", required=True)
    parser.add_argument("--network", required=True, choices=["pixels", "untrained"])
    parser.add_argument("--task", default="knn", choices=sorted(TASKS))
    parser.add_argument("--data")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    args = parser.parse_args()
    task, config = TASKS[args.task], settings_of(args.workdir)
    settings = task.settings()
    for change in args.set:
        key, _, value = change.partition("=")
        settings[key] = ast.literal_eval(value)
    if args.network == "pixels":  # one layer, and no patches
        settings.update({"layers": 1, "pool": "cls"})
    inputs = task.open(config, settings, {"path": args.data} if args.data else {})
    if args.network == "pixels":
        train = task.sources(inputs)["train"]
        assert train is not None
        model, params = pixels(config, mean_image(train, view_of(config)))
    else:
        model, params = untrained(config)
    mesh = make_mesh()
    params = jax.tree.map(lambda leaf: put(np.asarray(leaf), replicated(mesh)), params)
    subject = Subject(args.network, config, model, params, args.network, None)
    results = task.run(subject, inputs, settings, Toolbox(subject, mesh, seed=config.seed))
    print(task.table(results, settings))
    print(json.dumps(results))


if __name__ == "__main__":
    main()
