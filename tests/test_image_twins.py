"""Training and serving decode images in two rooms without shared code; here they are held to be one decoder."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from headstart.serving.errors import PackageError
from headstart.serving.images import image_files
from headstart.serving.images import read_image as read_served
from headstart.trainer.errors import DataError
from headstart.trainer.inputs.images import image_suffixes
from headstart.trainer.inputs.images import read_image as read_trained

# Pillow remarks on damaged files and on large ones before it, or we, refuse them.
pytestmark = pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning", "ignore::UserWarning:PIL")

NOISE = np.random.default_rng(0).integers(0, 256, (19, 23, 4), np.uint8)
RGB = Image.fromarray(NOISE[..., :3])
RGBA = Image.fromarray(NOISE)
GREY = Image.fromarray(NOISE[..., 0])
PALETTE = RGB.quantize(64)
DEEP = NOISE[..., 0].astype(np.uint16) * 256 + NOISE[..., 1]


def encoded(image: Image.Image, file_format: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


def turned(orientation: int, file_format: str) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(RGB, file_format, exif=exif)


def animated(file_format: str) -> bytes:
    frames = [RGBA, Image.new("RGBA", RGBA.size, (0, 0, 255, 90))]
    return encoded(frames[0], file_format, save_all=True, append_images=frames[1:])


def deep_colour() -> bytes:
    """PNG with 16 bits for each of red, green and blue, which Pillow reads and does not write."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", *DEEP.shape[::-1], 16, 2, 0, 0, 0)
    rows = b"".join(b"\0" + row.tobytes() for row in np.repeat(DEEP[..., None], 3, axis=2).astype(">u2"))
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


READ = {
    "1": encoded(GREY.point(lambda level: 255 * (level > 127), "1")),
    "L": encoded(GREY),
    "L with tRNS": encoded(GREY, transparency=int(NOISE[0, 0, 0])),
    "LA": encoded(RGBA.convert("LA")),
    "P": encoded(PALETTE),
    "P with tRNS": encoded(PALETTE, transparency=bytes(range(0, 256, 4))),
    "P in an icon": encoded(PALETTE, "ICNS"),
    "PA": encoded(PALETTE.convert("PA"), "TIFF"),
    "RGB": encoded(RGB),
    "RGB with tRNS": encoded(RGB, transparency=tuple(map(int, NOISE[0, 0, :3]))),
    "RGB of 16 bits": deep_colour(),
    "RGBA": encoded(RGBA),
    "RGBA in WebP": encoded(RGBA, "WEBP"),
    "I;16": encoded(Image.fromarray(DEEP)),
    "I;16 with tRNS": encoded(Image.fromarray(DEEP), transparency=int(DEEP[0, 0])),
    "I;16 of 8 bits": encoded(Image.fromarray(DEEP // 256)),
    "I;16B": encoded(Image.frombytes("I;16B", GREY.size, DEEP.astype(">u2").tobytes()), "TIFF"),
    "I of 8 bits": encoded(Image.fromarray(DEEP.astype(np.int32) // 256 - 9), "TIFF"),
    "I of 16 bits": encoded(Image.fromarray(DEEP.astype(np.int32)), "TIFF"),
    "I in PGM": encoded(Image.fromarray(DEEP.astype(np.int32)), "PPM"),
    "I in a dark PGM": encoded(Image.fromarray(DEEP.astype(np.int32) // 256), "PPM"),
    "I beyond 16 bits": encoded(Image.fromarray(DEEP.astype(np.int32) * 999), "TIFF"),
    "CMYK in JPEG": encoded(RGB.convert("CMYK"), "JPEG"),
    "CMYK in TIFF": encoded(RGB.convert("CMYK"), "TIFF"),
    "YCbCr": encoded(RGB.convert("YCbCr"), "TIFF"),
    "JPEG": encoded(RGB, "JPEG"),
    "BMP": encoded(RGB, "BMP"),
    **{f"animated {name}": animated(name) for name in ("GIF", "PNG", "WEBP")},
    **{f"turned {way} {name}": turned(way, name) for way in range(1, 9) for name in ("JPEG", "PNG", "TIFF")},
}
REFUSED = {
    "text": b"a,b\n1,2\n",
    "empty": b"",
    "signature alone": b"\x89PNG\r\n\x1a\n",
    "float": encoded(GREY.convert("F"), "TIFF"),
    "LAB": encoded(Image.new("LAB", (4, 3)), "TIFF"),
    "EPS": encoded(RGB, "EPS"),
    "PDF": encoded(RGB, "PDF"),
    "film": b"\x00\x00\x01\xb3" + bytes(range(1, 255)),
    **{
        f"{name} cut at {part}%": encoded(RGB, name)[: len(encoded(RGB, name)) * part // 100]
        for name in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP")
        for part in (3, 50, 90)
    },
}


def pixels_of_both(content: bytes, path: Path | None = None) -> np.ndarray | None:
    """The pixels that both rooms agree on, from memory and from a file; None where both refuse."""
    sources: list[bytes | Path] = [content]
    if path is not None:
        path.write_bytes(content)
        sources.append(path)
    found: list[np.ndarray | None] = []
    for source in sources:
        try:
            found.append(read_trained(source))
        except DataError:
            found.append(None)
        try:
            found.append(read_served(source))
        except PackageError:
            found.append(None)
    assert len({pixels is None for pixels in found}) == 1, f"refused by some: {[pixels is None for pixels in found]}"
    first = found[0]
    if first is not None:
        for pixels in found:
            assert pixels is not None
            assert pixels.dtype == np.uint8
            np.testing.assert_array_equal(pixels, first)
    return first


@pytest.mark.parametrize("kind", READ)
def test_both_give_the_same_pixels(kind: str, tmp_path: Path):
    pixels = pixels_of_both(READ[kind], tmp_path / "image")
    assert pixels is not None
    assert pixels.ndim == 3
    assert pixels.shape[2] == 3


@pytest.mark.parametrize("kind", REFUSED)
def test_both_refuse(kind: str, tmp_path: Path):
    assert pixels_of_both(REFUSED[kind], tmp_path / "image") is None


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "GIF", "TIFF", "ICO"])
@pytest.mark.parametrize("limit", [None, 1025, 1024, 1023, 512, 511])
def test_both_end_at_pillows_limit_where_pillow_warns_up_to_twice_that(
    limit: int | None, file_format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    bomb = encoded(Image.new("RGB", (32, 32)), file_format)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    pixels = pixels_of_both(bomb, tmp_path / "image")
    assert (pixels is not None) == (limit is None or limit >= 1024)


@pytest.mark.parametrize("name", ["absent.png", "."], ids=["missing", "folder"])
def test_both_refuse_what_is_no_file(name: str, tmp_path: Path):
    with pytest.raises(DataError):
        read_trained(tmp_path / name)
    with pytest.raises(PackageError):
        read_served(tmp_path / name)


@settings(deadline=None, max_examples=200)
@given(
    content=st.sampled_from(sorted(READ.values())),
    flips=st.lists(st.tuples(st.integers(0, 1 << 16), st.integers(1, 255)), max_size=4),
    kept=st.sampled_from([1.0, 0.99, 0.7]),
)
def test_both_answer_damage_alike(content: bytes, flips: list[tuple[int, int]], kept: float):
    damaged = bytearray(content)
    for place, bits in flips:
        damaged[place % len(damaged)] ^= bits
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Image, "MAX_IMAGE_PIXELS", 1 << 20)  # a damaged size is not to fill the memory
        pixels_of_both(bytes(damaged[: int(len(damaged) * kept)]))


def test_both_rooms_know_the_same_suffixes(tmp_path: Path):
    Image.init()
    for suffix in [*Image.registered_extensions(), ".txt", ""]:
        (tmp_path / f"image{suffix}").touch()
    found = {path.suffix for path in image_files(tmp_path)}
    assert found == image_suffixes()
    assert len(found) > 20
