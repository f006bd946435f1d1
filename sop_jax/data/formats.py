"""Image formats: which file endings are images, and which formats are decoded.

Importing this module registers HEIC with Pillow where pillow-heif is installed, in every process.
"""

import importlib.util

from PIL import Image, features

# EPS and WMF need other programs; Pillow knows the others without being able to decode them.
REFUSED = frozenset(("BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"))
CODECS = {"AVIF": "avif", "JPEG2000": "jpg_2000", "WEBP": "webp"}  # which a Pillow may lack
HEIC_SUFFIXES = frozenset((".heic", ".heics", ".heif", ".heifs", ".hif"))

Image.preinit()  # first, so that the common formats are tried first
Image.init()
if importlib.util.find_spec("pillow_heif"):
    importlib.import_module("pillow_heif").register_heif_opener()

FORMATS = tuple(
    name
    for name in Image.ID
    if name not in REFUSED and (name not in CODECS or features.check(CODECS[name]))
)
SUFFIXES = frozenset(
    suffix
    for suffix, name in Image.registered_extensions().items()
    if name in FORMATS or name == "MPO"  # which Pillow opens as JPEG
)


def suffix_of(name: str) -> str:
    """The ending of a file's name in lower case, with its dot; empty where there is none."""
    return name[name.rfind(".") :].lower() if "." in name else ""


def is_image(name: str) -> bool:
    """Whether the ending of a file's name is that of an image."""
    return suffix_of(name) in SUFFIXES
