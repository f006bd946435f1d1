"""Paths as users write them, and folders that cannot be written to."""

import locale
import os
import pathlib

import pytest
from etils import epath

from sop_jax import paths
from sop_jax.errors import UserError


def test_a_path_has_one_form(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    for text in ("~/runs/a", "~/runs/a/", "~/./runs//a", "/home/me/runs/a"):
        assert paths.expand(text) == "/home/me/runs/a"
    assert paths.expand("~") == "/home/me"
    assert paths.expand("./a/") == paths.expand("a") == "a"
    assert paths.expand("../a") == "../a" and paths.expand("a/../b") == "a/../b"


def test_a_local_path_becomes_absolute(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    assert paths.absolute("a/") == str(tmp_path / "a") and paths.absolute("/b") == "/b"
    assert paths.absolute("~/a") == "/home/me/a"


def test_an_address_stays_as_it_is_if_it_can_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    find = paths.importlib.util.find_spec
    found: object = None
    monkeypatch.setattr(
        paths.importlib.util, "find_spec", lambda name: found if name == "gcsfs" else find(name)
    )
    with pytest.raises(UserError, match=r"needs gcsfs.*pip install -e '\.\[gcs\]'"):
        paths.expand("gs://bucket/~/a/")
    found = object()
    assert paths.expand("gs://bucket/~/a/") == "gs://bucket/~/a/"


@pytest.mark.parametrize("text", ["", " ", "~no_user_of_this_name/a", "s3://bucket/a", "gs:/b/a"])
def test_what_is_no_path_is_refused(text: str) -> None:
    with pytest.raises(UserError):
        paths.expand(text)


def test_a_folder_that_cannot_be_written_to_is_named(read_only: pathlib.Path) -> None:
    with pytest.raises(UserError, match=f"cannot write to {read_only}: Permission denied"):
        paths.check_writable(read_only, "--out")
    with pytest.raises(UserError, match=f"cannot create {read_only}/a/b in {read_only}: Perm"):
        paths.check_writable(read_only / "a" / "b", "--out")
    with pytest.raises(UserError, match=f"cannot create {read_only}/file/a in {read_only}/file: "):
        paths.check_writable(read_only / "file" / "a", "--out")
    assert os.listdir(read_only) == ["file"]


def test_a_check_leaves_nothing_behind(tmp_path: pathlib.Path) -> None:
    paths.check_writable(tmp_path, "--out")
    paths.check_writable(tmp_path / "a" / "b", "--out")
    paths.check_writable("a/relative/one", "--out")
    assert not os.listdir(tmp_path) and not os.path.exists("a")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="dangling: No such file"):
        paths.check_writable(tmp_path / "dangling" / "a", "--out")


def test_a_removal_in_a_bucket_whose_response_was_lost_is_no_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The library repeats the request, and then finds nothing to remove."""

    class Bucket:
        def __truediv__(self, _: str) -> "Bucket":
            return self

        def __str__(self) -> str:
            return "gs://bucket/run"

        def write_text(self, _: str) -> None:
            pass

        def unlink(self, missing_ok: bool = False) -> None:
            if not missing_ok:
                raise FileNotFoundError

    monkeypatch.setattr(paths.epath, "Path", lambda _: Bucket())
    paths.check_writable("gs://bucket/run", "--out")


def test_a_file_that_cannot_be_written_whole_stays_as_it_was(tmp_path: pathlib.Path) -> None:
    file = epath.Path(tmp_path) / "config.json"
    paths.write_whole(file, "old")
    with pytest.raises(UnicodeEncodeError):
        paths.write_whole(file, "new" * 10_000 + "\ud800")
    assert file.read_text() == "old"
    paths.write_whole(file, "new")
    assert file.read_text() == "new"
    assert os.listdir(tmp_path) == ["config.json"]


def test_two_that_write_the_same_file_do_not_meet(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = epath.Path(tmp_path) / "report.html"
    replace = type(file).replace

    def replace_after_another(draft: epath.Path, place: epath.Path) -> epath.Path:
        monkeypatch.setattr(type(file), "replace", replace)
        paths.write_whole(place, "another")
        assert place.read_text() == "another"
        return replace(draft, place)

    monkeypatch.setattr(type(file), "replace", replace_after_another)
    paths.write_whole(file, "one")
    assert file.read_text() == "one"
    assert os.listdir(tmp_path) == ["report.html"]


def test_drafts_of_killed_processes_are_removed(tmp_path: pathlib.Path) -> None:
    file = epath.Path(tmp_path) / "report.html"
    old, new = (tmp_path / f"report.html.{digit * 32}.tmp" for digit in "ab")
    others = [tmp_path / f"my.report.html.{'a' * 32}.tmp", tmp_path / "report.html.tmp"]
    for draft in (old, new, *others):
        draft.write_text("half of")
    for draft in (old, *others):
        os.utime(draft, (0, 0))
    paths.write_whole(file, "whole")
    assert set(tmp_path.iterdir()) == {pathlib.Path(file), new, *others}


def test_a_file_is_utf8_whatever_the_locale_is(tmp_path: pathlib.Path) -> None:
    file = epath.Path(tmp_path) / "report.html"
    before = locale.setlocale(locale.LC_CTYPE)
    try:
        locale.setlocale(locale.LC_CTYPE, "C")
        paths.write_whole(file, "café →")
    finally:
        locale.setlocale(locale.LC_CTYPE, before)
    assert file.read_bytes() == "café →".encode()


def test_an_object_in_a_bucket_is_written_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    file = epath.Path("gs://bucket/run/report.html")
    written = []
    monkeypatch.setattr(
        type(file), "write_bytes", lambda path, content: written.append((str(path), content))
    )
    paths.write_whole(file, "café")
    assert written == [("gs://bucket/run/report.html", "café".encode())]
