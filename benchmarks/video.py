"""Times the propagation of masks in video, and whole frames, optionally beside the official code.

    python benchmarks/video.py [--official=FOLDER] [--threads=2] [--patch=16] [--objects=2]

The network is a ViT-S with random weights, on random frames of 480 x 854 pixels. FOLDER is a copy
of https://github.com/bytedance/ibot or https://github.com/facebookresearch/dino, whose script
`eval_video_segmentation.py` is run with PyTorch, without its calls of `.cuda()`. Both codes
propagate from the first frame and the last seven, take turns, and get the same features for the
comparison of their masks.
"""

import argparse
import ast
import importlib
import json
import os
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sop_jax import models  # noqa: E402
from sop_jax.config import paper  # noqa: E402
from sop_jax.data import davis  # noqa: E402
from sop_jax.evaluation import propagation, video  # noqa: E402
from sop_jax.evaluation.propagation import Contexts  # noqa: E402
from sop_jax.evaluation.task import Subject  # noqa: E402

SIZE = 480, 854  # pixels
SETTINGS = video.settings()
FUNCTIONS = ("restrict_neighborhood", "label_propagation", "extract_feature", "norm_mask")
SCRIPTS = ("evaluation/eval_video_segmentation.py", "eval_video_segmentation.py")
NETWORKS = ("models/vision_transformer.py", "vision_transformer.py")

Calls = dict[str, Callable[[], Any]]


def in_turns(calls: Calls, times: int) -> dict[str, np.ndarray]:
    """Returns the median seconds of each of the calls, which take turns after a warm-up.

    The first number is the elapsed time. The second is the time of the CPU in all threads of this
    process, which depends less on what else the machine does.
    """
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for turn in range(times + 1):
        for name, call in calls.items():
            began, cpu_began = time.perf_counter(), time.process_time()
            call()
            if turn:
                taken[name].append((time.perf_counter() - began, time.process_time() - cpu_began))
    return {name: np.median(rows, axis=0) for name, rows in taken.items()}


def ours(patch: int, frame: np.ndarray, tokens: np.ndarray, masks: np.ndarray) -> Calls:
    """Returns the propagation of one frame from `tokens` [n+1, h, w, D], and a whole frame."""
    config = paper()
    config.model.update(family="vit", size="s", patch=patch, dtype="float32")
    model = models.build(config, config.augment.global_size)
    params = model.init(jax.random.key(0))
    look = video.make_look(Subject("random", config, model, params, "", None), SETTINGS.red_std)
    contexts = Contexts(
        propagation.unit(jnp.asarray(tokens[:-1])), jnp.asarray(masks), jnp.int32(len(masks))
    )
    new = jnp.asarray(tokens[-1])

    def propagate(features: jax.Array = new) -> jax.Array:
        s = SETTINGS
        found = propagation.propagate(contexts, features, s.neighbourhood, s.top_k, s.temperature)
        return found.block_until_ready()

    def whole() -> np.ndarray:
        found = propagate(look(video.resized(frame, SETTINGS.short_side)))
        return davis.scaled(np.asarray(propagation.decide(found, patch)), SIZE)

    return {"propagation": propagate, "whole": whole}


def official(
    folder: Path, patch: int, frame: np.ndarray, tokens: np.ndarray, masks: np.ndarray, threads: int
) -> Calls:
    """Returns the same of the official code."""
    torch: Any = importlib.import_module("torch")
    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    functional = torch.nn.functional

    def source(names: tuple[str, ...]) -> str:
        paths = [folder / name for name in names if (folder / name).is_file()]
        if not paths:
            raise SystemExit(f"{folder} has none of {', '.join(names)}: expected a copy of iBOT")
        return paths[0].read_text().replace(".cuda(non_blocking=True)", "").replace(".cuda()", "")

    args = types.SimpleNamespace(
        size_mask_neighborhood=SETTINGS.neighbourhood, topk=SETTINGS.top_k, patch_size=patch
    )
    script: dict[str, Any] = {"torch": torch, "F": functional, "args": args}
    tree = ast.parse(source(SCRIPTS))
    tree.body = [
        node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in FUNCTIONS
    ]
    functions = compile(tree, SCRIPTS[0], "exec")
    exec(functions, script)

    # What the module of the network imports, other than torch.
    for name, content in {
        "utils": {"trunc_normal_": torch.nn.init.trunc_normal_},
        "timm": {},
        "timm.models": {},
        "timm.models.registry": {"register_model": lambda function: function},
    }.items():
        sys.modules[name] = types.ModuleType(name)
        vars(sys.modules[name]).update(content)
    network: dict[str, Any] = {}
    exec(compile(source(NETWORKS), NETWORKS[0], "exec"), network)
    model = network["vit_small"](patch_size=patch, num_classes=0).eval()

    n, h, w, width = tokens.shape
    known = [torch.tensor(x).reshape(h * w, width).T for x in tokens[:-1]]
    soft = [torch.tensor(x).permute(2, 0, 1)[None] for x in masks]
    new = torch.tensor(tokens[-1]).reshape(h * w, width)
    mean, std = torch.tensor(models.MEAN), torch.tensor((SETTINGS.red_std, *models.STD[1:]))
    given = {"torch": torch, "F": functional, "args": args}
    exec(functions, given)
    given["extract_feature"] = lambda *_, **__: (new, h, w)
    near = given["restrict_neighborhood"](h, w)[None].repeat(len(known), 1, 1)

    def propagate() -> np.ndarray:
        found = given["label_propagation"](args, None, None, known, soft, near)[0]
        return found[0].permute(1, 2, 0).numpy()

    def whole() -> np.ndarray:
        height, width = h * patch, w * patch
        pixels = torch.from_numpy(cv2.resize(frame, (width, height))).float() / 255
        pixels = ((pixels - mean) / std).permute(2, 0, 1)
        found = script["label_propagation"](args, model, pixels, known, soft, near)[0]
        large = functional.interpolate(found, scale_factor=patch, mode="bilinear")[0]
        decided = script["norm_mask"](large).argmax(0).numpy().astype(np.uint8)
        return np.asarray(Image.fromarray(decided).resize(SIZE[::-1], Image.Resampling.NEAREST))

    return {"propagation": propagate, "whole": whole}


def main() -> None:
    """Prints a Markdown table and a JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--official", type=Path, help="a copy of iBOT or DINO")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--patch", type=int, default=16)
    parser.add_argument("--objects", type=int, default=2)
    parser.add_argument("--times", type=int, default=5, help="the number of calls that are timed")
    args = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])  # before XLA's threads
    rng = np.random.default_rng(0)
    height, width = video.grid_size(SIZE, SETTINGS.short_side)
    h, w = height // args.patch, width // args.patch
    frame = rng.integers(0, 256, (*SIZE, 3), np.uint8)
    tokens = rng.normal(size=(SETTINGS.last_frames + 2, h, w, 384)).astype(np.float32)
    masks = rng.random((SETTINGS.last_frames + 1, h, w, 1 + args.objects)).astype(np.float32)
    codes = {"ours": ours(args.patch, frame, tokens, masks)}
    if args.official:
        codes["official"] = official(args.official, args.patch, frame, tokens, masks, args.threads)
    result: dict[str, Any] = {"device": jax.devices()[0].device_kind, "tokens": [h, w]}
    print("| | " + " | ".join(f"{code}, s | {code}, s of CPU" for code in codes) + " |")
    print("|---" * (1 + 2 * len(codes)) + "|")
    for part in ("propagation", "whole"):
        seconds = in_turns({code: calls[part] for code, calls in codes.items()}, args.times)
        for i, kind in enumerate(("s", "cpu_s")):
            result[f"{part}_{kind}"] = {
                code: round(float(row[i]), 4) for code, row in seconds.items()
            }
        if args.official:
            wall, cpu = (seconds["official"] / seconds["ours"]).tolist()
            result[f"{part}_ratio"], result[f"{part}_cpu_ratio"] = round(wall, 2), round(cpu, 2)
        numbers = [f"{value:.3f}" for row in seconds.values() for value in row]
        print(f"| {part} | " + " | ".join(numbers) + " |")
    if args.official:
        found = (np.asarray(calls["propagation"]()) for calls in codes.values())
        result["largest_difference"] = float(np.abs(np.subtract(*found)).max())
    print(json.dumps(result))


if __name__ == "__main__":
    main()
