"""Curves in words: whether a run learns or collapses, and what limits its speed."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from sop_jax.monitor.metrics import time_text
from sop_jax.monitor.pace import NOTICED
from sop_jax.page import markup
from sop_jax.page.runs import Row, Shown, number, series

RECENT = 10  # the last logged steps whose median is described, because single steps vary

ALL = 0.995  # a share that rounds to 100 %

GOOD, BAD, PLAIN = "good", "bad", "plain"


class Sentence(NamedTuple):
    """A sentence about a run.

    Attributes:
        state: GOOD, BAD, or PLAIN for a fact that is neither.
        text: the sentence.
    """

    state: str
    text: str


def as_list(sentences: Sequence[Sentence]) -> str:
    """Returns sentences as HTML; a bad one is marked by a word as well as by its colour."""
    items = []
    for state, text in sentences:
        mark = "<b>Attention: </b>" if state == BAD else ""
        items.append(f'<li class="{state}">{mark}{markup.escape(text)}</li>')
    return f'<ul class="words">{"".join(items)}</ul>'


def health(
    run: Shown, verdict: Callable[[Sequence[Row]], str | None] | None = None
) -> list[Sentence]:
    """Returns the signs of health of the newest steps in words.

    Args:
        run: the run.
        verdict: judges the logged rows, see `Objective.verdict`; None if it is not known.
    """
    logged = [row for row in run.rows if "loss" in row]
    if not logged:
        return [Sentence(PLAIN, "No step has been logged yet, so nothing is known.")]
    now = {name: _recent(logged, name) for name in logged[-1]}
    found = [
        *_verdict(logged, verdict),
        *_knn(run),
        *_assignments(run, now),
        *_embeddings(run, now),
    ]
    return [*found, *_rest(run, now)]


def _recent(logged: Sequence[Row], name: str) -> float | None:
    values = [number(row.get(name)) for row in logged[-RECENT:]]
    there = [value for value in values if value is not None]
    return float(np.median(there)) if there else None


def _verdict(
    logged: Sequence[Row], verdict: Callable[[Sequence[Row]], str | None] | None
) -> list[Sentence]:
    step = logged[-1]["step"]
    if verdict is None:
        return []
    signs = [number(logged[-1].get(name)) for name in ("entropy", "embedding_std")]
    try:
        words = verdict(logged)
    except (KeyError, TypeError):  # rows of another method, or of a damaged file
        signs, words = [None], None
    if words:
        return [Sentence(BAD, f"At step {step:,} the run is {words}.")]
    if None in signs:
        return [
            Sentence(PLAIN, f"The row of step {step:,} lacks signs that would show a collapse.")
        ]
    return [Sentence(GOOD, f"At step {step:,} nothing shows a collapse.")]


def _knn(run: Shown) -> list[Sentence]:
    values = series(run, "knn_top1")
    if not values:
        return [
            Sentence(
                PLAIN,
                "There is no k-NN accuracy: it needs labels, a split to classify and an "
                "evaluation.",
            )
        ]
    (first, before), (step, after) = values[0], values[-1]
    best_step, best = max(values, key=lambda pair: pair[1])
    if len(values) == 1:
        return [Sentence(PLAIN, f"The k-NN accuracy at step {step:,} is {100 * after:.1f} %.")]
    start = "before training" if first == 0 else f"at step {first:,}"
    text = (
        f"The k-NN accuracy was {100 * before:.1f} % {start} and is {100 * after:.1f} % at step "
        f"{step:,}"
    )
    if best > after and best_step != step:
        text += f"; it was highest, {100 * best:.1f} %, at step {best_step:,}"
    return [Sentence(GOOD if after > before else BAD, f"{text}.")]


def _assignments(run: Shown, now: dict[str, float | None]) -> list[Sentence]:
    most, own, mean = (now.get(name) for name in ("log_k", "entropy", "entropy_of_mean"))
    found = []
    if most and own is not None:
        count, used = math.exp(most), math.exp(own)
        text = (
            f"The teacher divides an image among about {used:.3g} of {count:,.0f} prototypes "
            f"(entropy {own:.2f} of at most {most:.2f})"
        )
        if own > 0.97 * most:
            found.append(Sentence(BAD, f"{text}: nearly uniformly, so that targets say nothing."))
        else:
            found.append(Sentence(GOOD, f"{text}."))
    if most and mean is not None:
        text = (
            f"All images of a batch together use about {math.exp(mean):.3g} prototypes (entropy "
            f"of the mean {mean:.2f})"
        )
        if mean < 0.25 * most:
            found.append(Sentence(BAD, f"{text}: all images share a few of them."))
        else:
            found.append(Sentence(GOOD, f"{text}."))
    cls = now.get("cls")
    if most and cls is not None and abs(cls - most) < 0.02 * most:
        found.append(
            Sentence(
                BAD,
                f"The loss of views, {cls:.2f}, is that of a constant guess, ln K = {most:.2f}.",
            )
        )
    for name, kind in (("winning_sops", "SOPs"), ("winning_prototypes", "prototypes")):
        share = now.get(name)
        if share is None:
            continue
        text = f"{100 * share:.0f} % of the {kind} are the first choice of some view"
        if limit := _most_winners(run, most):
            text += f"; a batch reaches at most {100 * limit:.0f} %"
        found.append(Sentence(PLAIN, f"{text}."))
    return found


def _most_winners(run: Shown, log_k: float | None) -> float | None:
    """Returns the largest share of prototypes that a batch can choose; None if it is all."""
    if run.config is None or not log_k:
        return None
    limit = run.config.batch_size * run.config.augment.global_crops / math.exp(log_k)
    return limit if limit < ALL else None


def _embeddings(run: Shown, now: dict[str, float | None]) -> list[Sentence]:
    found = []
    agreement = now.get("agreement")
    sharp, warm = now.get("teacher_temperature"), now.get("student_temperature")
    if agreement is not None and sharp and warm:
        ratio = sharp / warm
        text = f"Views of an image agree by {agreement:.2f}"
        if agreement < ratio:
            found.append(
                Sentence(
                    BAD,
                    f"{text}, less than teacher temperature / student temperature = {ratio:.2f}, "
                    "so that directions of the embedding shrink. Lower the teacher's temperature, "
                    "or use milder crops.",
                )
            )
        else:
            found.append(
                Sentence(
                    GOOD,
                    f"{text}, more than teacher temperature / student temperature = {ratio:.2f}, "
                    "so that directions of the embedding grow.",
                )
            )
    spread = now.get("embedding_std")
    if spread is not None:
        text = f"The spread of the embeddings is {spread:.2f}, where 1 is the whole sphere"
        state = BAD if spread < 0.25 else GOOD
        end = ": they are nearly at one point." if state == BAD else "."
        found.append(Sentence(state, text + end))
    rank = now.get("effective_rank")
    if rank is not None:
        of = f" of {run.config.head.dim:,}" if run.config is not None else ""
        found.append(Sentence(PLAIN, f"They use about {rank:.3g}{of} dimensions."))
    return found


def _rest(run: Shown, now: dict[str, float | None]) -> list[Sentence]:
    found = []
    cosine = now.get("support_cosine")
    if cosine is not None:
        found.append(
            Sentence(PLAIN, f"Supports have a mean cosine of {cosine:.3f} to their anchor.")
        )
    filled = now.get("memory_filled")
    if filled is not None and filled < 1:
        text = (
            f"The memory is {100 * filled:.0f} % filled; its other rows are still random, so that "
            "some anchors and supports are from no image."
        )
        found.append(Sentence(PLAIN, text))
    shares = series(run, "prototypes_share")
    if shares:
        step, share = shares[-1]
        text = (
            f"At step {step:,}, {100 * share:.1f} % of the prototypes are unique: farther than a "
            "distance of 0.025 from each other."
        )
        found.append(Sentence(PLAIN, text))
    return found


def throughput(run: Shown) -> list[Sentence]:
    """Returns how fast a run trains, what limits it, and what the rest of the time went to."""
    speeds = [value for _, value in series(run, "images_per_s")]
    if not speeds:
        return [Sentence(PLAIN, "No speed has been logged yet.")]
    median = float(np.median(speeds))
    text = f"It trains on {median:,.4g} images per second (the median of logged steps)"
    if run.config is not None:
        text += f", {time_text(run.config.batch_size / median)} per step"
    found = [Sentence(PLAIN, f"{text}.")]
    idle = [value for _, value in series(run, "idle_share")]
    if idle:
        share = float(np.median(idle[-RECENT:]))
        if share >= NOTICED:
            found.append(
                Sentence(
                    BAD,
                    f"The input is the bottleneck: devices wait for images {100 * share:.0f} % of "
                    f"the time, and would reach {median / max(1 - share, 1e-3):,.4g} images per "
                    "second without waiting. Increase data.workers if there are idle cores.",
                )
            )
        else:
            found.append(
                Sentence(
                    GOOD,
                    f"The devices are the limit: they wait for images {100 * share:.1f} % of the "
                    "time.",
                )
            )
    return [*found, *_time(run)]


def _time(run: Shown) -> list[Sentence]:
    walls = series(run, "wall_s")
    if not walls or not walls[-1][1]:
        return []
    total = walls[-1][1]
    found = f"The run has taken {time_text(total)}"
    if run.config is not None:
        training, before = 0.0, 0
        for step, speed in series(run, "images_per_s"):
            training += (step - before) * run.config.batch_size / max(speed, 1e-9)
            before = step
        rest = max(0.0, 1 - training / total)
        found += (
            f", of which {100 * rest:.0f} % were not steps but evaluations, checkpoints and the "
            "start"
        )
    compiling: Any = number(run.summary.get("compile_s"))
    if compiling is not None:
        found += f"; compiling the step took another {time_text(max(compiling, 1e-3))}"
    return [Sentence(PLAIN, f"{found}.")]
