"""Folders of images: which files are read, which folders are splits, and which are classes.

Names are kept byte for byte: those that are not UTF-8 have surrogates in them, as `os.fsdecode`
makes them, and `printable` makes them readable.
"""

import collections
import errno
import functools
import hashlib
import os
import threading
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from sop_jax.data.formats import HEIC_SUFFIXES, SUFFIXES, is_image, suffix_of
from sop_jax.data.shared import SharedArray, SharedNames
from sop_jax.errors import UserError

HELD_OUT = ("val", "valid", "validation")  # three names of the same split
SPLITS = ("train", *HELD_OUT, "test")
SHOWN = 5  # names in a message

_SHARING = threading.Lock()


class FolderSource:
    """Image files below one folder, sorted by path; processes share one copy of the list.

    Attributes:
        notes: what a person should know about the folder: what was left out, and why.
    """

    def __init__(
        self,
        root: str,
        files: Sequence[str],
        labels: np.ndarray | None,
        class_names: list[str] | None,
        notes: Sequence[str] = (),
    ) -> None:
        """Takes files relative to `root` and their labels, int32 [n]."""
        self.root, self.files, self.labels, self.class_names = root, files, labels, class_names
        self.notes = list(notes)

    @functools.cached_property
    def _shared(self) -> tuple[SharedNames, SharedArray | None]:
        labels = None if self.labels is None else SharedArray(self.labels)
        return SharedNames(self.files), labels

    def __getstate__(self) -> dict[str, Any]:
        with _SHARING:  # workers are started by several threads at once
            shared = self._shared
        return dict(root=self.root, class_names=self.class_names, notes=self.notes, _shared=shared)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.files, labels = self._shared
        self.labels = None if labels is None else labels.array

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> bytes:
        return epath.Path(f"{self.root}/{self.files[index]}").read_bytes()

    def name(self, index: int) -> str:
        """The path of the file, as it can be printed."""
        return printable(f"{self.root}/{self.files[index]}")

    @property
    def has_labels(self) -> bool:
        """Whether the folders are classes."""
        return self.labels is not None

    def label(self, index: int) -> int:
        """The class of the folder that a file is in."""
        assert self.labels is not None
        return int(self.labels[index])

    @property
    def digest(self) -> str:
        """Of the names below the root."""
        names = "\0".join(self.files).encode("utf-8", "surrogateescape")
        return hashlib.sha256(names).hexdigest()[:12]


def printable(name: str) -> str:
    r"""A name as it can be printed: `caf\xe9.jpg` for bytes that are not UTF-8."""
    text = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def open_folder(data_config: Any, split: str, train: Any = None) -> FolderSource | None:
    """Opens one split of a tree, as `sources.open_source` does.

    A tree has splits when it has a folder called `train_split`, in any letter case. Without one,
    or with an empty `train_split`, its first-level folders are classes.
    """
    root = str(epath.Path(data_config.path))
    wanted = [name for name in (data_config.train_split, data_config.test_split) if name]
    if not data_config.train_split:
        return folder_source(root) if split == "train" else None
    folders, _, notes = find_splits(root, wanted, "--config.data.train_split")
    if split == "test":
        if data_config.test_split not in folders:
            return None
        if train is None:
            train = open_folder(data_config, "train")
        return folder_source(f"{root}/{folders[data_config.test_split]}", train)
    inside = f"/{folders[data_config.train_split]}" if folders else ""
    source = folder_source(f"{root}{inside}")
    source.notes[:0] = notes
    return source


def folder_source(root: str, like: FolderSource | None = None) -> FolderSource:
    """The images below one folder, whose first-level folders are the classes.

    Args:
        root: the folder, local or gs://.
        like: a source whose class ids to use; without it the tree's own folders are the classes.

    Raises:
        UserError: no image, or a class that `like` does not have.
    """
    root = str(epath.Path(root))
    files, notes = list_images(root)
    names = like.class_names if like else class_folders(files)
    if names is None:
        return FolderSource(root, files, None, None, [*notes, *_why_unlabelled(root, files)])
    folders = [file.split("/", 1)[0] for file in files]
    unknown = sorted(set(folders) - set(names))
    if unknown:
        raise UserError(
            f"{printable(root)} holds '{printable(unknown[0])}', which is no class of "
            f"{printable(like.root if like else root)} ({len(unknown)} such names). The images of "
            "every split must lie in folders named as the train classes are."
        )
    return FolderSource(root, files, _labels(folders, names), names, notes)


def whole_tree(root: str, splits: bool = True) -> FolderSource:
    """All images below a folder. The folders of splits are not classes: those in them are.

    Args:
        root: the folder, local or gs://.
        splits: whether folders called train, val, valid, validation and test, in any letter case,
            are splits; if not, they are classes.

    Raises:
        UserError: no image, or images beside the splits, so that it is not clear what is a class.
    """
    source = folder_source(root)
    first = {file.split("/", 1)[0] for file in source.files if "/" in file}
    known = sorted(name for name in first if name.casefold() in SPLITS)
    if not splits or not known:
        return source
    if strangers := sorted(first - set(known)):
        raise UserError(
            f"{printable(source.root)} has images in {_some(known)}, as splits are called, and in "
            f"{_some(strangers)}, so that it is not clear which folders are classes. Use "
            "--nosplits if all of them are, or give the folder of one split."
        )
    inside = [file.split("/", 1)[1] if "/" in file else file for file in source.files]
    names = class_folders(inside)
    notes = [*source.notes, f"{_some(known)} are splits: labels come from the folders in them"]
    if names is None:
        notes += _why_unlabelled(source.root, inside)
        return FolderSource(source.root, source.files, None, None, notes)
    labels = _labels([file.split("/", 1)[0] for file in inside], names)
    return FolderSource(source.root, source.files, labels, names, notes)


def class_folders(files: list[str]) -> list[str] | None:
    """The classes of a tree: its first-level folders, sorted.

    Args:
        files: relative paths.

    Returns:
        None for an unlabelled tree: some files lie in no folder, or all in the same one.
    """
    names = {file.split("/", 1)[0] if "/" in file else "" for file in files}
    return None if "" in names or len(names) < 2 else sorted(names)


def _labels(folders: list[str], names: list[str]) -> np.ndarray:
    ids = {name: label for label, name in enumerate(names)}
    return np.array([ids[folder] for folder in folders], np.int32)


def _why_unlabelled(root: str, files: list[str]) -> list[str]:
    loose = sum("/" not in file for file in files)
    if loose in (0, len(files)):
        return []
    return [
        f"{printable(root)}: no labels, because {loose} of {_count(len(files), 'image')} are in no "
        "class folder"
    ]


# Splits


class Splits(NamedTuple):
    """The splits of a tree."""

    folders: dict[str, str]  # by the name that was asked for
    unused: list[str]  # other folders that are called as splits are
    notes: list[str]  # what a person should know


def find_splits(root: str, wanted: Sequence[str], setting: str) -> Splits:
    """Finds the folders of splits, in any letter case; `val`, `valid`, `validation` are the same.

    Args:
        root: the tree, local or gs://.
        wanted: names of splits, the one to train on first. One that has a slash in it is a path.
        setting: how a person names the splits; empty, it says that there are none.

    Returns:
        The splits; without folders for a tree that has none.

    Raises:
        UserError: it is not clear what is a split, or there are images in other folders.
    """
    _check_folder(root)
    here = _contents(root)
    known = [name for name in here.folders if name.casefold() in SPLITS]
    found: dict[str, str] = {}
    for name in wanted:
        if folder := _find_split(root, name, here):
            found[name] = folder
    train = wanted[0]
    if train not in found:
        if known or found or train.casefold() != "train":
            there = known or list(found.values())
            what = f"the split {_some(there)}" if there else "folders"
            raise UserError(
                f"{printable(root)} has {what}, but none called {train!r}. Set {setting} to the "
                f"folder to train on, or to nothing ({setting}=) if all folders are classes."
            )
        return Splits({}, [], [])
    if any("/" in name for name in found):
        return Splits(found, [], [])
    used = set(found.values())
    others = [name for name in here.folders if name not in used and name not in known]
    strangers = [name for name in others if _holds_images(f"{root}/{name}", {})]
    if strangers:  # which is well if the splits have links to their folders
        read: dict[str, str] = {}
        for name in sorted(used):
            collections.deque(_walk(f"{root}/{name}", read, {}), maxlen=0)
        strangers = [name for name in strangers if _holds_images(f"{root}/{name}", dict(read))]
    if strangers:
        raise UserError(
            f"{printable(root)} has the split {_some(sorted(used))}, but also images in "
            f"{_some(strangers)}, which would not be used. If all of these folders are classes, "
            f"say that there are no splits with {setting}= ; if not, give a folder that has the "
            "splits only, or links to them."
        )
    unused = [name for name in known if name not in used]
    rest = f"; not used: {_some(unused)}" if unused else ""
    notes = [f"{printable(root)}: splits: {_some(list(found.values()))}{rest}"]
    if loose := sum(map(is_image, here.files)):
        notes.append(f"{printable(root)}: not used: {_count(loose, 'image')} beside the splits")
    return Splits(found, unused, notes)


def _find_split(root: str, name: str, here: "Contents") -> str | None:
    """The folder of one split, if it is there."""
    if "/" in name:
        return name if epath.Path(f"{root}/{name}").is_dir() else None
    same = [folder for folder in here.folders if folder.casefold() == name.casefold()]
    if not same and name.casefold() in HELD_OUT:
        same = [folder for folder in here.folders if folder.casefold() in HELD_OUT]
    if len(same) > 1:
        raise UserError(
            f"{printable(root)} has the folders {_some(same)}, and any of them may be the split "
            f"{name!r}. Rename or remove those that are not."
        )
    if not same and name in here.files:
        raise UserError(
            f"{printable(root)}/{name} is a file, where the folder of the split {name!r} was "
            "expected. Move it elsewhere, or unpack it there if it is an archive."
        )
    return same[0] if same else None


def _holds_images(root: str, seen: dict[str, str]) -> bool:
    """Whether there are images in a folder, apart from those in folders that were `seen`."""
    walk = _walk(root, seen, {})
    return any(is_image(name) for _, here in walk for name in here.files)


# Listing


class Contents(NamedTuple):
    """The names in one folder, by what they are."""

    folders: list[str]
    files: list[str]
    broken: list[str]  # links that lead nowhere, and what is neither a file nor a folder
    hidden: list[str]


class Listing(NamedTuple):
    """The images below a folder as sorted relative paths, and what a person should know."""

    files: list[str]
    notes: list[str]


def list_images(root: str) -> Listing:
    """Lists all image files below `root`; hidden ones are left out, and links are followed.

    Every folder is listed once: where links lead to the same one, the first by name has it.

    Args:
        root: a folder, local or gs://.

    Raises:
        UserError: a folder is missing or cannot be listed, or there is no image.
    """
    _check_folder(root)
    files: list[str] = []
    again: dict[str, str] = {}
    broken: list[str] = []
    others: collections.Counter[str] = collections.Counter()
    first: set[str] = set()
    hidden = 0
    for inside, here in _walk(root, {}, again):
        for name in here.files:
            if is_image(name):
                files.append(f"{inside}{name}")
            else:
                others[suffix_of(name)] += 1
        if not inside:
            first = set(here.folders)
        broken += [f"{inside}{name}" for name in here.broken]
        hidden += len(here.hidden)
    told = _not_images(others)
    if not files:
        raise UserError(
            f"The folder {printable(root)} holds no images{f', but {told}' if told else ''}. "
            "Expected files ending in .jpg, .png or what else Pillow reads, in it or in folders "
            "below it."
        )
    notes = [f"left out: {told}"] if told else []
    if hidden:
        notes.append(f"left out: {hidden} whose name begins with a dot")
    if again:
        pairs = [f"{path} (is {place})" for path, place in again.items()]
        notes.append(f"linked again, and read once: {_some(pairs)}")
    if broken:
        notes.append(
            f"links that lead nowhere, or neither files nor folders: {_some(sorted(broken))}"
        )
    empty = first - {file.split("/", 1)[0] for file in files} - again.keys()
    if empty:
        notes.append(f"without images, hence no classes: {_some(sorted(empty))}")
    return Listing(sorted(files), [f"{printable(root)}: {note}" for note in notes])


def _check_folder(root: str) -> None:
    folder = epath.Path(root)
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.exists() else "does not exist"
        raise UserError(
            f"There is no folder {printable(root)}: it {what}. Give the path of a folder of "
            "images, or of one that holds such a folder for every split."
        )


def _walk(root: str, seen: dict[str, str], again: dict[str, str]) -> Iterator[tuple[str, Contents]]:
    """Every folder once, as its path below `root` with a slash at its end, and its contents.

    Args:
        root: a folder, local or gs://.
        seen: the local folders so far, as they are without links, and their paths; is added to.
        again: gets the folders that were met again through links, and as what they were `seen`.
    """
    remote = "://" in root
    to_come = [""]
    while to_come:
        inside = to_come.pop()
        path = f"{root}/{inside}".rstrip("/")
        if not remote:
            real = os.path.realpath(path)
            if real in seen:
                again[inside.rstrip("/")] = seen[real]
                continue
            seen[real] = path
        here = _contents(path)
        yield inside, here
        to_come += [f"{inside}{name}/" for name in reversed(here.folders)]


def _contents(folder: str) -> Contents:
    """Lists one folder; one that cannot be listed is an error, because its images would be lost."""
    here = Contents([], [], [], [])
    remote = "://" in folder
    try:
        for name, kind in _remote_entries(folder) if remote else _entries(folder):
            # A file system that can be repaired has a lost+found at its root.
            hidden = name.startswith(".") or name == "lost+found"
            (here.hidden if hidden else getattr(here, kind)).append(name)
    except OSError as error:
        place = folder if remote else error.filename or folder
        raise UserError(
            f"Cannot list the folder {printable(place)}: {error.strerror or error}. Its images "
            "would be missing: make it readable, or move it elsewhere, and start again."
        ) from error
    here.folders.sort()
    return here


def _entries(folder: str) -> Iterator[tuple[str, str]]:
    """The names in a local folder, and which field of `Contents` each belongs to."""
    with os.scandir(folder) as entries:
        for entry in entries:
            try:
                if entry.is_dir():
                    yield entry.name, "folders"
                elif entry.is_file() or (entry.is_symlink() and is_image(entry.name)):
                    yield entry.name, "files"  # to read an image through a broken link says why
                else:
                    yield entry.name, "broken"
            except OSError as error:
                if error.errno != errno.ELOOP:
                    raise
                yield entry.name, "broken"  # a link to itself


def _remote_entries(folder: str) -> Iterator[tuple[str, str]]:
    def fail(error: OSError) -> None:
        raise error

    # One level at a time: further down, walk() passes over folders that cannot be listed.
    _, folders, files = next(epath.Path(folder).walk(on_error=fail), (None, [], []))
    yield from ((name.strip("/"), "folders") for name in folders)
    yield from ((name, "files") for name in files if name)  # "" marks an empty folder


# Words


def _some(names: Sequence[str]) -> str:
    """Some names in a sentence."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(map(printable, names[:SHOWN])) + more


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _not_images(endings: collections.Counter[str]) -> str:
    """How many files of which endings are no images."""
    if not endings:
        return ""
    parts = []
    for i, (ending, number) in enumerate(endings.most_common(SHOWN)):
        files = f"{_count(number, 'file')} " if i == 0 else f"{number} "
        parts.append(files + (f"ending in {printable(ending)}" if ending else "without an ending"))
    if len(endings) > SHOWN:
        parts.append(f"{endings.total() - sum(n for _, n in endings.most_common(SHOWN))} others")
    told = f"{', '.join(parts)} {'are' if endings.total() > 1 else 'is'} not images"
    if HEIC_SUFFIXES & set(endings) - SUFFIXES:
        told += " (to read HEIC: pip install pillow-heif)"
    return told
