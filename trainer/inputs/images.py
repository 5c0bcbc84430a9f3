"""One image file, decoded: any mode that Pillow reads becomes uint8 [H, W, 3].

What is not plain RGB is handled on purpose and said here, since it decides what a model sees: transparency is
laid over white, 16-bit grey keeps its upper 8 bits, the camera's orientation is applied, animations give
their first frame. The server decodes by the same rules, in a room that shares no code with this one: tests hold
that both give the same pixels and refuse the same files.
"""

from functools import lru_cache
from io import BytesIO
from pathlib import Path

import numpy as np
import numpy.typing as npt
import PIL
from PIL import Image, ImageOps, UnidentifiedImageError

from headstart.trainer.errors import DataError

Pixels = npt.NDArray[np.uint8]

# Pillow's plugins that are not images of pixels: stubs without a decoder, and EPS, which would run
# Ghostscript on the file.
_NOT_PIXELS = {"BUFR", "EPS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF"}


@lru_cache(maxsize=1)
def image_formats() -> tuple[str, ...]:
    """Return the names of the formats that are decoded, as Pillow calls them."""
    Image.init()
    return tuple(sorted(set(Image.OPEN) - _NOT_PIXELS))


@lru_cache(maxsize=1)
def image_suffixes() -> frozenset[str]:
    """Return the lower-case suffixes, dot included, that tell a folder's images from its other files."""
    formats = set(image_formats())
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in formats)


def read_image(source: str | Path | bytes, *, name: str = "") -> Pixels:
    """Decode a file, or the bytes of one, to uint8 [H, W, 3].

        pixels = read_image("cat.jpg")
        pixels = read_image(content, name="cat.jpg")     # the name is what an error says

    Raises DataError, naming the file, for one that is missing, is no image, is cut short, has a mode without
    a fixed range (float and LAB) or is beyond Pillow's limit on pixels, `PIL.Image.MAX_IMAGE_PIXELS`.
    """
    name = name or ("an image in memory" if isinstance(source, bytes) else str(source))
    try:
        content = source if isinstance(source, bytes) else Path(source).read_bytes()
    except OSError as error:
        raise DataError(f"{name} cannot be read: {error.strerror or error}") from error
    try:
        return _decode(content)
    except MemoryError:  # says nothing of the file
        raise
    except UnidentifiedImageError as error:
        raise DataError(f"{name} is not an image that Pillow {PIL.__version__} can read") from error
    except Exception as error:  # Pillow's decoders meet damaged files with a dozen types, struct.error to KeyError
        raise DataError(f"{name} cannot be decoded: {error or type(error).__name__}") from error


def is_grey(image: Pixels) -> bool:
    """Is R = G = B in every pixel of uint8 [H, W, 3]?"""
    return bool((image[..., :1] == image[..., 1:]).all())


def _decode(content: bytes) -> Pixels:
    with Image.open(BytesIO(content), formats=image_formats()) as image:
        # Pillow only warns up to twice its limit, and warnings made errors are not safe in threads.
        if Image.MAX_IMAGE_PIXELS is not None and image.width * image.height > Image.MAX_IMAGE_PIXELS:
            raise ValueError(f"{image.width}x{image.height} is above {Image.MAX_IMAGE_PIXELS} pixels")
        # Not in_place: of an ICNS icon with a palette, Pillow 13.0 converts a copy alone.
        return np.array(_to_rgb(ImageOps.exif_transpose(image), image.format), dtype=np.uint8)


def _to_rgb(image: Image.Image, file_format: str | None) -> Image.Image:
    """Convert a decoded image of any mode with a fixed range to RGB."""
    if image.mode.startswith("I"):
        return _grey_from_integers(image, file_format).convert("RGB")
    if image.mode in ("F", "LAB"):
        raise ValueError(f"mode {image.mode} has no fixed range; save it as 8-bit RGB")
    if image.has_transparency_data:
        canvas = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(canvas, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def _grey_from_integers(image: Image.Image, file_format: str | None) -> Image.Image:
    """Scale 16-bit grey (I;16, I;16B, I;16L, and PGM's I) or 32-bit grey (I) to 8 bits.

    32-bit grey holds 8-bit values in some files and 16-bit values in others; the largest value tells which.
    """
    values = np.asarray(image).astype(np.int64)
    sixteen_bits = image.mode != "I" or file_format == "PPM" or int(values.max()) > 255
    grey = np.clip(values // 256 if sixteen_bits else values, 0, 255).astype(np.uint8)
    transparent = image.info.get("transparency")  # PNG's tRNS chunk: this value, and only this, is transparent
    if isinstance(transparent, int):
        grey[values == transparent] = 255
    return Image.fromarray(grey)
