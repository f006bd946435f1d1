r"""Finds the images that are nearest to one, by the features of a network.

    python -m sop_jax.nearest --workdir=DIR --images=FOLDER --of=IMAGE [--k=5] [--out=grid.png]

Prints the names of the nearest images of FOLDER and their similarities, the cosines of their
features, largest first. With --out it also draws them, each IMAGE with its nearest images in one
row. --of can be repeated. An IMAGE that is itself in FOLDER is not one of its own nearest images.

For example, after the quick start, among the pictures of the documents:

    python -m sop_jax.nearest --workdir=runs/digits --images=docs --of=docs/report.png
"""

import os
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import flags
from etils import epath
from jaxtyping import Float
from PIL import Image

from sop_jax import cli, paths
from sop_jax.data.decode import load_image
from sop_jax.data.folders import printable
from sop_jax.data.given import Images, OneImage, is_one
from sop_jax.data.thumbnails import thumbnail
from sop_jax.errors import UserError
from sop_jax.evaluation.contact_sheet import TILE, Tile, contact_sheet
from sop_jax.network import Network, load
from sop_jax.parallel import hosts
from sop_jax.pictures import neighbours as by_cosine
from sop_jax.rules import COUNT


class Neighbour(NamedTuple):
    """An image that is near to another one.

    Attributes:
        name: its name: its path relative to the folder, its path as it was given, or its number,
            such as `[3]`.
        similarity: the cosine of the features of both images, from -1 to 1.
        row: its row in what `Network.features` returns for the same images.
    """

    name: str
    similarity: float
    row: int


def neighbours(
    network: Network | epath.PathLike, images: Images, of: OneImage, k: int = 5
) -> list[Neighbour]:
    """Returns the images whose features are nearest to those of one image.

    Args:
        network: the network, or the path of one, which `load` loads.
        images: the images to search, such as a folder; see `Network`.
        of: one image, as a path, a Pillow image or an array. If it is the path of one of the files
            that are searched, that file is not its own neighbour.
        k: the number of neighbours.

    Returns:
        The k nearest images, the nearest first, or all if there are fewer. Of equally near ones,
        the first comes first.

    Raises:
        UserError: there is no such network, images cannot be read, or there is nothing to search.
    """
    if not COUNT.fits(k):
        raise UserError(f"k is {k!r}; expected the number of neighbours, {COUNT.expected}")
    if is_one(images):
        raise UserError(
            "images is one image; give those to search, as a folder or a list, and the image whose "
            "neighbours are found as of"
        )
    network = network if isinstance(network, Network) else load(network)
    query = network.features(of)
    if len(query) != 1:
        raise UserError(f"of has {len(query)} images; give one, and call this for each of several")
    features, names = network.features(images, names=True)
    own = _rows_of_file(images, names, of)
    if len(own) == len(names):
        raise UserError(
            "images has no image other than of, which is not its own neighbour; give at least one "
            "other"
        )
    return _nearest(features, names, query[0], k, own)


def _nearest(
    features: Float[np.ndarray, "n D"],
    names: Sequence[str],
    query: Float[np.ndarray, " D"],
    k: int,
    own: Sequence[int],
) -> list[Neighbour]:
    found = by_cosine.neighbours(query[None], features, k, [own])
    near = zip(found.places[0].tolist(), found.cosines[0].tolist(), strict=True)
    return [Neighbour(names[row], cosine, row) for row, cosine in near]


def _rows_of_file(images: Any, names: Sequence[str], of: Any) -> list[int]:
    """Returns the rows of images that are the same file as one image, if that is a file."""
    if not isinstance(of, str | os.PathLike):
        return []
    own = os.path.realpath(paths.expand(os.fspath(of)))
    if isinstance(images, str | os.PathLike):  # a folder, in which a name may start with ~
        folder = paths.expand(os.fspath(images))
        files = [os.path.join(folder, name) for name in names]
    else:
        files = [os.path.expanduser(name) for name in names]
    return [row for row, file in enumerate(files) if os.path.realpath(file) == own]


# The command


def draw(
    network: Network, images: str, rows: Sequence[tuple[str, Sequence[Neighbour]]]
) -> Image.Image:
    """Returns a picture with one row per query: the image, then its neighbours.

    Args:
        network: the network, which says how images are decoded.
        images: the folder that was searched.
        rows: the path of each query, and its neighbours.
    """

    def tile(path: str, name: str, note: str) -> Tile:
        source, how = network.open(path)
        try:
            picture = thumbnail(load_image(source, 0, how), TILE)
        except ValueError:  # it could be read before
            picture = None
        return Tile(picture, printable(name), note)

    return contact_sheet(
        [
            [tile(of, of, "query")]
            + [tile(os.path.join(images, x.name), x.name, f"{x.similarity:.3f}") for x in near]
            for of, near in rows
        ]
    )


def check_out(out: epath.Path, overwrite: bool) -> None:
    """Checks that the picture can be written.

    Raises:
        UserError: it is no .png file, already exists, or cannot be written.
    """
    if out.suffix != ".png":
        raise UserError(f"--out={out} must end in .png, the format of the picture; rename it")
    if out.is_dir():
        raise UserError(f"--out={out} is a folder; give a file in it")
    if out.exists() and not overwrite:
        raise UserError(f"--out={out} already exists; give a new file, or --overwrite")
    paths.check_writable(out.parent, "--out")


def main() -> None:
    """Prints and draws the nearest images that the flags ask for."""
    args = flags.FLAGS
    if bool(args.workdir) == bool(args.weights):
        raise UserError("give either --workdir=DIR or --weights=FILE, and not both")
    if not epath.Path(args.images).is_dir():
        raise UserError(f"--images={args.images} is not a folder; give the folder to search")
    for of in args.of:
        if not epath.Path(of).is_file():
            raise UserError(f"--of={of} is not a file; give an image")
    out = epath.Path(args.out) if args.out else None
    if out and hosts.is_first():
        check_out(out, args.overwrite)
    network = load(args.workdir or args.weights, step=args.step, batch_size=args.batch_size)
    queries = network.features(args.of)
    features, names = network.features(args.images, names=True)
    rows = [
        (of, _nearest(features, names, query, args.k, _rows_of_file(args.images, names, of)))
        for of, query in zip(args.of, queries, strict=True)
    ]
    if not hosts.is_first():
        return
    for of, near in rows:
        print(f"nearest to {printable(of)}:")
        for found in near:
            print(f"{found.similarity:.4f}  {printable(found.name)}")
        if len(near) < args.k:
            print(f"there are only {len(near)} other images to search", file=sys.stderr)
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        with out.open("wb") as file:
            draw(network, args.images, rows).save(file, "PNG")
        print(out)


if __name__ == "__main__":
    cli.define_path("workdir", "The folder of the run, or of a conversion.")
    cli.define_path("weights", "A file of weights of another project instead.")
    cli.define_path("images", "The folder of images to search.", required=True)
    cli.define_path("of", "The image whose neighbours are found; can be repeated.", several=True)
    flags.mark_flag_as_required("of")
    flags.DEFINE_integer("k", 5, "The number of nearest images.", lower_bound=1)
    cli.define_path("out", "The picture to draw, a .png file.")
    flags.DEFINE_integer("step", None, "The step of the checkpoint; the newest by default.")
    flags.DEFINE_integer(
        "batch_size",
        None,
        "The number of images at a time; eval.batch_size of the run by default.",
        lower_bound=1,
    )
    flags.DEFINE_bool("overwrite", False, "Replace --out if it exists.")
    cli.run(main)
