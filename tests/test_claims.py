"""The papers' claims: as data, and what numbers make of them."""

import importlib
import json
import pathlib
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from sop_jax import config as config_lib
from sop_jax.check import check_config, without_use
from sop_jax.data.packed import open_packed
from sop_jax.data.subsets import labels_of
from sop_jax.errors import UserError

BENCHMARKS = pathlib.Path(__file__).resolve().parent.parent / "benchmarks"
STEPS = 800


@pytest.fixture(scope="module")
def parts() -> Iterator[SimpleNamespace]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        names = ("claims", "costs", "judgement", "measure", "report", "runs", "statements")
        found: dict[str, ModuleType] = {
            name: importlib.import_module(f"paper_claims.{name}") for name in names
        }
        yield SimpleNamespace(
            **found, command=importlib.import_module("claims"), rows=importlib.import_module("rows")
        )


def trained(parts: SimpleNamespace, quick: bool) -> list[Any]:
    wanted = [one for claim in parts.claims.CLAIMS for one in parts.claims.subjects(claim, quick)]
    return [one for one in dict.fromkeys(wanted) if isinstance(one, parts.runs.Run)]


# The claims as data


def test_every_run_is_valid_and_another_one(parts: SimpleNamespace) -> None:
    wanted = trained(parts, quick=False)
    digests = [parts.runs.digest(one) for one in wanted]
    assert len(set(digests)) == len(digests)
    for one in wanted:
        config = parts.runs.settings(one)
        check_config(config)
        idle = without_use(config)
        assert not [name for name, _ in one.changes if name in idle], parts.runs.label(one)
        assert config.steps == STEPS


def test_the_quick_set_has_20_to_25_runs_and_the_ends_of_sweeps(parts: SimpleNamespace) -> None:
    claims, quick = parts.claims, trained(parts, quick=True)
    assert 20 <= len(quick) <= 25
    assert set(quick) < set(trained(parts, quick=False))
    for sweep in (claims.CLS_SUPPORTS, claims.ANCHORS, claims.PROTOTYPES):
        assert {sweep[0], sweep[-1]} < set(quick) and sweep[1] not in quick
    names = {claim.name for claim in claims.CLAIMS if claim.quick}
    wanted = {"table_1", "table_7", "table_9", "table_c7_rows", "table_c7_slots", "joint", "kept"}
    assert wanted < names


def test_every_claim_can_be_judged(parts: SimpleNamespace) -> None:
    names = [claim.name for claim in parts.claims.CLAIMS]
    assert len(set(names)) == len(names)

    def equal(subject: Any, metric: Any) -> dict[int, float]:
        return dict.fromkeys(range(3), 0.5)

    for claim in parts.claims.CLAIMS:
        assert claim.source and claim.paper and claim.limits
        tests = [test for statement in claim.statements for test in statement.tests(equal)]
        judged = {test.verdict for test in tests}
        assert judged - {"only shown"} <= {"holds", "does not hold", "undecided"}
        assert all(len(test.samples) >= 3 for test in tests)


def test_the_sizes_of_a_long_tail_follow_a_power_law(parts: SimpleNamespace) -> None:
    first, second = (parts.runs.splits("long_tail", seed) for seed in (0, 1))
    counts = np.bincount(first["train"].labels, minlength=10)
    most = counts.max()
    assert sorted(counts, reverse=True) == [round(most / rank) for rank in range(1, 11)]
    assert 100 < most and 0 < counts.min() < 20  # head and tail classes of the benchmarks
    assert len(first["test"].labels) == 360
    assert not np.array_equal(counts, np.bincount(second["train"].labels, minlength=10))


def test_a_half_and_the_other_classes_are_all_digits(
    parts: SimpleNamespace, tmp_path: pathlib.Path
) -> None:
    halves = parts.runs.splits("half", 0)
    mine, others = (set(halves[name].labels) for name in ("train", "train_others"))
    assert len(mine) == len(others) == 5 and not mine & others
    sizes = {name: len(half.labels) for name, half in halves.items()}
    assert sizes["train"] + sizes["train_others"] == 1437
    assert sizes["test"] + sizes["test_others"] == 360
    config = parts.runs.prepared(parts.claims.KP_HALF, STEPS, 0, tmp_path)
    packed = open_packed(config.data, "train")
    assert packed is not None
    assert np.array_equal(labels_of(packed), halves["train"].labels)
    assert config.seed == 0 and parts.runs.digest(parts.claims.KP_HALF) in str(
        parts.measure.key_of(parts.claims.KP_HALF, 0)
    )


# The judgement


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        ([0.01, 0.02, 0.03], "holds"),  # two standard errors are 0.0115
        ([-0.01, -0.02, -0.03], "does not hold"),
        ([0.01, -0.02, 0.03], "undecided"),
        ([0.0, 0.0, 0.0], "undecided"),
        ([0.01, 0.01, 0.01], "holds"),
        ([0.05, 0.05], "not judged"),
        ([], "not judged"),
    ],
)
def test_a_difference_is_judged_by_two_standard_errors(
    parts: SimpleNamespace, values: list[float], verdict: str
) -> None:
    assert parts.judgement.is_positive(dict(enumerate(values))) == verdict


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        ([0.001, -0.001, 0.0], "holds"),
        ([0.0, 0.003, 0.006], "undecided"),  # 0.003 ± 4.303 * 0.00173: up to 0.0105
        ([0.02, 0.021, 0.019], "does not hold"),
        ([-0.02, -0.021, -0.019], "does not hold"),
        ([0.02, -0.02, 0.0], "undecided"),
        ([0.0, 0.0], "not judged"),
    ],
)
def test_equality_is_judged_by_the_interval(
    parts: SimpleNamespace, values: list[float], verdict: str
) -> None:
    assert parts.judgement.is_within(dict(enumerate(values)), 0.01) == verdict


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        ([0.03, 0.031, 0.029], "holds"),
        ([-0.005, -0.004, -0.006], "holds"),  # worse, by less than the margin
        ([-0.02, -0.021, -0.019], "does not hold"),
        ([-0.02, 0.02, 0.0], "undecided"),
    ],
)
def test_not_worse_is_judged_by_the_interval(
    parts: SimpleNamespace, values: list[float], verdict: str
) -> None:
    assert parts.judgement.is_not_worse(dict(enumerate(values)), 0.01) == verdict


def test_an_exact_number_needs_no_seeds(parts: SimpleNamespace) -> None:
    judgement = parts.judgement
    assert judgement.is_within({0: 0.02}, 0.05, exact=True) == "holds"
    assert judgement.is_within({0: -0.07}, 0.05, exact=True) == "does not hold"
    assert judgement.is_positive({0: 0.1}, exact=True) == "holds"
    assert judgement.is_positive({}, exact=True) == "not judged"


def test_runs_are_compared_seed_by_seed(parts: SimpleNamespace) -> None:
    first, second = {0: 0.9, 1: 0.5, 2: 0.7}, {1: 0.4, 2: 0.6, 3: 0.1}
    found = parts.judgement.paired((1, first), (-1, second))
    assert found == pytest.approx({1: 0.1, 2: 0.1})
    assert parts.judgement.is_positive(found) == "not judged"


def test_a_claim_holds_if_all_statements_do(parts: SimpleNamespace) -> None:
    all_of = parts.judgement.all_of
    assert all_of(["holds", "holds"]) == "holds"
    assert all_of(["holds", "undecided"]) == "undecided"
    assert all_of(["undecided", "not judged"]) == "not judged"
    assert all_of(["not judged", "does not hold", "holds"]) == "does not hold"
    assert all_of([]) == "not judged"
    assert all_of(["only shown", "holds"]) == "holds"


def test_the_seeds_that_would_decide(parts: SimpleNamespace) -> None:
    # A mean of 0.01 and a deviation of 0.02: two standard errors are 0.04 / sqrt(n).
    assert parts.judgement.seeds_needed({0: -0.01, 1: 0.01, 2: 0.03}) == 16
    assert parts.judgement.seeds_needed({0: 0.01}) is None


def answers(values: dict[Any, list[float]]) -> Any:
    def get(subject: Any, metric: Any) -> dict[int, float]:
        return dict(enumerate(values.get(subject, [])))

    return get


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        ([[0.90] * 3, [0.93] * 3, [0.91] * 3], "holds"),
        ([[0.90] * 3, [0.93] * 3, [0.95] * 3], "does not hold"),
        ([[0.90] * 3, [0.93] * 3, [0.91, 0.95, 0.93]], "undecided"),
        ([[0.90] * 3, [0.93] * 3, []], "not judged"),
    ],
)
def test_a_peak_is_above_both_ends(
    parts: SimpleNamespace, values: list[list[float]], verdict: str
) -> None:
    sweep = parts.claims.PATCH_ANCHORS
    statement = parts.statements.peak("", sweep, sweep[1:2], sweep[1])
    tests = statement.tests(answers(dict(zip(sweep, values, strict=True))))
    assert parts.judgement.all_of(test.verdict for test in tests) == verdict


def test_another_value_above_the_peak_refutes_it(parts: SimpleNamespace) -> None:
    sweep = parts.claims.CLS_SUPPORTS
    values = dict(zip(sweep, [[0.90] * 3, [0.95] * 3, [0.92] * 3, [], [0.9] * 3], strict=True))
    statement = parts.statements.peak("", sweep, sweep[2:4], sweep[2])
    verdicts = [test.verdict for test in statement.tests(answers(values))]
    assert verdicts == ["holds", "holds", "does not hold"]
    values[sweep[3]] = [0.96] * 3  # the best of those near the claimed peak counts
    verdicts = [test.verdict for test in statement.tests(answers(values))]
    assert verdicts == ["holds"] * 3


def test_flat_compares_all_pairs(parts: SimpleNamespace) -> None:
    sweep = parts.claims.PATCH_ANCHORS
    statement = parts.statements.flat("", sweep, sweep[1])
    close = answers(dict(zip(sweep, [[0.900] * 3, [0.907] * 3, [0.914] * 3], strict=True)))
    verdicts = [test.verdict for test in statement.tests(close)]
    assert verdicts == ["holds", "does not hold", "holds"]  # 0.7, 1.4 and 0.7 points


def test_of_several_runs_the_best_counts(parts: SimpleNamespace) -> None:
    msn, pmsn = parts.claims.PRIORS["msn"], parts.claims.PRIORS["pmsn"]
    values = {msn[0]: [0.7] * 3, msn[1]: [0.9] * 3, msn[2]: [0.6] * 3}
    values |= dict.fromkeys(pmsn, [0.8] * 3)
    (test,) = parts.statements.more("", msn, pmsn).tests(answers(values))
    assert test.verdict == "holds" and test.samples == pytest.approx(dict.fromkeys(range(3), 0.1))
    del values[pmsn[1]]  # the best of those that are there need not be the best
    (test,) = parts.statements.more("", msn, pmsn).tests(answers(values))
    assert test.verdict == "not judged"


def test_growth_is_the_power_of_k(parts: SimpleNamespace) -> None:
    small, large = parts.claims.PROTOTYPES[0], parts.claims.PROTOTYPES[-1]
    statement = parts.statements.slow_growth("", small, large, 16.0)
    for power, verdict in ((0.0, "holds"), (1.0, "does not hold")):
        logs = {small: [4.0] * 3, large: [4.0 + power * np.log(16)] * 3}
        (test,) = statement.tests(answers(logs))
        assert test.verdict == verdict and test.samples[0] == pytest.approx(power)


# Rows


def row(parts: SimpleNamespace, one: Any, seed: int, knn: float, **others: Any) -> dict[str, Any]:
    share = {str(eps): [[100, 0.8], [200, 0.6], [STEPS, 0.5]] for eps in parts.claims.EPS}
    return parts.measure.key_of(one, seed) | {
        "run": parts.runs.label(one),
        "knn": [[0, 0.8], [STEPS, knn]],
        "prototypes": 512,
        "unique": share,
        "epoch": 22.5,
        "signs": {"entropy": 2.0, "log_k": 4.0},
        "images_per_s": 900.0,
        "command_s": 60.0,
        **others,
    }


def test_numbers_are_found_in_rows(parts: SimpleNamespace) -> None:
    statements, found = parts.statements, row(parts, parts.claims.IBOT, 0, 0.9)
    assert statements.KNN.value(found) == 0.9
    assert statements.ENTROPY.value(found) == 0.5
    assert statements.unique(0.025).value(found) == 0.5
    assert statements.unique(0.025, 10.0).value(found) == 0.6  # at step 200, epoch 8.9
    assert statements.log_unique(0.025).value(found) == pytest.approx(np.log(256))
    assert statements.unique(0.025).value(found | {"unique": {}}) is None


def test_what_has_a_row_is_not_run_again(parts: SimpleNamespace) -> None:
    command, claims = parts.command, [parts.claims.by_name()["table_9"]]
    first, second = parts.claims.subjects(claims[0], quick=False)
    args = SimpleNamespace(quick=True, seeds=2, steps=STEPS, topology="")
    wanted = command.measurements(claims, args)
    assert wanted == [(first, 0), (second, 0), (first, 1), (second, 1)]
    rows = [row(parts, first, 0, 0.9)]
    assert command.without_row(wanted, args, rows) == wanted[1:]
    rows = [one | {"version": "0.0.1"} for one in rows]  # another version is run again
    assert command.without_row(wanted, args, rows) == wanted


def test_a_setting_of_a_later_version_leaves_rows_as_long_as_it_has_no_effect(
    parts: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = parts.rows.recipe("dino")
    monkeypatch.setattr(config_lib, "BEFORE", {})  # no version has later settings but the next
    size, digest = config.batch_size, parts.rows.settings_digest(config)
    monkeypatch.setitem(config_lib.BEFORE, "99.0.0", {"batch_size": size})
    without = parts.rows.settings_digest(config)
    assert without != digest
    config.batch_size = size + 1
    changed = parts.rows.settings_digest(config)
    assert changed not in (without, digest)
    monkeypatch.setattr(parts.rows, "COMPUTES", "99.0.0")  # it is as old as the others
    assert parts.rows.settings_digest(config) == changed
    config.batch_size = size
    assert parts.rows.settings_digest(config) == digest


def test_the_committed_rows_have_the_settings_of_claims(parts: SimpleNamespace) -> None:
    """Else all would be trained again: see `BEFORE` in the config, and COMPUTES in the rows."""
    lines = (BENCHMARKS.parent / "docs" / "claims.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if row["kind"] == "run"]
    current = {parts.runs.digest(one) for one in trained(parts, quick=False)}
    assert rows and {row["settings"] for row in rows} <= current


def test_costs_are_judged_on_each_device(parts: SimpleNamespace) -> None:
    claim = parts.claims.by_name()["table_b1"]
    cost = next(one for one in parts.claims.subjects(claim, quick=False) if one.quantity == "time")
    key = {"kind": "cost", "version": parts.rows.COMPUTES, "settings": parts.costs.digest(cost)}
    rows = [
        key | {"device": "cpu", "ratios": [1.5, 1.6, 1.7]},  # is replaced by the newer one
        key | {"device": "cpu", "ratios": [1.01, 1.0, 0.99]},
        key | {"device": "NVIDIA H100", "ratios": [1.2, 1.21, 1.22]},
    ]
    measured = parts.report.Measured(rows, STEPS)
    assert parts.report.table([claim], measured).count("| 3 rounds | ") == 2
    statement = next(one for one in claim.statements if cost in one.needed)
    found = {device: test for device, test in parts.report.tests_of(statement, measured)}
    assert {device: test.verdict for device, test in found.items()} == {
        "cpu": "holds",
        "NVIDIA H100": "does not hold",
    }
    assert parts.report.verdict_of(claim, measured) == "does not hold"


def test_described_gpus_have_rows_of_memory_and_of_estimates(
    parts: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim = parts.claims.by_name()["table_b1"]
    args = SimpleNamespace(quick=True, seeds=3, steps=STEPS, topology="h100:1")
    wanted = [cost for cost, _ in parts.command.measurements([claim], args)]
    assert {cost.quantity for cost in wanted} == {"memory", "estimate"}
    here = SimpleNamespace(quick=True, seeds=3, steps=STEPS, topology="")
    assert parts.claims.ESTIMATE not in [
        one for one, _ in parts.command.measurements([claim], here)
    ]
    sizes = {parts.claims.SOP_STEP.file: 3, parts.claims.IBOT_STEP.file: 4}

    def planned(step: Any, topology: str) -> SimpleNamespace:
        assert topology == "h100:1"
        size = sizes[step.file]
        return SimpleNamespace(memory={"parameters": size, "temporary": size}, milliseconds=size)

    monkeypatch.setattr(parts.costs, "planned", planned)
    monkeypatch.setattr(parts.costs, "estimated", lambda one: {"ms": one.milliseconds})
    for cost in wanted:
        row = parts.command.do(cost, 0, args)
        assert row["ratios"] == [0.75] and row["device"] == "h100:1 by its compiler"
    assert row["estimate"] == {"step": 0.003, "base": 0.004}


def test_only_gpus_can_be_described(parts: SimpleNamespace) -> None:
    """There is no estimate for others."""
    with pytest.raises(UserError, match="v5e:4 names a GPU that is not known here"):
        parts.costs.measure(parts.claims.ESTIMATE, "v5e:4")


def test_bad_rows_and_names_are_told_before_anything_is_run(
    parts: SimpleNamespace,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "rows.jsonl"
    whole = json.dumps({"kind": "run", "version": "0.0.1", "settings": "0"})
    for damaged in (whole[:-3], "[1, 2]", "", '{"kind": "run", "version": "0.0.1"}'):
        out.write_text(f"{whole}\n{damaged}\n{whole}\n")
        monkeypatch.setattr(sys, "argv", ["claims.py", "--table", f"--out={out}"])
        with pytest.raises(UserError, match=r"line 2 of .*rows.jsonl is not a row"):
            parts.command.main()
    monkeypatch.setattr(sys, "argv", ["claims.py", "--list", "--only=", f"--out={tmp_path / 'no'}"])
    with pytest.raises(SystemExit, match="2"):
        parts.command.main()
    assert "unknown claims" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["claims.py", "--list", "--report"])
    with pytest.raises(SystemExit, match="2"):
        parts.command.main()
    assert "not allowed with" in capsys.readouterr().err
    for flag, message in {
        f"--out={tmp_path}": "is a folder; expected a file of rows",
        f"--out={out}/rows.jsonl": "Not a directory; choose another --out",
        f"--workdirs={out}/runs": "Not a directory; choose another --workdirs",
    }.items():
        words = ["claims.py", "--only=table_9", f"--out={tmp_path / 'new.jsonl'}", flag]
        monkeypatch.setattr(sys, "argv", words)
        with pytest.raises(UserError, match=message):
            parts.command.main()


@pytest.mark.parametrize(
    ("words", "idle"),
    [
        (("--report", "--only=table_9"), "--only"),
        (("--report", "--sizes"), "--sizes"),
        (("--table", "--quick"), "--quick"),
        (("--list", "--keep"), "--keep"),
        (("--sizes", "--seeds=3"), "--seeds"),
        (("--quick", "--docs=elsewhere"), "--docs"),
    ],
)
def test_a_flag_without_effect_is_refused(
    words: tuple[str, ...],
    idle: str,
    parts: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["claims.py", *words])
    with pytest.raises(SystemExit, match="2"):
        parts.command.main()
    assert f"error: {idle} has no effect with" in capsys.readouterr().err


def test_a_workdir_is_deleted_once_its_row_is_written(
    parts: SimpleNamespace, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a full disk, or an interruption in between, would cost the whole run."""
    soft, _ = parts.claims.subjects(parts.claims.by_name()["table_9"], quick=False)
    out, workdirs = tmp_path / "new" / "rows.jsonl", tmp_path / "runs"

    def measured(one: Any, seed: int, steps: int, workdirs: pathlib.Path) -> dict[str, Any]:
        parts.measure.workdir_of(one, seed, steps, workdirs).mkdir(parents=True)
        return row(parts, one, seed, 0.9)

    def full(out: pathlib.Path, row: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(parts.measure, "measure", measured)
    monkeypatch.setattr(parts.command, "keep_compiled", lambda: None)
    words = ["claims.py", "--only=table_9", f"--out={out}", f"--workdirs={workdirs}"]
    monkeypatch.setattr(sys, "argv", words)
    with monkeypatch.context() as patch:
        patch.setattr(parts.command, "append", full)
        with pytest.raises(OSError, match="no space left"):
            parts.command.main()
    (left,) = workdirs.iterdir()
    assert left == parts.measure.workdir_of(soft, 0, STEPS, workdirs)
    left.rmdir()
    parts.command.main()
    assert len(parts.rows.read(out, parts.command.KEYS)) == 2 and not list(workdirs.iterdir())


def test_the_report_has_numbers_verdicts_and_what_is_missing(
    parts: SimpleNamespace, tmp_path: pathlib.Path
) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib: pip install -e '.[plot]'")
    runs = parts.claims
    soft, hot = runs.subjects(runs.by_name()["table_9"], quick=False)
    rows = [row(parts, soft, seed, 0.92 + 0.01 * seed) for seed in range(3)]
    rows += [row(parts, hot, seed, 0.90 + 0.01 * seed) for seed in range(3)]
    rows += [row(parts, runs.DINO, 0, 0.9)]
    rows += [row(parts, runs.DINO, 1, 0.9, version="0.0.1")]
    folder = tmp_path / "docs"
    parts.report.write(parts.report.Measured(rows, STEPS), folder)
    text = (folder / "claims.md").read_text()
    assert (
        f"sop_jax {parts.rows.COMPUTES}: 7 runs" in text
        and "versions or settings, left out: 1." in text
    )
    section = text.split("## table_9")[1].split("\n## ")[0]
    assert "+2.0 ± 0.0 (+2.0 to +2.0) | 3 | holds |" in section
    assert "Missing" not in section
    assert "| sop: cls.votes one_hot | 3 | 91.0 ± 0.6 |" in section
    joint = text.split("## joint")[1].split("\n## ")[0]
    assert "1 seed, not judged" in joint and "Missing: 8 runs, of dino; ibot; carp." in joint
    assert {file.name for file in folder.iterdir()} == {"claims.md", *parts.report.FIGURES} - {
        "claims_sweeps.png"
    }
