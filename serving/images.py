"""Image files to uint8 RGB, the same way for every kind of file.

`headstart.trainer.inputs.images` reads training images by the same rules; the two rooms share no code, and tests
hold that both give the same pixels and refuse the same files.
"""

import io
from functools import partial
from pathlib import Path
from typing import cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from headstart.serving.errors import PackageError

_ACCEPTED = "an undamaged image that Pillow reads, such as PNG, JPEG, WebP, GIF, BMP or TIFF"
_AT_ONCE = 1 << 16  # pixels; more are converted no faster
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
            ImageOps.exif_transpose(opened, in_place=True)
            return _to_rgb(opened)
    except FileNotFoundError as error:
        raise PackageError(f"{name} does not exist; give the path of {_ACCEPTED}") from error
    except MemoryError:  # says nothing of the file
        raise
    # Hostile bytes make Pillow's decoders raise nearly anything: SyntaxError, struct.error, zlib.error.
    except Exception as error:
        reason = str(error) or type(error).__name__
        raise PackageError(f"{name} cannot be read as an image ({reason}); accepted: {_ACCEPTED}") from error


def image_files(path: Path) -> list[Path]:
    """The images below a folder, known by their suffixes, in the order of their paths; a file is one by itself.

    Raises:
        PackageError: the folder has none.
    """
    if not path.is_dir():
        return [path]
    suffixes = {
        suffix
        for suffix, format in Image.registered_extensions().items()
        if format in Image.OPEN and format not in _NOT_PIXELS
    }
    found = sorted(
        file
        for file in path.rglob("*")
        if file.suffix.lower() in suffixes
        and file.is_file()
        and not any(part.startswith(".") for part in file.relative_to(path).parts)
    )
    if not found:
        raise PackageError(f"the folder {path} holds no images; give the path of {_ACCEPTED}, or of a folder of such")
    return found


def _to_rgb(image: Image.Image) -> NDArray[np.uint8]:
    """Any mode to uint8 [H, W, 3], some rows at a time: a large image is held once, with its result."""
    if image.mode in ("F", "LAB"):
        raise ValueError(f"its mode {image.mode} has no fixed range; save it as 8-bit RGB")
    convert = _colours
    if image.mode.startswith("I"):
        eight_bits = (  # 32-bit grey is either, and the largest value tells which; PGM's is of 16 bits
            image.mode == "I" and image.format != "PPM" and cast(tuple[int, int], image.getextrema())[1] <= 255
        )
        convert = partial(_deep_grey, eight_bits=eight_bits)
    width, height = image.size
    pixels = np.empty((height, width, 3), np.uint8)
    step = max(1, _AT_ONCE // width)
    for top in range(0, height, step):
        bottom = min(top + step, height)
        pixels[top:bottom] = convert(image.crop((0, top, width, bottom)))
    return pixels


def _colours(image: Image.Image) -> NDArray[np.uint8]:
    """Grey, colours or a palette, over white where they are transparent, to uint8 [H, W, 3]."""
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return np.asarray(image.convert("RGB"))


def _deep_grey(image: Image.Image, eight_bits: bool) -> NDArray[np.uint8]:
    """16-bit grey, or integers that hold 8 or 16 bits, to uint8 [H, W, 1]."""
    values = np.asarray(image)
    grey: NDArray[np.uint8] = np.clip(values if eight_bits else values // 256, 0, 255).astype(np.uint8)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):  # PNG's tRNS: this one value is transparent
        grey[values == transparent] = 255
    return grey[:, :, None]
