r"""Measures how often the nearest images of an image are of its class, trained and untrained.

    python benchmarks/neighbours.py --images=FOLDER --workdir RUN [RUN ...]

FOLDER has a folder of images for each class. Each image looks for its --nearest nearest among all
others, by the cosine of the features that `sop_jax.load` gives; the share of these that are of its
class is averaged over the images. Images with the same bytes count once. The untrained network is
the one with which the run began.
"""

import argparse
import json
import sys
from pathlib import Path

import ml_collections
import numpy as np
from jaxtyping import Float, Shaped

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from baselines import untrained  # noqa: E402

import sop_jax  # noqa: E402
from sop_jax.data.folders import class_folders  # noqa: E402
from sop_jax.errors import UserError  # noqa: E402
from sop_jax.network import Network  # noqa: E402
from sop_jax.own_images.duplicates import equal_files  # noqa: E402
from sop_jax.paths import expand  # noqa: E402
from sop_jax.pictures.neighbours import neighbours  # noqa: E402


def same_class(
    features: Float[np.ndarray, "n D"], classes: Shaped[np.ndarray, " n"], nearest: int
) -> float:
    """Returns the share of the nearest other images that are of the class of an image."""
    near = neighbours(features, features, nearest, [[row] for row in range(len(features))]).places
    return float((classes[near] == classes[:, None]).mean())


def measure(workdir: str, folder: Path, nearest: int) -> dict[str, float]:
    """Returns the shares in percent, and the number of images."""
    trained = sop_jax.load(workdir)
    features, names = trained.features(str(folder), names=True)
    config = ml_collections.ConfigDict(trained.config.to_dict())
    beginning = Network(config, untrained(config)[1], f"the beginning of {workdir}")
    copies = {row for group in equal_files(str(folder), names).groups for row in group[1:]}
    kept = [row for row in range(len(names)) if row not in copies]
    if class_folders(names) is None or len(kept) <= nearest:
        raise UserError(
            f"{folder} has {len(kept)} different images; expected more than {nearest}, all of them "
            "in two or more folders, one per class"
        )
    classes = np.array([names[row].split("/")[0] for row in kept])
    shares = (
        100 * same_class(found[kept], classes, nearest)
        for found in (features, beginning.features(str(folder)))
    )
    after, before = shares
    return {"images": len(kept), "untrained": before, "trained": after, "gain": after - before}


def main() -> None:
    """Prints a Markdown table and a JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=lambda path: Path(expand(path)), required=True)
    parser.add_argument("--workdir", nargs="+", required=True)
    parser.add_argument("--nearest", type=int, default=5)
    args = parser.parse_args()
    if args.nearest < 1:
        parser.error("--nearest must be 1 or more")
    try:
        rows = {run: measure(expand(run), args.images, args.nearest) for run in args.workdir}
    except UserError as error:
        sys.exit(f"error: {error}")
    print("| run | images | untrained, % | trained, % | gain, points |\n|---|---|---|---|---|")
    for run, row in rows.items():
        shares = " | ".join(f"{row[name]:.1f}" for name in ("untrained", "trained", "gain"))
        print(f"| {run} | {row['images']} | {shares} |")
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
