"""A font for the names of files and classes in pictures, which can be in any script."""

import importlib.util
from collections.abc import Iterable, Iterator
from pathlib import Path

from PIL import ImageFont

Font = ImageFont.ImageFont | ImageFont.FreeTypeFont

# Fonts with many scripts; Pillow looks for them in the folders of the system. The first also has
# Chinese, Japanese and Korean.
WIDE = ("NotoSansCJK-Regular.ttc", "Arial Unicode.ttf", "DejaVuSans.ttf", "arial.ttf")


def font_for(texts: Iterable[str], size: int) -> Font:
    """Returns a font of a size in pixels that has the letters of some texts, if there is one.

    It is Pillow's own for texts in ASCII, the only letters that it has; otherwise the first of
    `WIDE` that is installed, or that of matplotlib. Letters that a font does not have are drawn as
    boxes.
    """
    if not all(text.isascii() for text in texts):
        for path in _wide():
            try:
                return ImageFont.truetype(path, size)
            except OSError:  # not installed
                continue
    return ImageFont.load_default(size)


def _wide() -> Iterator[str]:
    yield from WIDE
    if matplotlib := importlib.util.find_spec("matplotlib"):
        assert matplotlib.origin
        yield str(Path(matplotlib.origin).parent / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf")
