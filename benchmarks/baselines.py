r"""Compares the network of a run with the same network untrained, and with raw pixels.

    python benchmarks/baselines.py --workdir=RUN --tasks=knn,linear --out=results.jsonl \
        --set=linear.epochs=20
    python benchmarks/baselines.py --out=results.jsonl --table

Each measurement is appended to --out when it is finished, and is not repeated; an interrupted one
resumes. --table prints all of them. The data, the sizes of images and the network are those of the
run. The features of `pixels` are the pixels of a crop minus the mean image of the train split; they
cannot be fine-tuned. --data is other data.
"""

import argparse
import ast
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from etils import epath

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rows import append, check_out, read  # noqa: E402

from sop_jax.data.sources import Source  # noqa: E402
from sop_jax.evaluation.features import host_batches  # noqa: E402
from sop_jax.evaluation.tables import standard_error, text_of  # noqa: E402
from sop_jax.evaluation.task import Subject, View  # noqa: E402
from sop_jax.evaluation.tasks import TASKS  # noqa: E402
from sop_jax.evaluation.tools import Toolbox  # noqa: E402
from sop_jax.evaluation.views import VIEW_RULES, view_of  # noqa: E402
from sop_jax.models import Model, Params, build  # noqa: E402
from sop_jax.parallel.interruption import Interruption  # noqa: E402
from sop_jax.parallel.mesh import make_mesh, put, replicated  # noqa: E402
from sop_jax.pretrained import load_network, settings_of  # noqa: E402


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


KEYS = ("task", "network")  # what every row has
NETWORKS = ("pixels", "untrained", "trained")
# The accuracies of each task, with the names of their standard errors or deviations.
SHOWN = {
    "knn": (("top1", ""),),
    "linear": (("top1", ""), ("top1_held_out", "")),
    "logistic": (("top1", "top1_error"),),
    "fewshot": (("top1_1", "top1_1_std"), ("top1_2", "top1_2_std"), ("top1_5", "top1_5_std")),
    "finetune": (("top1", "top1_error"),),
}


def measure(args: argparse.Namespace, network: str, name: str, changes: dict[str, Any]) -> Any:
    """Returns the results of a task and a description of the network."""
    task, config = TASKS[name], settings_of(args.workdir)
    settings = task.settings()
    settings.update(changes)
    if network == "pixels":  # one layer, and no patches
        settings.update({"layers": 1, "pool": "cls"})
    inputs = task.open(config, settings, {"path": args.data} if args.data else {})
    step = None
    if network == "trained":
        config, model, params, step = load_network(args.workdir)
    elif network == "untrained":
        model, params = untrained(config)
    else:
        train = task.sources(inputs)["train"]
        assert train is not None
        has_view = set(VIEW_RULES) <= set(settings)
        view = view_of(config, settings if has_view else None)
        model, params = pixels(config, mean_image(train, view))
    mesh = make_mesh()
    params = jax.tree.map(lambda leaf: put(np.asarray(leaf), replicated(mesh)), params)
    place = epath.Path(args.workdir) / "evaluations" / "baselines"
    mark = f"{network}-{step}-{config.seed}"
    with Interruption() as interruption:
        interruption.starting = None
        subject = Subject(network, config, model, params, mark, step)
        tools = Toolbox(
            subject,
            mesh,
            folder=place / f"{mark}-{name}",
            seed=config.seed,
            cache=place / "features",
            interruption=interruption,
        )
        results = task.run(subject, inputs, settings, tools)
    print(text_of(task.table(results, settings)), file=sys.stderr)
    return results, step


def table(rows: list[dict[str, Any]]) -> str:
    """Returns the accuracies in percent as a Markdown table, a column per network."""
    lines = ["| | " + " | ".join(NETWORKS) + " |", "|---" * (1 + len(NETWORKS)) + "|"]
    for name, shown in SHOWN.items():
        own = {row["network"]: row["results"] for row in rows if row["task"] == name}
        for key, error in shown if own else ():
            cells = [cell(own.get(network), key, error) for network in NETWORKS]
            lines.append(f"| `{name}` {key} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def cell(results: dict[str, Any] | None, key: str, error: str) -> str:
    """Returns an accuracy and its standard error, or the deviation over draws, in percent."""
    if results is None or results.get(key) is None:
        return "-"
    share = results[key]
    spread = results[error] if error else standard_error(share, results["images"])
    return f"{100 * share:.1f} ± {100 * spread:.1f}"


def main() -> None:
    """Measures what is missing, or prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--workdir", help="the folder of the run")
    parser.add_argument("--networks", default=",".join(NETWORKS))
    parser.add_argument("--tasks", default="knn", help=f"some of {', '.join(SHOWN)}")
    parser.add_argument("--data")
    parser.add_argument("--set", action="append", default=[], metavar="TASK.KEY=VALUE")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    if args.table:
        return print(table(read(args.out, KEYS)))
    check_out(args.out)
    changes: dict[str, dict[str, Any]] = {name: {} for name in SHOWN}
    for change in args.set:
        place, _, value = change.partition("=")
        name, _, key = place.partition(".")
        changes[name][key] = ast.literal_eval(value)
    for name in args.tasks.split(","):
        for network in args.networks.split(","):
            done = {(row["task"], row["network"]) for row in read(args.out, KEYS)}
            if (name, network) in done or (name, network) == ("finetune", "pixels"):
                continue
            began = time.monotonic()
            results, step = measure(args, network, name, changes[name])
            row = {"task": name, "network": network, "step": step, "settings": changes[name]}
            seconds = round(time.monotonic() - began)
            append(args.out, row | {"results": results, "seconds": seconds})
    return print(table(read(args.out, KEYS)))


if __name__ == "__main__":
    main()
