r"""Puts the papers' claims to the test on scikit-learn's digits.

    python benchmarks/claims.py --quick
    python benchmarks/claims.py --only=table_1,table_9 --seeds=3
    python benchmarks/claims.py --report

The claims, with their sources, limits and margins, are in paper_claims/claims.py. The first two
commands train what the claims need and print each claim as it stands: it holds, does not hold, is
undecided, or is not judged because there are fewer than three seeds. --quick takes only the two
ends of every sweep, and leaves some claims out. Each finished run appends a row to --out, and is
never trained again: a row is known by its settings, its seed and the newest version of sop_jax that
changed what runs compute. Ctrl-C loses nothing, because the current run resumes. The third command
writes docs/claims.md and its figures from the rows, and trains nothing; --list prints what would be
run, and --table the claims. --sizes adds rows of what the papers' own runs would take, and
--topology=h100:1 rows of what steps cost on a GPU that need not exist, by its compiler. With
--part=1/2 and --part=2/2 two processes share the work, on one core each:

    taskset -c 0 python benchmarks/claims.py --quick --part=1/2 &
    taskset -c 1 python benchmarks/claims.py --quick --part=2/2
"""

import argparse
import shutil
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from paper_claims import costs, measure, runs  # noqa: E402
from paper_claims.claims import CLAIMS, Claim, by_name, subjects  # noqa: E402
from paper_claims.costs import Cost, Size  # noqa: E402
from paper_claims.measure import rounded  # noqa: E402
from paper_claims.report import Measured, write  # noqa: E402
from paper_claims.report import table as table_of  # noqa: E402
from paper_claims.runs import Run  # noqa: E402
from paper_claims.statements import Subject, label  # noqa: E402
from rows import append, check_out, has, read  # noqa: E402

from sop_jax.compiled.cache import keep_compiled  # noqa: E402
from sop_jax.errors import Interrupted, UserError  # noqa: E402
from sop_jax.paths import check_writable  # noqa: E402

OF_RUNS = ("topology", "quick", "seeds", "part", "workdirs", "keep")
WITHOUT_EFFECT = {  # flags that say nothing beside another
    "report": ("only", "sizes", *OF_RUNS),
    "table": ("sizes", *OF_RUNS),
    "list": ("workdirs", "keep"),
    "sizes": ("quick", "seeds", "workdirs", "keep"),
    "topology": ("sizes", "quick", "seeds", "workdirs", "keep"),
}
KEYS = ("kind", "version", "settings")  # what every row has
RUN_MINUTES = 3.0  # as long as no run has been measured
OTHER_MINUTES: dict[type, float] = {Cost: 1.0, Size: 0.1}


def key_of(what: Subject | Size, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Returns the values that identify the row of a measurement."""
    if isinstance(what, Run):
        return measure.key_of(what, seed, args.steps)
    return costs.key_of(what, args.topology)


def measurements(claims: list[Claim], args: argparse.Namespace) -> list[tuple[Subject | Size, int]]:
    """Returns what claims need, with its seed: seed after seed, and then ratios of costs.

    On GPUs that are only described nothing is trained.
    """
    wanted = list(dict.fromkeys(one for claim in claims for one in subjects(claim, args.quick)))
    ratios = [one for one in wanted if isinstance(one, Cost)]
    found: list[tuple[Subject | Size, int]] = []
    if not args.topology:
        trained = [one for one in wanted if isinstance(one, Run)]
        found += [(one, seed) for seed in range(args.seeds) for one in trained]
    return found + [(one, 0) for one in ratios if costs.is_measurable(one, args.topology)]


def without_row(
    wanted: Sequence[tuple[Subject | Size, int]],
    args: argparse.Namespace,
    rows: list[dict[str, Any]],
) -> list[tuple[Subject | Size, int]]:
    """Returns the measurements that have no row yet."""
    return [(one, seed) for one, seed in wanted if not has(rows, key_of(one, seed, args))]


def part_of(text: str) -> tuple[int, int]:
    """Returns the numbers of `--part`, such as 1 and 2 of 1/2."""
    own, _, count = text.partition("/")
    if not (own.isdigit() and count.isdigit() and 1 <= int(own) <= int(count)):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a part; expected 1/2 or 2/2, for example"
        )
    return int(own), int(count)


def minutes(waiting: list[tuple[Subject | Size, int]], rows: list[dict[str, Any]]) -> float:
    """Returns the minutes that measurements take: of runs, as those before them on average."""
    found = [row["command_s"] / 60 for row in rows if row["kind"] == "run"]
    each = {**OTHER_MINUTES, Run: statistics.mean(found) if found else RUN_MINUTES}
    return sum(each[type(one)] for one, _ in waiting)


def do(what: Subject | Size, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Trains a run, compares two steps or counts operations, and returns the row."""
    if isinstance(what, Run):
        return measure.measure(what, seed, args.steps, args.workdirs)
    row = costs.extent(what) if isinstance(what, Size) else costs.measure(what, args.topology)
    return key_of(what, seed, args) | {"run": what.words} | rounded(row)


def name_of(what: Subject | Size, seed: int) -> str:
    """Returns a readable name of a measurement."""
    return f"{label(what)}, seed {seed}" if isinstance(what, Run) else what.words


def check_flags(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Ends the command if a flag is given that has no effect."""
    for mode, names in WITHOUT_EFFECT.items():
        for name in names:
            if getattr(args, mode) and getattr(args, name) != parser.get_default(name):
                parser.error(f"--{name} has no effect with --{mode}; leave one of them out")
    if not args.report and args.docs != parser.get_default("docs"):
        parser.error("--docs has no effect without --report; leave it out")


def main() -> None:
    """Runs what is missing and prints the claims, or writes the report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", help="names of claims, separated by commas; all by default")
    parser.add_argument("--quick", action="store_true", help="only the quick set")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=runs.STEPS)
    parser.add_argument(
        "--part", type=part_of, default=(1, 1), help="1/2 and 2/2 for two processes that share work"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "claims.jsonl")
    parser.add_argument("--workdirs", type=Path, default=ROOT / "runs" / "claims")
    parser.add_argument("--keep", action="store_true", help="keep the workdirs of finished runs")
    parser.add_argument(
        "--sizes", action="store_true", help="estimate what the papers' runs take; run nothing else"
    )
    parser.add_argument(
        "--topology", default="", help="costs on GPUs that need not exist, such as h100:1"
    )
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--list", action="store_true", help="print what would be run")
    instead.add_argument("--table", action="store_true", help="print the claims, and run nothing")
    instead.add_argument("--report", action="store_true", help="write docs/claims.md, run nothing")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="the folder of the report")
    args = parser.parse_args()
    check_flags(parser, args)
    known = by_name()
    names = list(known) if args.only is None else args.only.split(",")
    if unknown := [name for name in names if name not in known]:
        parser.error(f"unknown claims {', '.join(unknown)}; expected some of {', '.join(known)}")
    if args.seeds < 1 or args.steps < 1:
        parser.error("--seeds and --steps must be 1 or more; for example, --seeds=3")
    claims = [claim for claim in CLAIMS if claim.name in names]
    rows = read(args.out, KEYS)
    if args.report:
        check_writable(args.docs, "--docs")
        write(Measured(rows, args.steps), args.docs)
        return
    if args.sizes:
        sizes = dict.fromkeys(claim.size for claim in claims if claim.size)
        wanted: list[tuple[Subject | Size, int]] = [(size, 0) for size in sizes]
    else:
        wanted = measurements(claims, args)
    own, count = args.part
    waiting = without_row(wanted[own - 1 :: count], args, rows)
    if args.list:
        for one, seed in waiting:
            print(name_of(one, seed))
        print(f"{len(waiting)} measurements, about {minutes(waiting, rows):.0f} minutes")
        return
    if args.table:
        waiting = []
    if waiting:
        check_out(args.out)
        check_writable(args.workdirs, "--workdirs")
    keep_compiled()
    for i, (one, seed) in enumerate(waiting):
        if not without_row([(one, seed)], args, read(args.out, KEYS)):
            continue  # another process has measured it meanwhile
        words = f"== {i + 1} of {len(waiting)}: {name_of(one, seed)}"
        print(words, file=sys.stderr, flush=True)
        append(args.out, do(one, seed, args))
        if isinstance(one, Run) and not args.keep:  # not before its row is safe
            shutil.rmtree(measure.workdir_of(one, seed, args.steps, args.workdirs))
    print(table_of(claims, Measured(read(args.out, KEYS), args.steps)))


if __name__ == "__main__":
    try:
        main()
    except (UserError, Interrupted) as error:
        sys.exit(f"error: {error}")
