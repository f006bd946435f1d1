"""Writes a report of runs to look at: one page with curves, words, tables and pictures.

    python -m sop_jax.report --workdir=DIR
    python -m sop_jax.report --workdir=DIR OTHER ... [--out=FILE]
    python -m sop_jax.report --workdir=DIR --data.path=IMAGES

The page is DIR/report.html by default. It needs no other file and no network. It has the curves,
the health of the assignments in words, the speed and what limits it, the results of
sop_jax.evaluate beside the papers' numbers, and the collapse of prototypes. For pictures, the
newest checkpoint is loaded: anchors with their supports and votes, nearest images, a map of the
features, attention, principal components of patches, and masked images. Several runs are compared.

A run that trains may be reported on: its folder is only read. It writes the same page without
pictures itself, at evaluations and at its end. --data.path names the new place of images that were
moved. docs/report.md says how to read each part.

For example, after the quick start:

    python -m sop_jax.report --workdir=runs/digits
"""

import functools
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from absl import flags
from etils import epath

from sop_jax import __version__, cli, paths
from sop_jax.diagnosis import figures, subjects
from sop_jax.diagnosis.diagnosis import Result, diagnose
from sop_jax.errors import UserError
from sop_jax.objectives.methods import objective_of
from sop_jax.page import charts, markup, tables, words
from sop_jax.page.curves import curves
from sop_jax.page.gallery import MAP_SCRIPT
from sop_jax.page.runs import Row, Shown, read_runs, series
from sop_jax.page.samples import Samples, samples
from sop_jax.parallel import hosts
from sop_jax.parallel.mesh import make_mesh
from sop_jax.paths import write_whole
from sop_jax.pictures import subject
from sop_jax.training import checkpoint

FILE = "report.html"
SHOWN = 6  # images in each kind of picture
EMBEDDED = 500  # images of each split among which the nearest are searched, and in the map
MOST_DIAGNOSED = 8192  # prototypes; to count more takes minutes
SHARE = 0.01  # of the time of a run that it may spend on its report before its end
GUESS = 3.0  # seconds that the first report takes

Verdict = Callable[[Sequence[Row]], str | None]


class Asked(NamedTuple):
    """What a command asks for.

    Attributes:
        workdirs: the folders of runs, at least one.
        out: the page, or the folder that it is written to; by default the first run's.
        pictures: whether checkpoints are loaded, for pictures and for the collapse of prototypes.
        shown: the most images of each kind of picture.
        embedded: the most images of each split that are embedded.
        step: the step of the checkpoint of every run; the newest by default.
        seed: draws images, anchors and masks.
        data: data other than the run's, see `data.named.name_data`.
    """

    workdirs: Sequence[str]
    out: str | None = None
    pictures: bool = True
    shown: int = SHOWN
    embedded: int = EMBEDDED
    step: int | None = None
    seed: int = 0
    data: Mapping[str, Any] = {}


def report(asked: Asked, tell: Callable[[str], Any] = lambda text: None) -> epath.Path:
    """Writes the report that is asked for.

    Args:
        asked: what is asked for.
        tell: called with what is done next, because pictures may take minutes, and with what is
            not shown although pictures are asked for.

    Returns:
        The path of the page.

    Raises:
        UserError: matplotlib is not installed, a folder is not that of a run, the checkpoint or
            the images that are named are not there, or the page cannot be written. The page of an
            earlier report stays.
    """
    charts.check_plots()
    check(asked)
    runs = read_runs(asked.workdirs)
    place = place_of(asked)
    paths.check_writable(place.parent, "--out")
    check_named(asked, runs)
    verdicts = {run.name: verdict_of(run) for run in runs}
    collapse = {run.name: recorded(run) for run in runs}
    shown, left_out = [], []
    for number, run in enumerate(runs if asked.pictures else []):
        found = samples(
            run.workdir,
            f"run{number}",
            asked.shown,
            asked.embedded,
            asked.seed,
            asked.data,
            asked.step,
            functools.partial(_tell_of, tell, run.name),
        )
        missing = found.left_out
        shown.append(pictures_of(run, found, len(runs) > 1))
        if not collapse[run.name]:
            tell(f"{run.name}: counting unique prototypes")
            collapse[run.name], uncounted = diagnosed(run, asked.step, asked.seed)
            missing = [*missing, *uncounted]
        left_out += name_all(missing, run, runs)
    for text in left_out:
        tell(f"not shown: {text}")
    if not asked.pictures:
        left_out.append("No pictures were asked for.")
    write(place, page(runs, verdicts, collapse, "".join(shown), left_out))
    return place


def pictures_of(run: Shown, found: Samples, several: bool) -> str:
    """Returns the pictures of a run as HTML, below its name if there are several runs."""
    if not found.parts:
        return ""
    level = "h4" if several else "h3"
    parts = [
        f"<{level}>{markup.escape(title)}</{level}>{content}" for title, content in found.parts
    ]
    name = f"<h3>{markup.escape(run.name)}</h3>" if several else ""
    return f"{name}<p>Of the teacher at step {found.step:,}.</p>" + "\n".join(parts)


def _tell_of(tell: Callable[[str], Any], name: str, text: str) -> None:
    tell(f"{name}: {text}")


def check(asked: Asked) -> None:
    """Checks what can be without opening anything.

    Raises:
        UserError: a folder is given twice, or flags would have no effect.
    """
    if not asked.workdirs:
        raise UserError("give --workdir=DIR, the folder of a run; more can follow")
    places = [path if "://" in path else str(epath.Path(path).resolve()) for path in asked.workdirs]
    twice = [
        path for path, place in zip(asked.workdirs, places, strict=True) if places.count(place) > 1
    ]
    if twice:
        raise UserError(f"{twice[0]} is given twice; give each run once")
    if hosts.several():
        raise UserError("a report is drawn by one process; leave out --processes")
    if not asked.pictures:
        idle = [f"data.{name}" for name in sorted(asked.data)]
        idle += ["step"] * (asked.step is not None)
        if idle:
            raise UserError(
                f"--{idle[0]} would have no effect, because --nopictures loads no network and no "
                "images; leave one of them out"
            )


def check_named(asked: Asked, runs: Sequence[Shown]) -> None:
    """Checks that every run has the checkpoint, and the images, that are asked for by name.

    Raises:
        UserError: one has not.
    """
    for run in runs:
        if asked.step is not None:
            checkpoint.choose_step(run.workdir, asked.step)
        if asked.data:
            subject.open_images(run.workdir, asked.data)


def place_of(asked: Asked) -> epath.Path:
    """Returns the path of the page."""
    out = epath.Path(asked.out or asked.workdirs[0])
    return out if out.suffix.lower() in (".html", ".htm") else out / FILE


def write(place: epath.Path, text: str) -> None:
    """Writes a page.

    Raises:
        UserError: it cannot be written.
    """
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        write_whole(place, text)
    except OSError as error:
        raise UserError(
            f"{place} cannot be written: {error.strerror or error}; name another file with --out"
        ) from error


def name_all(sentences: Sequence[str], run: Shown, runs: Sequence[Shown]) -> list[str]:
    """Returns sentences about a run that say of which, if there are several."""
    return [f"{run.name}: {text}" if len(runs) > 1 else text for text in sentences]


def verdict_of(run: Shown) -> Verdict | None:
    """Returns what judges the signs of health of a run; None if its settings are not known."""
    if run.config is None:
        return None
    try:
        return objective_of(run.config, make_mesh(1))[1].verdict
    except UserError:
        return None


# The collapse of prototypes


def recorded(run: Shown) -> dict[str, Result]:
    """Returns the newest results of `sop_jax.diagnose` in the folder of a run, by layer."""
    files = [x for x in tables.result_files(run) if x.name.startswith(tables.DIAGNOSIS)]
    for path in sorted(files, key=lambda file: file.stat().mtime, reverse=True):
        content = tables.read_result(path)
        try:
            assert content is not None
            return {entry["name"]: entry["result"] for entry in content["subjects"]}
        except (AssertionError, KeyError, TypeError):  # a damaged file
            continue
    return {}


def diagnosed(run: Shown, step: int | None, seed: int) -> tuple[dict[str, Result], list[str]]:
    """Counts the unique prototypes of [CLS] of a checkpoint.

    Returns:
        The result by layer, and why there is none.
    """
    how = f"python -m sop_jax.diagnose --workdir={shlex.quote(run.workdir)}"
    try:
        subjects.check_run(run.workdir)
        found = subjects.of_run(run.workdir, step, seed=seed).subjects[0]
    except UserError as error:
        return {}, [f"Unique prototypes are not counted: {error}"]
    if len(found.rows) > MOST_DIAGNOSED:
        return {}, [
            f"Unique prototypes are not counted, because {len(found.rows):,} take long; {how} "
            "counts them, and the next report shows its result."
        ]
    return {found.layer: diagnose(found.rows, images=found.images)}, []


# The page


def page(
    runs: Sequence[Shown],
    verdicts: Mapping[str, Verdict | None],
    collapse: Mapping[str, Mapping[str, Result]],
    shown: str,
    left_out: Sequence[str],
) -> str:
    """Returns the page.

    Args:
        runs: the runs.
        verdicts: what judges the health of each run, by name.
        collapse: results of diagnoses by run and layer.
        shown: HTML of the pictures.
        left_out: sentences on what is not shown.
    """
    import matplotlib

    several = len(runs) > 1
    parts: list[tuple[str, str, str]] = []
    notes = [text for run in runs for text in name_all(run.notes, run, runs)]
    compared = tables.differences(runs) or ""
    begin = "".join(map(markup.paragraph, notes))
    parts.append(("summary", "Summary", begin + tables.summary(runs) + compared))
    health = [in_words(run, words.health(run, verdicts[run.name]), several) for run in runs]
    parts.append(("health", "Health", "".join(health)))
    with matplotlib.rc_context(charts.STYLE):
        drawn = [charts.figure(chart, table) for chart, table in curves(runs)]
        named = {
            f"{run.name}: {layer}" if several else layer: result
            for run in runs
            for layer, result in collapse.get(run.name, {}).items()
        }
        counted = [charts.figure(chart) for chart in figures.charts_of(named)] if named else []
    if drawn:
        parts.append(("curves", "Curves", f'<div class="charts">{"".join(drawn)}</div>'))
    speed = "".join(in_words(run, words.throughput(run), several) for run in runs)
    parts.append(("speed", "Speed", speed))
    parts.append(("evaluations", "Evaluations", evaluations(runs)))
    if counted:
        content = figures.table(named, {}) + f'<div class="charts">{"".join(counted)}</div>'
        parts.append(("collapse", "Collapse of prototypes", content))
    if shown:
        parts.append(("pictures", "Pictures", shown))
    if left_out:
        items = "".join(f"<li>{markup.escape(text)}</li>" for text in left_out)
        parts.append(("missing", "Not shown", f"<ul>{items}</ul>"))
    title = "Report of " + ", ".join(run.name for run in runs)
    links = markup.contents([(name, heading) for name, heading, _ in parts])
    when = time.strftime("%Y-%m-%d %H:%M")
    body = (
        f'<a class="skip" href="#main">Skip to the content</a>\n'
        f'<header><h1>{markup.escape(title)}</h1><p class="faint">{when}, sop_jax '
        f"{__version__}</p>{links}</header>\n"
        f'<main id="main">{"".join(markup.section(*part) for part in parts)}</main>'
    )
    return markup.page(title, body, MAP_SCRIPT if shown else "")


def in_words(run: Shown, sentences: Sequence[words.Sentence], several: bool) -> str:
    """Returns sentences on a run, below its name if there are several."""
    title = f"<h3>{markup.escape(run.name)}</h3>" if several else ""
    return title + words.as_list(sentences)


def evaluations(runs: Sequence[Shown]) -> str:
    """Returns the results of all runs."""
    content = ""
    for run in runs:
        found, notes = tables.evaluations(run, len(runs) > 1)
        content += found + "".join(map(markup.paragraph, name_all(notes, run, runs)))
    if content:
        return content
    known = [run for run in runs if series(run, "knn_top1")]  # their images have labels
    workdir = shlex.quote((known or runs)[0].workdir)
    how = f"python -m sop_jax.evaluate --workdir={workdir} --task=knn"
    if not known:
        how += " --data.path=IMAGES"
    text = f"There are no results of sop_jax.evaluate yet: {how} measures the first."
    if not known:
        text += (
            " IMAGES is a folder of images with labels: it contains train and val, and each of "
            "them one folder per class."
        )
    return markup.paragraph(text)


# The report of a run that trains


def reporter(
    workdir: epath.PathLike,
    verdict: Verdict,
    note: Callable[[str], Any],
    clock: Callable[[], float] = time.monotonic,
) -> Callable[[bool], None]:
    """Returns a function that writes the report of a run that trains, without pictures.

    Called at an evaluation, it writes the page unless the run would then have spent more than
    SHARE of its time on reports; called with True, at the end, it always does. It never raises:
    a report that cannot be drawn is a message, and the run goes on. Only the first process writes.

    Args:
        workdir: the folder of the run.
        verdict: judges its logged rows.
        note: shows a message once.
        clock: returns the time in seconds.
    """
    began, spent, longest = clock(), 0.0, GUESS
    failed = False

    def write_report(last: bool) -> None:
        nonlocal spent, longest, failed
        start = clock()
        affordable = spent + longest <= SHARE * (start - began)
        if not hosts.is_first() or not (last or (affordable and not failed)):
            return
        try:
            charts.check_plots()
            (run,) = read_runs([workdir])
            how = f"python -m sop_jax.report --workdir={shlex.quote(str(workdir))}"
            text = page(
                [run],
                {run.name: verdict},
                {run.name: recorded(run)},
                "",
                [f"Pictures are not drawn while a run trains; {how} draws them."],
            )
            write_whole(epath.Path(workdir) / FILE, text)
        except Exception as error:  # of any kind: a picture must never end a training
            failed = True
            kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
            note(f"no report is written: {kind}{error}")
        took = clock() - start
        spent, longest = spent + took, took

    return write_report


def main() -> None:
    """Writes the report of the runs that the flags name."""
    args = flags.FLAGS
    asked = Asked(
        cli.several_paths(args.workdir),
        args.out,
        args.pictures,
        args.shown,
        args.images,
        args.step,
        args.seed,
        cli.given_data(),
    )
    print(report(asked, lambda text: print(text, file=sys.stderr)))


if __name__ == "__main__":
    cli.define_path("workdir", "The folder of a run; more can follow.", several=True)
    cli.define_path("out", "The page, or its folder; by default that of the first run.")
    flags.DEFINE_bool("pictures", True, "Load the newest checkpoint and draw pictures.")
    flags.DEFINE_integer(
        "images",
        EMBEDDED,
        "The most images of each split whose features are computed, for neighbours and the map.",
        lower_bound=3,
    )
    flags.DEFINE_integer("step", None, "The checkpoint; the newest by default.")
    flags.DEFINE_integer("shown", SHOWN, "The most images of each kind of picture.", lower_bound=1)
    flags.DEFINE_integer(
        "seed", 0, "Draws images, anchors and masks.", lower_bound=0, upper_bound=2**32 - 1
    )
    cli.define_data(
        train_split="The split of images trained on.", test_split="The split of other images."
    )
    cli.run(main, more="workdir")
