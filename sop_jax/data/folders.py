"""Folders of images: which files are read, which folders are splits, and which are classes.

Names are kept byte for byte: names that are not UTF-8 contain surrogates, as `os.fsdecode`
produces them, and `printable` makes them readable.
"""

import collections
import contextlib
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
from sop_jax.data.labels import Labelled
from sop_jax.data.shared import SharedArray, SharedNames
from sop_jax.errors import UserError

HELD_OUT = ("val", "valid", "validation")  # three names for the same split
SPLITS = ("train", *HELD_OUT, "test")
SYSTEM_FOLDERS = ("lost+found",)  # of file systems such as ext4, at their root
SHOWN = 5  # the most names that a message lists
STAMPED = 10_000  # files whose sizes and times tell whether a tree was changed in place

_SHARING = threading.Lock()


class Files(Labelled):
    """The part of a source of files that is about files.

    Attributes:
        root: their folder.
        files: their names, relative to it.
    """

    root: str
    files: Sequence[str]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> bytes:
        return epath.Path(f"{self.root}/{self.files[index]}").read_bytes()

    def name(self, index: int) -> str:
        """Returns the path of the file in printable form."""
        return printable(f"{self.root}/{self.files[index]}")

    @property
    def digest(self) -> str:
        """A hash of the file names in order, relative to the root."""
        names = "\0".join(self.files).encode("utf-8", "surrogateescape")
        return hashlib.sha256(names).hexdigest()[:12]

    @property
    def stamp(self) -> str:
        """A hash of the sizes and times of the files; see `stamp_of`."""
        return stamp_of(self.root, self.files)


class FolderSource(Files):
    """Image files below one folder, sorted by path; processes share one copy of the list.

    Attributes:
        notes: sentences for the user on what was left out of the folder, and why.
    """

    def __init__(
        self,
        root: str,
        files: Sequence[str],
        labels: np.ndarray | None,
        class_names: list[str] | None,
        notes: Sequence[str] = (),
    ) -> None:
        """Creates a source from files relative to `root` and their labels, int32 [n] or None."""
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


def stamp_of(root: str, files: Sequence[str]) -> str:
    """Returns a hash that changes if files are changed in place, under the same names.

    It is made of the sizes and times of at most STAMPED of the files, and empty on remote storage.
    """
    if "://" in root:
        return ""
    chosen = np.unique(np.linspace(0, len(files) - 1, min(len(files), STAMPED)).astype(int))
    stamp = hashlib.sha256()
    for index in chosen:
        with contextlib.suppress(OSError):  # reported when it is read
            found = os.stat(f"{root}/{files[index]}")
            stamp.update(f"{index} {found.st_size} {found.st_mtime_ns}\0".encode())
    return stamp.hexdigest()[:12]


def printable(name: str) -> str:
    r"""Returns a name in printable form: `caf\xe9.jpg` for bytes that are not UTF-8."""
    text = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def open_folder(data_config: Any, split: str, train: Any = None) -> FolderSource | None:
    """Opens one split of a tree, as `sources.open_source` does.

    A tree has splits if it has a folder called `train_split`, in any letter case. Without one, or
    with an empty `train_split`, its first-level folders are classes.
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
    """Returns the images below one folder, whose first-level folders are the classes.

    Args:
        root: the folder, local or gs://.
        like: a source whose classes to use; by default the tree's own folders are the classes.

    Raises:
        UserError: there is no image, or there is a class that `like` does not have.
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
            f"{printable(root)} contains {_some(unknown)}, but the classes of "
            f"{printable(like.root if like else root)} are {_some(names)}. The images of every "
            "split must be in folders that have the names of the training classes. Rename or move "
            "what differs."
        )
    return FolderSource(root, files, _labels(folders, names), names, notes)


def whole_tree(root: str, splits: bool = True) -> FolderSource:
    """Returns all images below a folder, of all splits; classes are the folders in the splits.

    Args:
        root: the folder, local or gs://.
        splits: whether folders called train, val, valid, validation and test, in any letter case,
            are splits; if not, they are classes.

    Raises:
        UserError: there is no image, or there are images outside the splits, so that it is not
            clear which folders are classes.
    """
    source = folder_source(root)
    first = {file.split("/", 1)[0] for file in source.files if "/" in file}
    known = sorted(name for name in first if name.casefold() in SPLITS)
    if not splits or not known:
        return source
    if outside := sorted(first - set(known)):
        raise UserError(
            f"{printable(source.root)} has images in {_some(known)}, which are names of splits, "
            f"and in {_some(outside)}, so it is not clear which folders are classes. Use "
            "--nosplits if all of them are, or give the folder of one split."
        )
    inside = [file.split("/", 1)[1] if "/" in file else file for file in source.files]
    names = class_folders(inside)
    notes = [*source.notes, f"labels come from the folders inside the splits: {_some(known)}"]
    if names is None:
        notes += _why_unlabelled(source.root, inside)
        return FolderSource(source.root, source.files, None, None, notes)
    labels = _labels([file.split("/", 1)[0] for file in inside], names)
    return FolderSource(source.root, source.files, labels, names, notes)


def class_folders(files: list[str]) -> list[str] | None:
    """Returns the classes of a tree: its first-level folders, sorted.

    Args:
        files: relative paths.

    Returns:
        The names of the folders, or None if the tree has no labels, because some files are in no
        folder or all are in the same one.
    """
    names = {file.split("/", 1)[0] if "/" in file else "" for file in files}
    return None if "" in names or len(names) < 2 else sorted(names)


def _labels(folders: list[str], names: list[str]) -> np.ndarray:
    ids = {name: label for label, name in enumerate(names)}
    return np.array([ids[folder] for folder in folders], np.int32)


def _why_unlabelled(root: str, files: list[str]) -> list[str]:
    loose = sum("/" not in file for file in files)
    only, *others = {file.split("/", 1)[0] for file in files}
    if not loose and not others and only.casefold() not in SPLITS:
        return [
            f"{printable(root)}: no labels, because all images are in one folder, {printable(only)}"
        ]
    if loose in (0, len(files)):
        return []
    return [
        f"{printable(root)}: no labels, because {loose} of {len(files)} images "
        f"{'is' if loose == 1 else 'are'} not in a class folder"
    ]


# Splits


class Splits(NamedTuple):
    """The splits of a tree."""

    folders: dict[str, str]  # by the name that was asked for
    unused: list[str]  # other folders that have the name of a split
    notes: list[str]  # sentences for the user


def find_splits(root: str, wanted: Sequence[str], setting: str) -> Splits:
    """Finds the folders of splits, in any letter case; `val`, `valid`, `validation` are the same.

    Args:
        root: the tree, local or gs://.
        wanted: names of splits, the one to train on first. A name with a slash is a path.
        setting: the setting that names the splits, for messages; users set it to nothing if there
            are no splits.

    Returns:
        The splits; without folders if the tree has none.

    Raises:
        UserError: it is not clear which folders are splits, or there are images in other folders.
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
            what = _some_splits(there) if there else "folders"
            raise UserError(
                f"{printable(root)} has {what}, but none called {train!r}. Set {setting} to the "
                f"folder to train on, or to nothing ({setting}=) if all folders are classes."
            )
        return Splits({}, [], [])
    if any("/" in name for name in found):
        return Splits(found, [], [])
    used = set(found.values())
    others = [name for name in here.folders if name not in used and name not in known]
    outside = [name for name in others if _holds_images(f"{root}/{name}", {})]
    if outside:  # fine if the splits have links to these folders
        read: dict[str, str] = {}
        for name in sorted(used):
            collections.deque(_walk(f"{root}/{name}", read, {}), maxlen=0)
        outside = [name for name in outside if _holds_images(f"{root}/{name}", dict(read))]
    if outside:
        raise UserError(
            f"{printable(root)} has {_some_splits(sorted(used))}, but also images in "
            f"{_some(outside)}, which would not be used. If all of these folders are classes, "
            f"set {setting}= (to nothing); if not, give a folder that contains only the splits, or "
            "links to them."
        )
    unused = [name for name in known if name not in used]
    rest = f"; not used: {_some(unused)}" if unused else ""
    notes = [f"{printable(root)}: splits: {_some(list(found.values()))}{rest}"]
    if loose := sum(map(is_image, here.files)):
        notes.append(f"{printable(root)}: not used: {_count(loose, 'image')} outside the splits")
    return Splits(found, unused, notes)


def _find_split(root: str, name: str, here: "Contents") -> str | None:
    """Returns the folder of one split, or None if there is none."""
    if "/" in name:
        return name if epath.Path(f"{root}/{name}").is_dir() else None
    same = [folder for folder in here.folders if folder.casefold() == name.casefold()]
    if not same and name.casefold() in HELD_OUT:
        same = [folder for folder in here.folders if folder.casefold() in HELD_OUT]
    if len(same) > 1:
        raise UserError(
            f"{printable(root)} has the folders {_some(same)}, and any of them could be the split "
            f"{name!r}. Rename or remove those that are not."
        )
    if not same and name in here.files:
        raise UserError(
            f"{printable(root)}/{name} is a file, but a folder with the split {name!r} was "
            "expected. Move the file elsewhere, or unpack it there if it is an archive."
        )
    return same[0] if same else None


def _holds_images(root: str, seen: dict[str, str]) -> bool:
    """Whether a folder contains images, not counting those in folders that were `seen`."""
    walk = _walk(root, seen, {})
    return any(is_image(name) for _, here in walk for name in here.files)


# Listing


class Contents(NamedTuple):
    """The names in one folder, by kind."""

    folders: list[str]
    files: list[str]
    broken: list[str]  # broken links and special files
    hidden: list[str]


class Listing(NamedTuple):
    """The images below a folder as sorted relative paths, and notes for the user."""

    files: list[str]
    notes: list[str]


def list_images(root: str) -> Listing:
    """Lists all image files below `root`, follows links, and leaves out hidden files.

    Every folder is listed only once: if several links lead to it, its images are listed under the
    first by name.

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
    not_images = _not_images(others)
    if not files:
        raise UserError(
            f"The folder {printable(root)} contains no images"
            f"{f', but {not_images}' if not_images else ''}. Expected .jpg, .png or other files "
            "that Pillow can read, in it or in folders below it. Give the path of such a folder."
        )
    notes = [f"ignored {not_images}"] if not_images else []
    if hidden:
        kinds = "file or folder" if hidden == 1 else "files or folders"
        notes.append(f"ignored {hidden} hidden {kinds}")
    if again:
        pairs = [f"{path} (same as {first_path})" for path, first_path in again.items()]
        notes.append(f"linked more than once, but read once: {_some(pairs)}")
    if broken:
        notes.append(f"ignored broken links or special files: {_some(sorted(broken))}")
    empty = first - {file.split("/", 1)[0] for file in files} - again.keys()
    if empty:
        notes.append(f"not classes, because they contain no images: {_some(sorted(empty))}")
    return Listing(sorted(files), [f"{printable(root)}: {note}" for note in notes])


def _check_folder(root: str) -> None:
    folder = epath.Path(root)
    if not folder.is_dir():
        name, missing = printable(root), not folder.exists()
        wrong = f"There is no folder {name}" if missing else f"{name} is a file, not a folder"
        raise UserError(
            f"{wrong}. Give the path of a folder of images, or of a folder that contains such a "
            "folder for each split."
        )


def _walk(root: str, seen: dict[str, str], again: dict[str, str]) -> Iterator[tuple[str, Contents]]:
    """Yields every folder once: its path below `root` with a trailing slash, and its contents.

    Args:
        root: a folder, local or gs://.
        seen: maps the real paths of the local folders seen so far to the paths by which they were
            reached; updated.
        again: maps folders that were reached again through links to their paths in `seen`;
            updated.
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
    """Lists one folder.

    Raises:
        UserError: it cannot be listed, so that its images would be missing.
    """
    here = Contents([], [], [], [])
    remote = "://" in folder
    try:
        for name, kind in _remote_entries(folder) if remote else _entries(folder):
            if name in SYSTEM_FOLDERS:
                continue
            hidden = name.startswith(".")
            (here.hidden if hidden else getattr(here, kind)).append(name)
    except OSError as error:
        place = folder if remote else error.filename or folder
        raise UserError(
            f"Cannot list the folder {printable(place)}: {error.strerror or error}. Its images "
            "would be missing. Make it readable, or move it elsewhere, and start again."
        ) from error
    here.folders.sort()
    return here


def _entries(folder: str) -> Iterator[tuple[str, str]]:
    """Yields the names in a local folder, each with the field of `Contents` that it belongs to."""
    with os.scandir(folder) as entries:
        for entry in entries:
            try:
                if entry.is_dir():
                    yield entry.name, "folders"
                elif entry.is_file() or (entry.is_symlink() and is_image(entry.name)):
                    yield entry.name, "files"  # reading an image through a broken link says why
                else:
                    yield entry.name, "broken"
            except OSError as error:
                if error.errno != errno.ELOOP:
                    raise
                yield entry.name, "broken"  # a link to itself


def _remote_entries(folder: str) -> Iterator[tuple[str, str]]:
    def fail(error: OSError) -> None:
        raise error

    # One level at a time, because deeper down walk() skips folders that cannot be listed.
    _, folders, files = next(epath.Path(folder).walk(on_error=fail), (None, [], []))
    yield from ((name.strip("/"), "folders") for name in folders)
    yield from ((name, "files") for name in files if name)  # "" marks an empty folder


# Messages


def _some(names: Sequence[str]) -> str:
    """Joins the first few names and counts the others."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(map(printable, names[:SHOWN])) + more


def _some_splits(names: Sequence[str]) -> str:
    return f"the {'split' if len(names) == 1 else 'splits'} {_some(names)}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _not_images(suffixes: collections.Counter[str]) -> str:
    """Describes the files that are not images by their suffixes; empty if there are none."""
    if not suffixes:
        return ""
    shown = suffixes.most_common(SHOWN)
    parts = [f"{number} {printable(suffix) or 'without an extension'}" for suffix, number in shown]
    if others := suffixes.total() - sum(number for _, number in shown):
        parts.append(f"{others} others")
    what = "file that is not an image" if suffixes.total() == 1 else "files that are not images"
    text = f"{suffixes.total()} {what} ({', '.join(parts)})"
    if HEIC_SUFFIXES & set(suffixes) - SUFFIXES:
        text += "; to read HEIC: pip install pillow-heif"
    return text
