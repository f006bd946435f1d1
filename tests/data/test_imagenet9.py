"""ImageNet-9: variants, labels and the map of ImageNet's classes, and what is refused."""

import json

import pytest
from datasets import write_tree

from sop_jax.data.decode import decode
from sop_jax.data.imagenet9 import open_variants, read_map
from sop_jax.errors import UserError


def test_labels_are_the_numbers_of_the_folders(tmp_path):
    write_tree(tmp_path, ["no_fg/val/05_insect/1.JPEG", "no_fg/val/00_dog/2.JPEG"])
    write_tree(tmp_path, ["original/val/08_fish/3.JPEG"])
    variants = open_variants(tmp_path)
    assert list(variants) == ["original", "no_fg"]  # the clean set first
    assert [variants["no_fg"].label(i) for i in range(2)] == [0, 5]
    assert variants["original"].label(0) == 8  # also where the other classes are absent


def test_variants_are_identified_by_the_map_of_classes_too(tmp_path):
    write_tree(tmp_path, ["no_fg/val/05_insect/1.JPEG"])
    stamps = [open_variants(tmp_path)["no_fg"].stamp]
    for text in ("{}", "[]"):
        (tmp_path / "in_to_in9.json").write_text(text)
        stamps.append(open_variants(tmp_path)["no_fg"].stamp)
    (tmp_path / "no_fg/val/05_insect/1.JPEG").write_bytes(b"another image")
    stamps.append(open_variants(tmp_path)["no_fg"].stamp)
    assert len(set(stamps)) == 4


def test_the_real_tiles(shared):
    folder = shared / "data" / "fixtures" / "imagenet9"
    tiles = open_variants(folder / "montage_tiles")
    assert len(tiles) == 8
    for tile in tiles.values():
        assert len(tile) == 1 and tile.label(0) == 5
        assert decode(tile[0]).shape == (224, 224, 3)


def test_the_real_map(shared):
    classes = read_map(shared / "data" / "fixtures" / "imagenet9")
    assert classes.shape == (1000,)
    assert set(classes.tolist()) == set(range(-1, 9))
    assert classes[0] == 8 and classes[207] == 0  # a tench and a golden retriever


def test_errors_say_what_is_missing(tmp_path):
    with pytest.raises(UserError, match="none of the variants .* https://github.com/MadryLab"):
        open_variants(tmp_path)
    with pytest.raises(UserError, match=r"there is no .*in_to_in9\.json, which a head of 1000"):
        read_map(tmp_path)
    write_tree(tmp_path, ["no_fg/val/05_insect/1.JPEG", "no_fg/val/dog/2.JPEG"])
    with pytest.raises(UserError, match="has a folder dog. Expected the nine class folders"):
        open_variants(tmp_path)
    (tmp_path / "no_fg/val/dog/2.JPEG").rename(tmp_path / "no_fg/val/2.JPEG")
    with pytest.raises(UserError, match="has images outside of class folders"):
        open_variants(tmp_path)


@pytest.mark.parametrize(
    "text", ["", "[]", '{"0": 1}', json.dumps({str(i): 9 for i in range(1000)})]
)
def test_a_damaged_map_is_described(tmp_path, text):
    (tmp_path / "in_to_in9.json").write_text(text)
    with pytest.raises(UserError, match="is not the map of ImageNet's classes"):
        read_map(tmp_path)
