"""Image formats: which file extensions count as images, and which formats are decoded.

Importing this module registers HEIC with Pillow if pillow-heif is installed; every process that
decodes images imports it.
"""

import importlib.util

from PIL import Image, features

# EPS and WMF need external programs; Pillow recognizes the others but cannot decode them.
REFUSED = frozenset(("BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"))
CODECS = {"AVIF": "avif", "JPEG2000": "jpg_2000", "WEBP": "webp"}  # optional parts of Pillow
HEIC_SUFFIXES = frozenset((".heic", ".heics", ".heif", ".heifs", ".hif"))

Image.preinit()  # registers the common formats first, so that they are tried first
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
    """Returns the extension of a file name in lower case, with its dot, or an empty string."""
    return name[name.rfind(".") :].lower() if "." in name else ""


def is_image(name: str) -> bool:
    """Whether a file name has the extension of an image format that can be decoded."""
    return suffix_of(name) in SUFFIXES
