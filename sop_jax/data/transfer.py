"""The data sets to which the papers transfer: where they come from, their splits and metrics.

Splits and metrics are those of SimCLR (its appendix B.8) and, for iNaturalist, of DINO and iBOT.
The images to train on are those with which a final model is trained after its settings were chosen,
validation included.
"""

import json
from typing import Any, Literal, NamedTuple

import numpy as np
from etils import epath

from sop_jax.data.listed import ListedFiles
from sop_jax.errors import UserError

Metric = Literal["top1", "mean_per_class"]


class TransferSet(NamedTuple):
    """A data set.

    Attributes:
        title: its name for people.
        metric: the accuracy that is reported: over images, or the mean of that of each class.
        tfds: its name in TFDS; "" where TFDS does not have it.
        train: the split to train on, in TFDS.
        test: the split to classify, in TFDS.
        year: of iNaturalist, which can also be read in its own layout; 0 otherwise.
        home: where to download it.
    """

    title: str
    metric: Metric
    tfds: str
    train: str
    test: str
    home: str
    year: int = 0


_INAT = "https://github.com/visipedia/inat_comp/tree/master/"
SETS = {
    "cifar10": TransferSet(
        "CIFAR-10",
        "top1",
        "cifar10",
        "train",
        "test",
        "https://www.cs.toronto.edu/~kriz/cifar.html",
    ),
    "cifar100": TransferSet(
        "CIFAR-100",
        "top1",
        "cifar100",
        "train",
        "test",
        "https://www.cs.toronto.edu/~kriz/cifar.html",
    ),
    "flowers": TransferSet(
        "Oxford Flowers-102",
        "mean_per_class",
        "oxford_flowers102",
        "train+validation",
        "test",
        "https://www.robots.ox.ac.uk/~vgg/data/flowers/102/",
    ),
    "cars": TransferSet(
        "Stanford Cars",
        "top1",
        "cars196",
        "train",
        "test",
        "https://ai.stanford.edu/~jkrause/cars/car_dataset.html",
    ),
    "pets": TransferSet(
        "Oxford-IIIT Pets",
        "mean_per_class",
        "oxford_iiit_pet",
        "train",
        "test",
        "https://www.robots.ox.ac.uk/~vgg/data/pets/",
    ),
    "caltech101": TransferSet(
        "Caltech-101",
        "mean_per_class",
        "caltech101",
        "train",
        "test",
        "https://data.caltech.edu/records/mzrjq-6wc02",
    ),
    "dtd": TransferSet(
        "Describable Textures",
        "top1",
        "dtd",
        "train+validation",
        "test",
        "https://www.robots.ox.ac.uk/~vgg/data/dtd/",
    ),
    "food101": TransferSet(
        "Food-101",
        "top1",
        "food101",
        "train",
        "validation",
        "https://data.vision.ee.ethz.ch/cvl/datasets_extra/food-101/",
    ),
    "sun397": TransferSet(
        "SUN397",
        "top1",
        "sun397/standard-part1-120k",
        "train",
        "test",
        "https://vision.princeton.edu/projects/2010/SUN/",
    ),
    "inat18": TransferSet(
        "iNaturalist 2018", "top1", "i_naturalist2018", "train", "validation", f"{_INAT}2018", 2018
    ),
    "inat19": TransferSet("iNaturalist 2019", "top1", "", "", "", f"{_INAT}2019", 2019),
}


class INaturalist(NamedTuple):
    """The images of an iNaturalist competition."""

    train: ListedFiles
    test: ListedFiles


def expected(name: str) -> str:
    """Returns what a data set must look like and where to get it, for messages."""
    own = SETS[name]
    layouts = []
    if own.tfds:
        layouts.append(f"the data_dir of TFDS with {own.tfds}, prepared as array_record")
    if own.year:
        layouts.append(
            f"a folder with train{own.year}.json, val{own.year}.json and the images that they list"
        )
    layouts.append("a folder with train/CLASS/*.jpg and val/CLASS/*.jpg")
    return f"{own.title} as {', or '.join(layouts)} ({own.home})"


def flags(name: str, path: str) -> dict[str, str]:
    """Returns the flags, without `--data.`, that name a data set at a path, see `named.name_data`.

    Args:
        name: one of SETS.
        path: the data_dir of TFDS, or the data set in another layout.

    Raises:
        UserError: there is nothing at the path.
    """
    own, place = SETS[name], epath.Path(path)
    if not place.exists():
        raise UserError(f"--data.path={path} does not exist. Expected {expected(name)}")
    dataset = own.tfds.split("/")[0]
    if own.tfds and (place / dataset).is_dir():
        given = {"source": "tfds", "path": path, "name": own.tfds}
        return given | {"train_split": own.train, "test_split": own.test}
    if own.tfds and (place / "dataset_info.json").exists():
        return {"path": path, "train_split": own.train, "test_split": own.test}
    return {"path": path}


def is_inaturalist(name: str, path: str) -> bool:
    """Whether a path has a competition of iNaturalist in its own layout."""
    year = SETS[name].year
    return bool(year) and (epath.Path(path) / f"train{year}.json").exists()


def open_inaturalist(root: epath.PathLike, year: int) -> INaturalist:
    """Opens a competition of iNaturalist in its own layout.

    Classes are numbered in the order of their category numbers.

    Args:
        root: the folder with train<year>.json, val<year>.json and the images.
        year: 2018 or 2019.

    Raises:
        UserError: a list is missing, damaged or empty.
    """
    lists = [_read(epath.Path(root) / f"{split}{year}.json") for split in ("train", "val")]
    known = sorted({category for _, categories in lists for category in categories})
    number = {category: label for label, category in enumerate(known)}
    parts = [
        ListedFiles(
            root,
            files,
            np.array([number[category] for category in categories], np.int32),
            [str(category) for category in known],
        )
        for files, categories in lists
    ]
    return INaturalist(*parts)


def _read(path: epath.Path) -> tuple[list[str], list[int]]:
    """Returns the files of a list, and their categories."""
    try:
        content: Any = json.loads(path.read_text())
        names = {int(image["id"]): str(image["file_name"]) for image in content["images"]}
        category = {int(a["image_id"]): int(a["category_id"]) for a in content["annotations"]}
        files = [names[number] for number in names]
        categories = [category[number] for number in names]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} cannot be read ({type(error).__name__}: {error}). Expected the list of "
            "images and annotations of the competition. Download it again"
        ) from error
    if not files:
        raise UserError(f"{path} lists no images. Expected those of the competition")
    return files, categories
