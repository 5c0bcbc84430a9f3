"""Image files to uint8 RGB, the same way for every kind of file.

`headstart.trainer.inputs.images` reads training images by the same rules; the two rooms share no code, and tests
hold that both give the same pixels and refuse the same files.
"""

import io
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from headstart.serving.errors import PackageError

_ACCEPTED = "an undamaged image that Pillow reads, such as PNG, JPEG, WebP, GIF, BMP or TIFF"
_NOT_PIXELS = {"BUFR", "EPS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF"}  # no decoder, or one that runs a program


def read_image(source: Path | bytes) -> NDArray[np.uint8]:
    """Decode one image; the first frame of an animation.

        pixels = read_image(Path("cat.png"))

    The EXIF orientation is applied, transparency is laid over white and 16-bit grey keeps its high byte.

    Returns:
        uint8 [H, W, 3], RGB, C-contiguous.

    Raises:
        PackageError: `source` is missing, damaged, not an image, beyond Pillow's limit on pixels, or of a
            mode without a fixed range (float, LAB).
    """
    name = "the image" if isinstance(source, bytes) else str(source)
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as opened:
            # Pillow only warns up to twice its limit, and warnings made errors are not safe in threads.
            if Image.MAX_IMAGE_PIXELS is not None and opened.width * opened.height > Image.MAX_IMAGE_PIXELS:
                raise ValueError(f"{opened.width}x{opened.height} is above {Image.MAX_IMAGE_PIXELS} pixels")
            if opened.format in _NOT_PIXELS:
                raise ValueError(f"it is {opened.format}")
            return _to_rgb(ImageOps.exif_transpose(opened))
    except FileNotFoundError as error:
        raise PackageError(f"{name} does not exist; give the path of {_ACCEPTED}") from error
    except MemoryError:  # says nothing of the file
        raise
    # Hostile bytes make Pillow's decoders raise nearly anything: SyntaxError, struct.error, zlib.error.
    except Exception as error:
        reason = str(error) or type(error).__name__
        raise PackageError(f"{name} cannot be read as an image ({reason}); accepted: {_ACCEPTED}") from error


def _to_rgb(image: Image.Image) -> NDArray[np.uint8]:
    """Any mode to uint8 [H, W, 3]."""
    if image.mode in ("F", "LAB"):
        raise ValueError(f"its mode {image.mode} has no fixed range; save it as 8-bit RGB")
    if image.mode.startswith("I"):
        return _deep_grey(image)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return np.array(image.convert("RGB"))


def _deep_grey(image: Image.Image) -> NDArray[np.uint8]:
    """16-bit grey, or integers that hold 8 or 16 bits as their largest value tells, to uint8 [H, W, 3]."""
    values = np.asarray(image).astype(np.int64)
    eight_bits = image.mode == "I" and values.max() <= 255
    grey = np.clip(values if eight_bits else values // 256, 0, 255)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):  # PNG's tRNS: this one value is transparent
        grey = np.where(values == transparent, 255, grey)
    return np.repeat(grey.astype(np.uint8)[:, :, None], 3, axis=2)
