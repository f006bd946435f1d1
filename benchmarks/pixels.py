"""Measures the k-NN accuracy of raw pixels with the protocol that is used for networks.

    python benchmarks/pixels.py --config=configs/cifar10_cpu.py --data=cifar10.npz

The features are the pixels of the evaluation crop minus the mean image of the train split.
"""

import argparse
import json
import runpy
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sop_jax.data.pipeline import eval_batches  # noqa: E402
from sop_jax.data.sources import Source, open_source  # noqa: E402
from sop_jax.evaluation.knn import accuracies  # noqa: E402
from sop_jax.evaluation.task import Features  # noqa: E402
from sop_jax.parallel.mesh import make_mesh  # noqa: E402


def pixels(source: Source, resize: int, crop: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the evaluation crops as rows, float32 [n, 3 * crop * crop], and their labels."""
    rows, labels = [], []
    for batch in eval_batches(source, resize, crop, 500):
        rows.append(batch["image"][batch["valid"]])
        labels.append(batch["label"][batch["valid"]])
    images = np.concatenate(rows).reshape(-1, 3 * crop * crop).astype(np.float32)
    return images, np.concatenate(labels)


def main() -> None:
    """Prints a JSON line with the top-1 accuracy for each k."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", required=True)
    parser.add_argument("--data", default="")
    args = parser.parse_args()
    config = runpy.run_path(args.config)["get_config"]()
    config.data.path = args.data
    train, test = open_source(config.data, "train"), open_source(config.data, "test")
    if train is None or test is None or not (train.has_labels and test.has_labels):
        raise SystemExit("error: k-NN needs labelled train and test splits; check the config")
    (known, classes), (asked, truth) = (
        pixels(source, config.eval.resize, config.eval.crop) for source in (train, test)
    )
    mean = known.mean(0)
    train_features, test_features = (
        Features(rows - mean, None, np.arange(len(rows), dtype=np.int32), labels, [])
        for rows, labels in ((known, classes), (asked, truth))
    )
    found = accuracies(
        train_features,
        test_features,
        tuple(config.eval.knn_k),
        config.eval.knn_temperature,
        mesh=make_mesh(),
    )
    print(json.dumps({f"k{k}": accuracy.top1 for k, accuracy in found.items()}))


if __name__ == "__main__":
    main()
