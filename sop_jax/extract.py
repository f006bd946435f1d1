r"""Writes the features of images to a file.

    python -m sop_jax.extract --workdir=DIR --images=FOLDER --out=F.npz [--step=N] [--patches]
    python -m sop_jax.extract --workdir=DIR --images=A.jpg --images=B.jpg --out=F.csv
    python -m sop_jax.extract --workdir=DIR --data.path=DATA --data.train_split=val --out=F.parquet

F.npz contains `features` float32 [n, D], the teacher's [CLS] after the final norm (the mean of the
patches with model.pool=mean and for a Swin); `names` [n], the paths below FOLDER in sorted order;
and `step`. If the folders of FOLDER are classes, it also has `labels` int32 [n] and `class_names`;
with --patches also `patch_features` float16 [n, L, D], in row-major order. F.csv has the columns
`name`, `label` (the name of the class), `feature_0`, `feature_1` and so on; F.parquet has `name`,
`label` and `features`. Images that cannot be read have no row and are listed on stderr.

Folders called train, val, valid, validation or test are splits: they are part of the names, and
labels come from the folders in them. With --nosplits they are classes. The bytes of names that are
not UTF-8 are surrogates in F.npz, which os.fsencode(name) converts back; F.csv contains the bytes
themselves, and F.parquet a printable form such as caf\xe9.jpg.

For example, after the quick start, of the pictures of the documents:

    python -m sop_jax.extract --workdir=runs/digits --images=docs --out=features.npz
"""

import csv
import io
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import tqdm
from absl import flags
from etils import epath

from sop_jax import cli, paths
from sop_jax.data.decode import decoding
from sop_jax.data.folders import FolderSource, list_images, printable, whole_tree
from sop_jax.data.named import describe, name_data
from sop_jax.data.sources import Source, notes, open_source
from sop_jax.errors import UserError
from sop_jax.evaluation.features import make_extractor, whole
from sop_jax.evaluation.views import view_of
from sop_jax.monitor.corrupt import print_corrupt
from sop_jax.parallel import hosts
from sop_jax.parallel.mesh import make_mesh
from sop_jax.pretrained import load_network, settings_of


def export(
    workdir: epath.PathLike,
    source: Source,
    out: epath.PathLike,
    step: int | None = None,
    patches: bool = False,
    overwrite: bool = False,
    batch_size: int | None = None,
) -> None:
    """Writes the features of all images of a source; all processes call it.

    Args:
        workdir: the folder of the run.
        source: the images, from `open_images` or `open_data`.
        out: the file to write, whose extension is one of `WRITERS`; it appears when it is complete.
        step: the step of the checkpoint; the newest by default.
        patches: whether to also write the patch tokens.
        overwrite: whether to replace `out` if it exists.
        batch_size: the number of images at a time; `eval.batch_size` of the run by default.

    Raises:
        UserError: there is no run, no checkpoint or no readable image, or `out` cannot be written.
    """
    out = epath.Path(out)
    hosts.check_agreement({"images": len(source), "their names": source.digest})
    chief = hosts.is_first()  # only the first process writes and prints
    if chief:
        check_out(out, patches, overwrite)
        for note in notes(source):
            print(note, file=sys.stderr)
    config, model, teacher, step = load_network(workdir, step)
    config.eval.batch_size = batch_size or config.eval.batch_size
    mesh = make_mesh()
    extract = make_extractor(model, config, mesh, view_of(config, patches=patches))
    with tqdm.tqdm(total=len(source), unit="image", dynamic_ncols=True, disable=not chief) as bar:
        features = whole(extract(teacher, source, bar.update))
    if not chief:
        return
    print_corrupt(source, features.corrupt, decoding(config.data, source))
    if not len(features.index):
        raise UserError(
            f"none of the {len(source)} images can be read, for the reasons listed above; give "
            "images in a format that Pillow can read"
        )
    arrays = {
        "features": features.vectors,
        "names": names_of(source, features.index),
        "step": np.array(step),
    }
    if source.class_names is not None:
        arrays["labels"] = features.labels
        arrays["class_names"] = np.array(source.class_names)
    if features.patches is not None:
        arrays["patch_features"] = features.patches
    out.parent.mkdir(parents=True, exist_ok=True)
    with paths.draft_of(out) as draft, draft.open("wb") as file:
        WRITERS[out.suffix](file, arrays)


# What is read


def open_images(images: Sequence[str], splits: bool = True) -> FolderSource:
    """Opens the images below one folder, with labels, or of several files and folders, without.

    Args:
        images: files and folders, local or remote (`gs://`).
        splits: whether folders that have the name of a split are splits rather than classes.

    Raises:
        UserError: one of them does not exist, or there is no image.
    """
    for path in images:
        if not epath.Path(path).exists():
            raise UserError(
                f"there is no file or folder {path}; give --images once for each file or folder of "
                "images"
            )
    if len(images) == 1 and epath.Path(images[0]).is_dir():
        return whole_tree(images[0], splits)
    if not splits:
        raise UserError(
            "--nosplits would have no effect: it is for a single folder of --images; leave it out"
        )
    files: set[str] = set()
    words: list[str] = []
    for path in images:
        if epath.Path(path).is_dir():
            listing = list_images(path)
            files |= {f"{path}/{name}" for name in listing.files}
            words += listing.notes
        else:
            files.add(path)
    root = _common_folder(sorted(files))
    names = [file.removeprefix(f"{root}/") if root != "." else file for file in sorted(files)]
    return FolderSource(root, names, None, None, words)


def _common_folder(files: Sequence[str]) -> str:
    """Returns the deepest folder that contains all files; `.` if relative paths share none."""
    parts = [file.split("/")[:-1] for file in files]
    shared = os.path.commonprefix(parts)
    if not shared and len({file.startswith("/") for file in files}) > 1:
        raise UserError(
            "--images has both relative and absolute paths; give all as relative paths, or all as "
            "absolute paths"
        )
    return "/".join(shared) or "."


def open_data(workdir: epath.PathLike, given: Mapping[str, str]) -> Source:
    """Opens the split `train_split` of the data that flags name, see `data.named.name_data`.

    Args:
        workdir: the folder of the run, whose data is the default.
        given: the flags that were given, by the names of settings.

    Raises:
        UserError: there is no such data.
    """
    data_config = settings_of(workdir).data
    try:
        # Nothing is classified, so no test split is needed.
        name_data(data_config, {**given, "test_split": ""})
        source = open_source(data_config, "train")
    except UserError as error:  # names the flags of training
        raise UserError(str(error).replace("--config.data.", "--data.")) from error
    assert source is not None  # only a test split may be missing
    if hosts.is_first():
        print(f"images of {describe(data_config)}", file=sys.stderr)
    return source


def names_of(source: Source, index: np.ndarray) -> np.ndarray:
    """Returns the names of records: relative paths for folders, `Source.name` for other sources."""
    if isinstance(source, FolderSource):
        return np.array(source.files)[index]
    return np.array([source.name(int(i)) for i in index])


# What is written

Arrays = dict[str, np.ndarray]


def check_out(out: epath.Path, patches: bool, overwrite: bool) -> None:
    """Checks that the file can be written.

    Raises:
        UserError: the extension is unknown or the format cannot store patches, or the file already
            exists or cannot be written.
    """
    if out.suffix not in WRITERS:
        raise UserError(
            f"--out={out} must end in {', '.join(WRITERS)}, which selects the format; rename it"
        )
    if patches and out.suffix != ".npz":
        raise UserError(
            f"{out.suffix} files cannot store --patches; give an --out that ends in .npz"
        )
    if out.is_dir():
        raise UserError(f"--out={out} is a folder; give a file in it")
    if out.exists() and not overwrite:
        raise UserError(f"--out={out} already exists; give a new file, or --overwrite")
    paths.check_writable(out.parent, "--out")


def _write_npz(file: Any, arrays: Arrays) -> None:
    named: Any = arrays  # no name in it is that of a parameter of savez
    np.savez(file, **named)


def _write_csv(file: Any, arrays: Arrays) -> None:
    labels = _label_column(arrays)
    text = io.TextIOWrapper(file, "utf-8", "surrogateescape", newline="")
    table = csv.writer(text)
    columns = [f"feature_{i}" for i in range(arrays["features"].shape[1])]
    table.writerow(["name", *labels, *columns])
    for i, vector in enumerate(arrays["features"]):
        own = [column[i] for column in labels.values()]
        table.writerow([arrays["names"][i], *own, *map(str, vector)])
    text.detach()  # flushes, and leaves the file open


def _write_parquet(file: Any, arrays: Arrays) -> None:
    import pyarrow
    import pyarrow.parquet

    features = arrays["features"]
    labels = {key: list(map(printable, column)) for key, column in _label_column(arrays).items()}
    columns = {
        "name": [printable(name) for name in arrays["names"]],
        **labels,
        "features": pyarrow.FixedSizeListArray.from_arrays(
            pyarrow.array(features.ravel()), features.shape[1]
        ),
    }
    table = pyarrow.table(columns, metadata={"step": str(arrays["step"])})
    pyarrow.parquet.write_table(table, file)


def _label_column(arrays: Arrays) -> dict[str, np.ndarray]:
    if "labels" not in arrays:
        return {}
    return {"label": arrays["class_names"][arrays["labels"]]}


WRITERS: dict[str, Callable[[Any, Arrays], None]] = {
    ".npz": _write_npz,
    ".csv": _write_csv,
    ".parquet": _write_parquet,
}


def main() -> None:
    """Writes the features that the flags request."""
    args, given = flags.FLAGS, cli.given_data()
    if bool(args.images) == bool(given):
        raise UserError("give either --images=FOLDER (or files) or --data.path=DATA, and not both")
    if given and not args.splits:
        raise UserError("--nosplits would have no effect: it is for --images; leave it out")
    out = epath.Path(args.out)
    if hosts.is_first():  # before listing images, which can take long
        check_out(out, args.patches, args.overwrite)
    source = open_data(args.workdir, given) if given else open_images(args.images, args.splits)
    export(
        *(args.workdir, source, out, args.step, args.patches, args.overwrite),
        batch_size=args.batch_size,
    )
    if hosts.is_first():
        print(out)


if __name__ == "__main__":
    cli.define_path("workdir", "The folder of the run.", required=True)
    cli.define_path("images", "A folder of images, or a file; can be repeated.", several=True)
    cli.define_path("out", f"The file to write: {', '.join(WRITERS)}.", required=True)
    flags.DEFINE_integer("step", None, "The step of the checkpoint; the newest by default.")
    flags.DEFINE_bool("patches", False, "Also write the features of patches.")
    flags.DEFINE_bool("splits", True, "Folders called train, val or test are splits, not classes.")
    flags.DEFINE_integer(
        "batch_size",
        None,
        "The number of images at a time; eval.batch_size of the run by default.",
        lower_bound=1,
    )
    flags.DEFINE_bool("overwrite", False, "Replace --out if it exists.")
    cli.define_data(train_split="The split to take the images from.")
    cli.run(main)
