"""Signs of health and speed in words."""

from typing import Any

import pytest

from sop_jax.config import paper
from sop_jax.objectives.sop.health import verdict
from sop_jax.page import words
from sop_jax.page.runs import Shown

HEALTHY: dict[str, Any] = {
    "loss": 6.0,
    "cls": 4.0,
    "log_k": 4.852,
    "entropy": 2.303,
    "entropy_of_mean": 4.7,
    "winning_sops": 0.5,
    "support_cosine": 0.9,
    "embedding_std": 0.6,
    "effective_rank": 22.0,
    "agreement": 0.55,
    "memory_filled": 1.0,
    "teacher_temperature": 0.015,
    "student_temperature": 0.1,
    "images_per_s": 200.0,
    "idle_share": 0.001,
}
COLLAPSED = HEALTHY | {
    "cls": 4.85,
    "entropy": 4.85,
    "embedding_std": 0.01,
    "agreement": 0.05,
}


def shown(*rows: dict[str, Any], **changes: Any) -> Shown:
    numbered = [{"step": 10 * place} | row for place, row in enumerate(rows, 1)]
    run = Shown("run", "run", numbered, None, {}, {}, [])
    return run._replace(**changes)


def texts(sentences: list[words.Sentence], state: str) -> str:
    return " ".join(text for own, text in sentences if own == state)


def test_a_healthy_run() -> None:
    run = shown({"knn_top1": 0.5}, HEALTHY, HEALTHY, HEALTHY | {"knn_top1": 0.75})
    found = words.health(run, verdict)
    assert not texts(found, words.BAD)
    good = texts(found, words.GOOD)
    assert "nothing shows a collapse" in good and "step 40" in good
    assert "50.0 %" in good and "75.0 %" in good
    assert "about 10 of 128 prototypes" in good
    assert "agree by 0.55, more than" in good and "0.15" in good


def test_a_collapsed_run() -> None:
    found = words.health(shown(*[COLLAPSED] * 12), verdict)
    bad = texts(found, words.BAD)
    assert "collapsing" in bad and "teacher_temperature" in bad
    assert "nearly uniformly" in bad and "constant guess" in bad
    assert "nearly at one point" in bad and "less than teacher temperature" in bad
    assert not texts(found, words.GOOD).count("nothing shows")


def test_all_images_share_a_few_prototypes() -> None:
    found = words.health(shown(*[HEALTHY | {"entropy_of_mean": 0.5}] * 3), verdict)
    assert "all images share a few" in texts(found, words.BAD)


def test_an_accuracy_that_fell() -> None:
    run = shown({"knn_top1": 0.8}, HEALTHY | {"knn_top1": 0.9}, HEALTHY | {"knn_top1": 0.7})
    bad = texts(words.health(run), words.BAD)
    assert "was 80.0 %" in bad and "is 70.0 %" in bad and "highest, 90.0 %, at step 20" in bad


@pytest.mark.parametrize("rows", [[], [{"knn_top1": None}], [{"wall_s": 1.0}]])
def test_a_run_that_has_just_begun(rows: list[dict[str, Any]]) -> None:
    run = shown(*rows)
    assert "No step has been logged" in words.health(run, verdict)[0].text
    assert "No speed" in words.throughput(run)[0].text


def test_rows_that_lack_signs_or_have_odd_ones() -> None:
    odd = {"loss": "x", "entropy": None, "log_k": True, "agreement": float("nan")}
    found = words.health(shown(*[odd] * 3), verdict)
    assert "lacks signs" in texts(found, words.PLAIN)
    assert not texts(found, words.BAD)


def test_a_memory_that_is_not_full() -> None:
    found = words.health(shown(HEALTHY | {"memory_filled": 0.25}))
    assert "25 % filled" in texts(found, words.PLAIN)


def test_winners_that_a_batch_can_reach() -> None:
    config = paper()
    config.batch_size = 16
    found = words.health(shown(HEALTHY, config=config))
    assert "a batch reaches at most 25 %" in texts(found, words.PLAIN)
    assert "of 256 dimensions" in texts(found, words.PLAIN)


def test_speed_and_what_limits_it() -> None:
    config = paper()
    config.batch_size = 100
    rows = [HEALTHY | {"wall_s": 10.0 * place} for place in (1, 2)]
    found = words.throughput(shown(*rows, config=config, summary={"compile_s": 30.0}))
    assert "200 images per second" in found[0].text and "500 ms per step" in found[0].text
    assert found[1].state == words.GOOD and "0.1 %" in found[1].text
    assert "20 s, of which 50 % were not steps" in found[2].text and "30 s" in found[2].text


def test_an_input_that_is_too_slow() -> None:
    found = words.throughput(shown(HEALTHY | {"idle_share": 0.5}))
    bad = texts(found, words.BAD)
    assert "50 % of the time" in bad and "400 images per second" in bad and "data.workers" in bad


def test_a_bad_sentence_is_marked_by_a_word() -> None:
    text = words.as_list([words.Sentence(words.BAD, "a<b"), words.Sentence(words.GOOD, "c")])
    assert text.count("Attention: ") == 1 and "a&lt;b" in text
