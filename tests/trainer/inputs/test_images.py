import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from headstart.trainer.errors import DataError
from headstart.trainer.inputs.images import image_suffixes, is_grey, read_image

RGB = np.random.default_rng(0).integers(0, 256, (7, 5, 3), dtype=np.uint8)
GREY = RGB[..., 0]
ALPHA = np.random.default_rng(1).integers(0, 256, (7, 5), dtype=np.uint8)


def encoded(image, file_format="PNG", **options):
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


def over_white(colour, alpha):
    mixed = (colour.astype(float) * alpha[..., None] + 255.0 * (255 - alpha[..., None])) / 255
    return np.round(mixed)


def three(grey):
    return np.repeat(grey[..., None], 3, axis=2)


@pytest.mark.parametrize("file_format", ["PNG", "BMP", "TIFF", "PPM", "TGA", "GIF", "WEBP"])
def test_rgb_comes_back_as_it_was(file_format):
    options = {"WEBP": {"lossless": True}}.get(file_format, {})
    image = Image.fromarray(RGB)
    if file_format == "GIF":  # 35 colours fit its palette
        image = image.quantize(256)
    pixels = read_image(encoded(image, file_format, **options))
    assert pixels.dtype == np.uint8
    assert np.array_equal(pixels, RGB)


def test_a_path_and_a_string_are_read(tmp_path):
    Image.fromarray(RGB).save(tmp_path / "a.png")
    assert np.array_equal(read_image(tmp_path / "a.png"), RGB)
    assert np.array_equal(read_image(str(tmp_path / "a.png")), RGB)


def test_the_result_is_the_callers_own():
    assert read_image(encoded(Image.fromarray(RGB))).flags.writeable


@pytest.mark.parametrize("file_format", ["PNG", "BMP", "TIFF", "JPEG"])
def test_grey_becomes_three_equal_channels(file_format):
    flat = np.full((8, 8), 77, dtype=np.uint8)
    pixels = read_image(encoded(Image.fromarray(flat), file_format))
    assert np.array_equal(pixels, three(flat))
    assert is_grey(pixels)


def test_bilevel_and_palette():
    bits = Image.fromarray(GREY > 127)
    assert bits.mode == "1"
    assert np.array_equal(read_image(encoded(bits)), three(np.where(GREY > 127, 255, 0)))
    palette = Image.fromarray(RGB).quantize(256)
    assert palette.mode == "P"
    assert np.array_equal(read_image(encoded(palette)), RGB)


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr"])
def test_colour_spaces_become_rgb(mode):
    image = Image.fromarray(np.full((8, 8, 3), (200, 40, 90), dtype=np.uint8)).convert(mode)
    pixels = read_image(encoded(image, "TIFF"))
    assert np.abs(pixels.astype(int) - (200, 40, 90)).max() <= 2


@pytest.mark.parametrize("file_format", ["PNG", "WEBP", "TIFF"])
def test_rgba_is_laid_over_white(file_format):
    rgba = np.dstack([RGB, ALPHA])
    options = {"WEBP": {"lossless": True, "exact": True}}.get(file_format, {})
    pixels = read_image(encoded(Image.fromarray(rgba), file_format, **options))
    assert np.abs(pixels - over_white(RGB, ALPHA)).max() <= 1


def test_grey_with_alpha_is_laid_over_white():
    pixels = read_image(encoded(Image.fromarray(np.dstack([GREY, ALPHA]), "LA")))
    assert np.abs(pixels - over_white(three(GREY), ALPHA)).max() <= 1


def test_palette_with_alpha_is_laid_over_white():
    image = Image.new("PA", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putdata([(0, 255), (1, 0)])
    content = encoded(image, "TIFF")
    assert Image.open(io.BytesIO(content)).mode == "PA"
    assert read_image(content).tolist() == [[[10, 20, 30], [255, 255, 255]]]


@pytest.mark.parametrize(
    ("mode", "colours", "transparency", "expected"),
    [
        ("P", [0, 1], 1, [[10, 20, 30], [255, 255, 255]]),
        ("P", [0, 1], bytes([255, 0]), [[10, 20, 30], [255, 255, 255]]),
        ("L", [9, 8], 8, [[9, 9, 9], [255, 255, 255]]),
        ("1", [0, 255], 0, [[255, 255, 255], [255, 255, 255]]),
        ("RGB", [(1, 2, 3), (4, 5, 6)], (4, 5, 6), [[1, 2, 3], [255, 255, 255]]),
    ],
    ids=["P-index", "P-table", "L", "1", "RGB"],
)
def test_a_transparent_colour_becomes_white(mode, colours, transparency, expected):
    image = Image.new(mode, (2, 1))
    if mode == "P":
        image.putpalette([10, 20, 30, 40, 50, 60])
    image.putdata(colours)
    assert read_image(encoded(image, transparency=transparency)).tolist() == [expected]


def sixteen_bit_png(values, transparent=None):
    """Write a grey PNG of 16 bits by hand, with a tRNS chunk, which Pillow does not write for these."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    chunks = chunk(b"IHDR", struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, 0, 0, 0, 0))
    chunks += chunk(b"tRNS", struct.pack(">H", transparent)) if transparent is not None else b""
    return b"\x89PNG\r\n\x1a\n" + chunks + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


SIXTEEN = np.array([[0, 255, 256], [511, 40000, 65535]], dtype=np.uint16)


@pytest.mark.parametrize(
    "content",
    [
        sixteen_bit_png(SIXTEEN),
        encoded(Image.fromarray(SIXTEEN), "TIFF"),
        encoded(Image.frombytes("I;16B", (3, 2), SIXTEEN.astype(">u2").tobytes()), "TIFF"),
        encoded(Image.fromarray(SIXTEEN.astype(np.int32)), "TIFF"),
    ],
    ids=["png", "tiff", "tiff-big-endian", "tiff-32-bit"],
)
def test_sixteen_bit_grey_keeps_its_upper_bits(content):
    assert np.array_equal(read_image(content), three(SIXTEEN // 256))


def test_sixteen_bit_grey_with_a_transparent_value():
    expected = np.where(SIXTEEN == 40000, 255, SIXTEEN // 256)
    assert np.array_equal(read_image(sixteen_bit_png(SIXTEEN, transparent=40000)), three(expected))


@pytest.mark.parametrize(
    ("maximum", "values", "expected"),
    [(65535, [0, 250, 255], [0, 0, 0]), (65535, [0, 256, 65535], [0, 1, 255]), (1023, [0, 3, 1023], [0, 0, 255])],
    ids=["dark", "16 bits", "10 bits"],
)
def test_a_pgm_of_more_than_eight_bits_keeps_its_upper_bits_however_dark_it_is(maximum, values, expected):
    content = b"P5 3 1 %d\n" % maximum + np.array(values, dtype=">u2").tobytes()
    assert Image.open(io.BytesIO(content)).mode == "I"
    assert np.array_equal(read_image(content), three(np.array([expected])))


def test_eight_bit_values_in_32_bits_stay():
    values = np.array([[-3, 0, 7, 255]], dtype=np.int32)
    assert np.array_equal(read_image(encoded(Image.fromarray(values), "TIFF")), three(np.clip(values, 0, 255)))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("file_format", ["PNG", "TIFF", "WEBP"])
def test_exif_orientation_is_applied(orientation, file_format):
    turn = {
        1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud,
        5: lambda a: a.swapaxes(0, 1), 6: lambda a: np.rot90(a, -1),
        7: lambda a: np.rot90(a, 2).swapaxes(0, 1), 8: np.rot90,
    }[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if file_format == "WEBP" else {}
    content = encoded(Image.fromarray(RGB), file_format, exif=exif, **options)
    assert np.array_equal(read_image(content), turn(RGB))


@pytest.mark.parametrize("file_format", ["GIF", "PNG", "WEBP"])
def test_animations_give_their_first_frame(file_format):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if file_format == "WEBP" else {}
    content = encoded(frames[0], file_format, save_all=True, append_images=frames[1:], **options)
    assert np.array_equal(read_image(content), np.full((4, 4, 3), (255, 0, 0)))


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF"])
@pytest.mark.parametrize("kept", [0.02, 0.5, 0.9], ids=lambda kept: f"{kept:.0%}")
def test_a_truncated_file_is_refused_by_name(tmp_path, file_format, kept):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    content = encoded(Image.fromarray(noise), file_format)
    (tmp_path / "cut.img").write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(DataError, match=r"cut\.img"):
        read_image(tmp_path / "cut.img")


@pytest.mark.parametrize("content", [b"", b"hello", b"\x89PNG\r\n\x1a\n", b"%PDF-1.4", b"%!PS-Adobe-3.0 EPSF-3.0\n"])
def test_what_is_no_image_is_refused(tmp_path, content):
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.png"):
        read_image(tmp_path / "a.png")


def test_float_images_are_refused():
    with pytest.raises(DataError, match=r"x\.tif cannot be decoded: mode F has no fixed range"):
        read_image(encoded(Image.fromarray(np.ones((2, 2), dtype=np.float32)), "TIFF"), name="x.tif")


def test_a_decompression_bomb_is_refused(monkeypatch):
    content = encoded(Image.new("L", (100, 100)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(DataError, match=r"bomb\.png cannot be decoded: .*pixels"):
        read_image(content, name="bomb.png")


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"none\.png cannot be read: No such file"):
        read_image(tmp_path / "none.png")
    with pytest.raises(DataError, match="cannot be read: Is a directory"):
        read_image(tmp_path)


def test_suffixes_are_those_of_images():
    assert {".png", ".jpg", ".jpeg", ".gif", ".bmp", ".webp", ".tif", ".ppm"} <= image_suffixes()
    assert not {".txt", ".csv", ".md", ".mpg", ".eps", ".pdf", ".h5", ""} & image_suffixes()
