"""Tables of runs: what they are, how they differ, and their evaluations beside the papers'."""

import json
import pathlib
from typing import Any

from sop_jax.config import paper
from sop_jax.evaluation import knn
from sop_jax.page import tables
from sop_jax.page.runs import Shown
from sop_jax.settings import flatten


def shown(name: str = "a", **changes: Any) -> Shown:
    return Shown(name, name, [], paper(), {}, {}, [])._replace(**changes)


def knn_record() -> dict[str, Any]:
    settings = knn.settings()
    result = {"top1": 0.75, "top5": 1.0, "k": 10, "images": 400, "unreadable": 0}
    result |= {f"{top}_k{k}": 0.5 for top in ("top1", "top5") for k in settings.k}
    return {
        "task": "knn",
        "step": 1200,
        "results": result,
        "settings": json.loads(json.dumps(flatten(settings))),
        "data": {"source": "folder", "train": {"images": 2500, "names": "x"}},
    }


def test_what_a_run_is() -> None:
    rows = [
        {"step": 0, "knn_top1": 0.25},
        {"step": 4, "loss": 3.5, "wall_s": 90.0},
        {"step": 8, "knn_top1": 0.5, "wall_s": 180.0},
    ]
    run = shown(rows=rows, data={"train": {"images": 4096}})
    text = tables.summary([run])
    for name, value in (
        ("method", "sop"),
        ("network", "vit s, patches of 16"),
        ("images", "4,096"),
        ("epochs done", "2.00"),
        ("steps done", "8"),
        ("state", "is training or was interrupted"),
        ("k-NN top-1 now, %", "50.00"),
        ("loss", "3.50"),
        ("time", "3 min"),
    ):
        assert f'<th scope="row">{name}</th><td>{value}</td>' in text
    assert "has ended" in tables.summary([shown(summary={"steps": 8})])


def test_runs_of_which_little_is_known_share_the_table() -> None:
    config = paper()
    config.model.update(family="swin", size="t")
    text = tables.summary([shown(config=config), shown("b", config=None)])
    assert "swin t" in text and "<td>–</td>" in text


def test_settings_that_differ() -> None:
    other = paper()
    other.batch_size, other.data.path = 64, "/<b>"
    text = tables.differences([shown(), shown("b", config=other)])
    assert text is not None and "batch_size" in text and "<td>64</td>" in text
    assert "/&lt;b&gt;" in text and "epochs" not in text
    assert tables.differences([shown(), shown("b")]) is None
    assert tables.differences([shown(), shown("b", config=None)]) is None


def test_evaluations_have_the_papers_numbers(tmp_path: pathlib.Path) -> None:
    folder = tmp_path / "evaluations"
    folder.mkdir()
    (folder / "knn_1200_aa.json").write_text(json.dumps(knn_record()))
    (folder / "diagnosis_1200_aa.json").write_text("{}")
    text, notes = tables.evaluations(shown(workdir=str(tmp_path)), several=False)
    assert not notes and "<h3>knn, step 1,200</h3>" in text
    assert "train: 2,500 images" in text and "75.3" in text  # of SOP with ViT-S/16
    assert '<th scope="col">top-1 %</th>' in text and "<pre" not in text
    assert "<caption>ImageNet-1k, top-1 % of the best k, from the SOP paper</caption>" in text
    assert '<caption class="unseen">knn, step 1,200</caption>' in text
    named, _ = tables.evaluations(shown(workdir=str(tmp_path)), several=True)
    assert "<h3>a: knn, step 1,200</h3>" in named


def test_files_that_are_no_results_are_named(tmp_path: pathlib.Path) -> None:
    folder = tmp_path / "evaluations"
    folder.mkdir()
    (folder / "half.json").write_text('{"task": "knn", ')
    (folder / "list.json").write_text("[]")
    (folder / "other.json").write_text('{"task": "no such task"}')
    (folder / "old.json").write_text(json.dumps(knn_record() | {"results": {}}))
    text, notes = tables.evaluations(shown(workdir=str(tmp_path)), several=False)
    assert not text and sorted(note.split()[0] for note in notes) == [
        "half.json",
        "list.json",
        "old.json",
        "other.json",
    ]
    assert tables.evaluations(shown(workdir=str(tmp_path / "none")), several=False) == ("", [])
