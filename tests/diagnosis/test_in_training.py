"""The count of unique prototypes during training: rows, log, resumes and devices."""

import json
import pathlib
from typing import Any

import begun
import jax
import pytest

from sop_jax import train
from sop_jax.check import check_config
from sop_jax.diagnosis import in_training, uniqueness
from sop_jax.errors import UserError
from sop_jax.parallel.mesh import make_mesh
from sop_jax.training.assemble import assemble

NAMES = ("prototypes_count", "prototypes_unique", "prototypes_share")


def small(tasks: tuple[str, ...], **changes: Any) -> Any:
    config = begun.settings("decoupled", **changes)
    config.update(dict(steps=2, log_every=1, eval_every=2, checkpoint_every=2))
    config.data.update(workers=0, threads=1)
    config.augment.resample = "opencv"
    config.eval.tasks = tasks
    config.mesh.data = 1
    return config


@pytest.mark.medium
def test_a_run_records_the_count_and_says_it(tmp_path: pathlib.Path, capsys: Any) -> None:
    config = small(("knn", "prototypes"))
    check_config(config)
    train.train(config, tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    first, last = rows[0], rows[-1]
    assert first["step"] == 0 and last["step"] == 2
    # The mixture has no means before the first step.
    assert {first[name] for name in NAMES} == {None} and first["knn_top1"] > 0
    assert last["prototypes_count"] == config.decoupled.prototypes
    assert last["prototypes_share"] == last["prototypes_unique"] / last["prototypes_count"]
    assert all(in_training.key_of(eps) in last for eps in uniqueness.EPS)
    shown = capsys.readouterr().err
    assert f"step 2: {in_training.sentence(last)}" in shown
    assert "step 0: " not in shown.replace("steps 0", "")
    assert not any(name.startswith("prototypes") for row in rows[1:-1] for name in row)


def test_a_resumed_run_knows_whether_it_was_evaluated():
    rows = [{"step": 2, "loss": 1.0}, {"step": 4, "loss": 1.0, "prototypes_share": None}]
    assert not train.lacks_evaluation(rows, 4, ("prototypes",))
    assert not train.lacks_evaluation(rows, 4, ("knn", "prototypes"))
    assert train.lacks_evaluation(rows, 4, ("knn",))
    assert train.lacks_evaluation(rows, 6, ("prototypes",))
    assert train.lacks_evaluation([], 6, ("prototypes",))


@pytest.mark.medium
@pytest.mark.parametrize("method", ["ibot", "sop"])
def test_every_device_counts_what_one_does(method: str) -> None:
    found = []
    for data, fsdp in ((1, 1), (4, 2)):
        config = begun.settings(method)
        config.mesh.update(data=data, fsdp=fsdp)
        run = assemble(config, make_mesh(data, fsdp), images=1000)
        found.append(in_training.make_counter(config, run)(run.init(jax.random.key(0))))
    assert found[0] == found[1]


def test_an_objective_without_prototypes_is_refused() -> None:
    config = begun.settings("dino")
    run = assemble(config, make_mesh(1), images=1000)
    none = run._replace(objective=run.objective._replace(banks=None))
    with pytest.raises(UserError, match="has neither prototypes nor a memory"):
        in_training.make_counter(config, none)
