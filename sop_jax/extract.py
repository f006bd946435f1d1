"""Writes the features of a folder of images.

    python -m sop_jax.extract --workdir=DIR --images=FOLDER --out=F.npz [--step=N] [--patches]

F.npz holds `features` float32 [n, D], the teacher's [CLS] after the final norm, `names` [n], paths
below FOLDER in sorted order, and `step`; `labels` int32 [n] and `class_names` where the folders of
FOLDER name classes; with --patches `patch_features` float16 [n, L, D], row by row. Images that
cannot be read have no row and are listed on stderr.

Folders called train, val, valid, validation or test are splits: names keep them, and labels come
from the folders in them. With --nosplits they are classes. Names that are not UTF-8 have their
bytes as surrogates: os.fsencode(name) gives them back.
"""

import sys

import jax
import numpy as np
import tqdm
from absl import flags
from etils import epath

from sop_jax import hosts
from sop_jax.compilation import keep_compiled
from sop_jax.corrupt import tell
from sop_jax.data.decode import decoding
from sop_jax.data.folders import whole_tree
from sop_jax.errors import UserError
from sop_jax.features import make_extractor
from sop_jax.mesh import make_mesh
from sop_jax.pretrained import load


def export(
    workdir: epath.PathLike,
    images: str,
    out: epath.PathLike,
    step: int | None = None,
    patches: bool = False,
    splits: bool = True,
    batch_size: int | None = None,
) -> None:
    """Writes the features of all images below a folder.

    Args:
        workdir: of the run.
        images: the folder, local or remote (`gs://`).
        out: the .npz to write; appears when it is complete.
        step: of which checkpoint; the newest by default.
        patches: also write the tokens of patches.
        splits: whether folders that are called as splits are no classes.
        batch_size: images at a time, for memory; `eval.batch_size` of the run by default.

    Raises:
        UserError: no run, no checkpoint, no readable image, or `out` cannot be written.
    """
    if not epath.Path(images).is_dir():
        raise UserError(f"there is no folder {images}; give a folder of images with --images")
    source = whole_tree(images, splits)
    hosts.check_agreement({"images": len(source), "their names": source.digest})
    chief = jax.process_index() == 0  # writes and speaks for all processes
    if chief:
        for note in source.notes:
            print(note, file=sys.stderr)
    draft = start_draft(epath.Path(out)) if chief else None
    try:
        config, model, teacher, step = load(workdir, step)
        config.eval.batch_size = batch_size or config.eval.batch_size
        mesh = make_mesh()
        extract = make_extractor(model, config, mesh, patches)
        with tqdm.tqdm(
            total=len(source), unit="image", dynamic_ncols=True, disable=not chief
        ) as bar:
            features = extract(teacher, source, bar.update)
        if draft is None:
            return
        tell(source, features.corrupt, decoding(config.data, source))
        if not len(features.index):
            raise UserError(
                f"none of the {len(source)} images below {images} can be read; the list above "
                "says why"
            )
        arrays = {
            "features": features.vectors,
            "names": np.array(source.files)[features.index],
            "step": np.array(step),
        }
        if source.class_names is not None:
            arrays["labels"] = features.labels
            arrays["class_names"] = np.array(source.class_names)
        if features.patches is not None:
            arrays["patch_features"] = features.patches
        with draft.open("wb") as file:
            np.savez(file, **arrays)
        draft.replace(out)
    finally:
        if draft is not None:
            draft.unlink(missing_ok=True)


def start_draft(out: epath.Path) -> epath.Path:
    """An empty file beside `out`: what cannot be written fails before the long work, not after."""
    draft = out.parent / f"{out.name}.tmp"
    try:
        if out.is_dir():
            raise IsADirectoryError("it is a folder")
        out.parent.mkdir(parents=True, exist_ok=True)
        draft.write_bytes(b"")
    except OSError as error:
        raise UserError(f"cannot write {out}: {error}; choose another --out") from error
    return draft


def main(argv: list[str]) -> None:
    """Writes what the flags name."""
    del argv
    keep_compiled()
    args = flags.FLAGS
    export(
        *(args.workdir, args.images, args.out, args.step, args.patches, args.splits),
        batch_size=args.batch_size,
    )
    if jax.process_index() == 0:
        print(args.out)


if __name__ == "__main__":
    from sop_jax import cli

    cli.define_path("workdir", "The folder of the run.", required=True)
    cli.define_path("images", "The folder of images.", required=True)
    cli.define_path("out", "The .npz to write.", required=True)
    flags.DEFINE_integer("step", None, "The checkpoint to use; the newest by default.")
    flags.DEFINE_bool("patches", False, "Write the features of patches too.")
    flags.DEFINE_bool("splits", True, "Folders called train, val or test are splits, not classes.")
    flags.DEFINE_integer(
        "batch_size", None, "Images at a time; by default as in the run.", lower_bound=1
    )
    cli.run(main)
