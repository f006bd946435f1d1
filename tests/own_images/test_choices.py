"""Settings for a folder: looked at once, kept by a run that has begun, and checked if given."""

import os
import pathlib

import numpy as np
import pytest
from etils import epath
from PIL import Image
from surveys import LAPTOP

from sop_jax import config as config_lib
from sop_jax.errors import UserError
from sop_jax.own_images import choices, machine
from sop_jax.parallel import hosts
from sop_jax.settings import flatten


@pytest.fixture(autouse=True)
def laptop(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that need not be measured."""
    monkeypatch.setattr(machine, "measure", lambda: LAPTOP)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    root = tmp_path_factory.mktemp("own") / "my photos"
    for number in range(40):
        folder = root / ("test" if number % 5 == 0 else "train") / ("cat", "dog")[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(256, size=(50, 60, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return root


def test_says_what_is_there_what_is_chosen_and_why(photos: pathlib.Path) -> None:
    lines: list[str] = []
    config, seen = choices.chosen(str(photos), tell=lines.append)
    assert seen is not None and (seen.survey.images, seen.survey.test) == (32, 8)
    assert (config.data.source, config.data.path) == ("folder", str(photos))
    assert config.data.test_split == "test"
    text = "\n".join(lines)
    assert "32 images to train on, 8 test images" in text
    assert "2 folders of 16 images: cat, dog" in text
    assert "splits: train, test" in text
    assert "1 cpu device with 8.0 GiB free, 2 cores" in text
    assert "  batch_size=16\n      enough steps per epoch for 32 images" in text
    assert "near-duplicates" not in text
    lines.clear()
    choices.say_cost(config, seen, lines.append)
    time, memory = lines
    assert time.startswith("Expected time: about ")
    assert memory.startswith("Expected memory: about ")


def test_a_full_check_looks_for_near_duplicates(
    photos: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    for number, file in enumerate(sorted((photos / "train").rglob("*.png"))):
        (tmp_path / f"{number}.png").write_bytes(file.read_bytes())
    Image.open(tmp_path / "3.png").resize((40, 30)).save(tmp_path / "small.png")
    lines: list[str] = []
    choices.chosen(str(tmp_path), full=True, tell=lines.append)
    found = next(i for i, line in enumerate(lines) if "near-duplicates: 2 images" in line)
    assert "/3.png" in lines[found + 1] and "/small.png" in lines[found + 1]


def test_a_run_that_has_begun_keeps_its_settings(
    photos: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    began = choices.choose(str(photos), tmp_path, tell=lambda line: None)
    config_lib.save(began, epath.Path(tmp_path))
    monkeypatch.setattr(machine, "measure", lambda: 1 / 0)
    lines: list[str] = []
    monkeypatch.chdir(photos.parent)
    given = {"data.threads": 3}
    resumed, seen = choices.chosen(photos.name, tmp_path, given, tell=lines.append)
    assert seen is None
    assert "nothing is chosen again" in lines[0]
    assert resumed.data.threads == 3 and resumed.data.path == str(photos)
    resumed.data.threads = began.data.threads
    assert flatten(resumed) == flatten(began)


def test_other_processes_take_the_choices_of_the_first(
    photos: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[str] = []

    def gather(text: str, timeout: int) -> list[str]:
        sent.append(text)
        return [sent[0]]

    monkeypatch.setattr(hosts, "several", lambda: True)
    monkeypatch.setattr(hosts, "gather", gather)
    first, _ = choices.chosen(str(photos), given={"batch_size": 24}, tell=lambda line: None)
    monkeypatch.setattr(hosts, "is_first", lambda: False)
    monkeypatch.setattr(machine, "measure", lambda: 1 / 0)
    other, seen = choices.chosen(str(photos), given={"batch_size": 24})
    assert seen is None and sent[1] == ""
    assert flatten(other) == flatten(first)
    assert other.batch_size == 24


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"data.path": "/elsewhere"}, "data.path is given, but so is the folder"),
        ({"data.source": "tfds"}, "data.source is given"),
        ({"batch_sise": 3}, "unknown setting batch_sise; did you mean batch_size"),
        ({"batch_size": "many"}, "batch_size is 'many', which has the wrong type"),
    ],
)
def test_what_is_given_wrongly_is_an_error(
    photos: pathlib.Path, given: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        choices.choose(str(photos), given=given)


def test_a_folder_that_cannot_be_used_is_an_error(
    photos: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    file = tmp_path / "a.txt"
    file.write_text("")
    for images, message in [
        ("", "it is empty"),
        (str(tmp_path / "absent"), "There is no folder"),
        (str(file), "is a file, not a folder"),
        (str(tmp_path), "contains no images"),
        (str(photos / "test" / "cat"), "has 4 images to train on. Training begins at 30"),
    ]:
        with pytest.raises(UserError, match=message):
            choices.choose(images, tell=lambda line: None)


def test_a_folder_that_may_not_be_read_is_an_error(read_only: pathlib.Path) -> None:
    user = os.geteuid()
    os.seteuid(os.getuid())
    read_only.chmod(0o000)
    os.seteuid(user)
    with pytest.raises(UserError, match=r"Cannot list the folder .*: Permission denied"):
        choices.choose(str(read_only), tell=lambda line: None)
