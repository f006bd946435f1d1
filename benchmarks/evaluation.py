"""Times the parts of evaluations that grow with the data; prints a JSON line.

    python benchmarks/evaluation.py --part=sweep --batch=32
    python benchmarks/evaluation.py --part=features --images=64
    python benchmarks/evaluation.py --part=memory --rows=350000
    python benchmarks/evaluation.py --part=knn --rows=131072

- sweep: a step of `linear` with 45 learning rates beside one with a single rate, each with the
  forward pass of the backbone on random crops. `ratio` is the median over interleaved pairs.
- features: images per second of the extractor from JPEGs of --side pixels, and of the same
  extractor fed from memory; `ratio` is the median over interleaved pairs.
- memory: how much the process grows while it extracts features of a given size; `growth` is that
  in multiples of the size, after 200 MB are taken off.
- knn: the search of 1024 test images among --rows train images, and what it means for 50,000 among
  1,281,167 of width 384 (an extrapolation: the time is proportional to both numbers), with the
  bytes of the train features per host.
"""

import argparse
import io
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sop_jax.config import paper  # noqa: E402
from sop_jax.data.labels import Labelled  # noqa: E402
from sop_jax.data.sources import DigitsSource  # noqa: E402
from sop_jax.data.subsets import Subset  # noqa: E402
from sop_jax.evaluation import features as features_lib  # noqa: E402
from sop_jax.evaluation import linear  # noqa: E402
from sop_jax.evaluation.features import make_extractor, pooled  # noqa: E402
from sop_jax.evaluation.task import View  # noqa: E402
from sop_jax.evaluation.views import usual  # noqa: E402
from sop_jax.models import Model, Params, build  # noqa: E402
from sop_jax.parallel.mesh import make_mesh, put, split  # noqa: E402
from sop_jax.parallel.search import nearest  # noqa: E402

TEST, TRAIN, WIDTH = 50_000, 1_281_167, 384  # ImageNet-1k with ViT-S
QUERIES = 1024
SIZES = {"vit_tiny": "ti", "vit_small": "s", "vit_base": "b"}


def config_of(args: argparse.Namespace) -> ml_collections.ConfigDict:
    """Returns the config of the network that is timed."""
    config = paper()
    config.model.update(size=SIZES[args.arch], dtype=args.dtype)
    config.augment.global_size = config.eval.crop = args.side
    config.eval.resize = args.side * 256 // 224
    config.eval.batch_size = args.batch
    return config


def interleaved(first: Callable[[], Any], second: Callable[[], Any], pairs: int) -> np.ndarray:
    """Returns the seconds of both in alternation, [pairs, 2], after one call of each."""
    first(), second()
    seconds = np.empty((pairs, 2))
    for row in seconds:
        for place, call in enumerate((first, second)):
            start = time.perf_counter()
            call()
            row[place] = time.perf_counter() - start
    return seconds


def sweep(args: argparse.Namespace) -> dict[str, Any]:
    """Times a step of `linear` with all rates and with one."""
    config = config_of(args)
    model = build(config, args.side)
    frozen = jax.jit(model.init)(jax.random.key(0))
    layers, pool = usual(config.model)
    view = View(config.eval.resize, args.side, layers=layers, pool=pool)
    pixels = np.random.default_rng(0).integers(0, 255, (args.batch, args.side, args.side, 3))
    images = jnp.asarray(pixels, jnp.uint8)
    labels, valid = jnp.arange(args.batch) % args.classes, jnp.ones(args.batch, bool)

    def stepper(count: int) -> Callable[[], Any]:
        rates = jnp.asarray(linear.RATES[-count:], jnp.float32) / 1000
        tx = linear.optimizer(rates, 10, 10)
        width = jax.eval_shape(lambda p, x: pooled(model, p, x, view)[0], frozen, images).shape[1]
        params = linear.init_heads(jax.random.key(0), count, args.classes, width)
        state: list[Any] = [params, tx.init(params)]

        @jax.jit
        def step(params: Params, opt_state: Any) -> Any:
            def loss(params: Params) -> Any:
                vectors, _ = pooled(model, frozen, images, view)
                return linear.head_losses(params, vectors, labels, valid).sum()

            gradients = jax.grad(loss)(params)
            updates, opt_state = tx.update(gradients, opt_state, params)
            return jax.tree.map(jnp.add, params, updates), opt_state

        def once() -> None:
            state[:] = jax.block_until_ready(step(*state))

        return once

    seconds = interleaved(stepper(len(linear.RATES)), stepper(1), args.pairs)
    many, one = np.median(seconds, axis=0)
    ratio = float(np.median(seconds[:, 0] / seconds[:, 1]))
    return {"ratio": ratio, "many_s": float(many), "one_s": float(one)}


class Jpegs(Labelled):
    """JPEGs of noise with the detail of photographs, all different."""

    class_names = None
    digest = "noise"

    def __init__(self, count: int, side: int) -> None:
        rng = np.random.default_rng(0)
        self.records = []
        for _ in range(count):
            coarse = Image.fromarray(rng.integers(0, 255, (side // 8, side // 8, 3), np.uint8))
            noise = rng.normal(0, 8, (side, side, 3))
            image = np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC)) + noise
            file = io.BytesIO()
            Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
            self.records.append(file.getvalue())
        self.labels = np.zeros(count, np.int32)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> bytes:
        return self.records[index]

    def name(self, index: int) -> str:
        """Returns the number of the image."""
        return f"noise {index}"


def features(args: argparse.Namespace) -> dict[str, Any]:
    """Times the extractor from JPEGs and from crops that are in memory."""
    config = config_of(args)
    model = build(config, args.side)
    params = jax.jit(model.init)(jax.random.key(0))
    source, extract = Jpegs(args.images, args.side), make_extractor(model, config, make_mesh(1))
    view = View(config.eval.resize, args.side)
    real = features_lib.host_batches
    made = [dict(batch) for batch in real(source, view, args.batch, 0, 1)]

    def from_memory() -> None:
        features_lib.host_batches = lambda *_: (dict(batch) for batch in made)
        try:
            extract(params, source)
        finally:
            features_lib.host_batches = real

    seconds = interleaved(lambda: extract(params, source), from_memory, args.pairs)
    stored, memory = np.median(args.images / seconds, axis=0)
    ratio = float(np.median(seconds[:, 1] / seconds[:, 0]))
    return {"ratio": ratio, "jpeg_images_s": float(stored), "memory_images_s": float(memory)}


def memory(args: argparse.Namespace) -> dict[str, Any]:
    """Measures the growth of the process while it extracts `rows` features of 768 numbers."""
    config = paper()
    config.model.update(size="ti", patch=16)
    config.augment.global_size = config.eval.resize = config.eval.crop = 16
    config.eval.batch_size = 4096
    digits = DigitsSource("test")
    source = Subset(digits, np.arange(args.rows) % len(digits))

    def pixels(params, images, mask=None, last=1, norm=True):
        return [images.reshape(len(images), 1, -1).astype(jnp.float32)]

    model: Model = build(config, 16)._replace(features=pixels)
    extract = make_extractor(model, config, make_mesh(1))
    extract({}, Subset(digits, np.arange(8192) % len(digits)))  # compiles
    before, peak, over = resident(), [0], threading.Event()

    def watch() -> None:
        while not over.wait(0.02):
            peak[0] = max(peak[0], resident())

    thread = threading.Thread(target=watch)
    thread.start()
    found = extract({}, source)
    over.set()
    thread.join()
    size = found.vectors.nbytes
    grown = max(peak[0], resident()) - before
    return {"bytes": size, "grown_bytes": grown, "growth": max(1, grown - 200_000_000) / size}


def resident() -> int:
    """Returns the bytes of this process in memory (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def knn(args: argparse.Namespace) -> dict[str, Any]:
    """Times the search of the k-NN protocol in a slice, and plans the whole of ImageNet-1k."""
    mesh = make_mesh(1)
    key = jax.random.key(0)
    rows = jax.random.normal(key, (args.rows, WIDTH))
    rows = put(np.asarray(rows / jnp.linalg.norm(rows, axis=1, keepdims=True)), split(mesh))
    search = jax.jit(lambda queries: nearest(queries, rows, 200, mesh))
    queries = rows[:QUERIES]
    jax.block_until_ready(search(queries))
    seconds = []
    for _ in range(args.pairs):
        start = time.perf_counter()
        jax.block_until_ready(search(queries))
        seconds.append(time.perf_counter() - start)
    slice_s = float(np.median(seconds))
    whole = slice_s * (TEST / len(queries)) * (TRAIN / args.rows)
    sizes = {f"bytes_per_host_of_{hosts}": TRAIN * WIDTH * 4 // hosts for hosts in (1, 8)}
    return {"seconds": slice_s, "imagenet_s_on_this_device": whole, **sizes}


def main() -> None:
    """Times one part."""
    parts = {"sweep": sweep, "features": features, "memory": memory, "knn": knn}
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--part", required=True, choices=parts)
    parser.add_argument("--arch", default="vit_small", choices=SIZES)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--side", type=int, default=224, help="of images and crops, in pixels")
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--rows", type=int, default=131_072)
    parser.add_argument("--pairs", type=int, default=5)
    args = parser.parse_args()
    print(json.dumps({"part": args.part, **parts[args.part](args)}))


if __name__ == "__main__":
    main()
