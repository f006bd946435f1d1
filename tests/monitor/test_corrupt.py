"""Images that could not be read: each is named once, and too many are an error with a list."""

import numpy as np
import pytest

from sop_jax.data.decode import AS_STORED
from sop_jax.errors import UserError
from sop_jax.monitor.corrupt import CorruptImages, lines_of, print_corrupt


class Images:
    """A source of some records, all of which are empty."""

    has_labels, class_names = False, None
    digest = "images"

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> bytes:
        return b""

    def label(self, index: int) -> int:
        raise AssertionError("no label is to be read")

    def name(self, index: int) -> str:
        return f"image-{index}.png"


def batch(size: int, *corrupt: int) -> np.ndarray:
    """Returns the corrupt records of a batch, spread over it, as the pipeline does."""
    records = np.full(size, -1, np.int32)
    records[np.linspace(0, size - 1, len(corrupt)).astype(int)] = corrupt
    return records


def line(index: int) -> str:
    return f"image-{index}.png: it is empty"


def test_a_good_batch_has_none() -> None:
    images = CorruptImages(Images(100), 0.0, AS_STORED)
    assert images.add(batch(8)) == []
    images.check()


def test_each_image_is_named_once() -> None:
    images = CorruptImages(Images(100), 0.1, AS_STORED)
    assert images.add(batch(8, 7, 3, 7)) == [line(3), line(7)]
    assert images.add(batch(8, 0, 7)) == [line(0)]
    assert images.add(batch(8, 3)) == []


@pytest.mark.parametrize("share", [0.0, 0.01, 0.05])
def test_the_share_is_of_the_images_of_a_small_set(share: float) -> None:
    allowed = round(share * 500)
    images = CorruptImages(Images(500), share, AS_STORED)
    images.add(batch(64, *range(allowed)))
    images.check()
    images.add(batch(64, allowed))
    with pytest.raises(UserError, match=f"{allowed + 1} of 500 images cannot be read"):
        images.check()


def test_the_same_image_again_is_not_one_more() -> None:
    images = CorruptImages(Images(500), 0.01, AS_STORED)
    for _ in range(20):
        images.add(batch(8, 1, 2))
    images.check()


def test_a_first_bad_batch_of_a_large_set_says_little() -> None:
    images = CorruptImages(Images(10**6), 0.01, AS_STORED)
    images.add(batch(16, *range(10)))
    images.check()
    images.add(batch(16, 10))
    with pytest.raises(UserError, match="11 of 1000 images"):
        images.check()


def test_the_share_of_a_large_set_is_of_the_images_seen() -> None:
    images = CorruptImages(Images(10**6), 0.01, AS_STORED)
    for start in range(0, 50, 10):
        images.add(batch(1000, *range(start, start + 10)))
        images.check()
    images.add(batch(10, 50, 51))
    with pytest.raises(UserError, match="52 of 5010 images"):
        images.check()


def test_images_seen_in_several_epochs_count_once() -> None:
    images = CorruptImages(Images(2000), 0.01, AS_STORED)
    for _ in range(10):
        images.add(batch(2000, *range(20)))
        images.check()
    images.add(batch(2000, 20))
    with pytest.raises(UserError, match="21 of 2000 images"):
        images.check()


def test_the_error_lists_them_and_the_way_out() -> None:
    images = CorruptImages(Images(50), 0.01, AS_STORED)
    images.add(batch(8, 30, 4))
    with pytest.raises(UserError) as caught:
        images.check()
    first, *names, last = str(caught.value).splitlines()
    assert "2 of 50 images" in first and "data.max_corrupt_share=0.01" in first
    assert names == [f"  {line(4)}", f"  {line(30)}"]
    assert "Repair or remove them" in last and "--config.data.max_corrupt_share" in last
    assert "not yet read" in last
    images.add(batch(42))
    with pytest.raises(UserError) as caught:
        images.check()
    assert "not yet read" not in str(caught.value)


def test_a_long_list_is_cut_short_and_counted() -> None:
    images = CorruptImages(Images(10**5), 0.01, AS_STORED)
    images.add(batch(4096, *range(250)))
    with pytest.raises(UserError) as caught:
        images.check()
    _, *names, more, _ = str(caught.value).splitlines()
    assert names == [f"  {line(index)}" for index in range(100)]
    assert more == "  and 150 more"


def test_what_an_evaluation_leaves_out_is_listed_with_the_reason() -> None:
    assert lines_of(Images(5), [1, 4], AS_STORED) == [line(1), line(4)]
    lines = lines_of(Images(500), range(250), AS_STORED)
    assert lines[99:] == [line(99), "and 150 more"]


@pytest.mark.parametrize(("corrupt", "count"), [([1], "1 image"), ([1, 4], "2 images")])
def test_images_left_out_are_counted(
    capsys: pytest.CaptureFixture[str], corrupt: list[int], count: str
) -> None:
    print_corrupt(Images(5), corrupt, AS_STORED)
    assert capsys.readouterr().err.startswith(f"{count} cannot be read:\n")
