"""Every kind of image file becomes the same uint8 RGB, as in training, and what is none is refused."""

import io
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from headstart.serving import images
from headstart.serving.errors import PackageError
from headstart.serving.images import image_files, read_image

ROW = np.arange(12, dtype=np.uint8).reshape(3, 4) * 20  # 0 to 220, 3 x 4


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def grey(values: np.ndarray) -> np.ndarray:
    return np.repeat(values[:, :, None], 3, axis=2)


def rgba(alpha: int) -> Image.Image:
    pixels = np.dstack([ROW, ROW, ROW, np.full_like(ROW, alpha)])
    pixels[..., 1] = 7
    return Image.fromarray(pixels)


def palette(**options: object) -> bytes:
    image = Image.new("P", (4, 3), 1)
    image.putpalette([255, 0, 0, 10, 20, 30])
    return encoded(image, **options)


def stripes() -> np.ndarray:
    """[16, 24, 3] whose left half is red and whose right half is blue; JPEG keeps it within a few levels."""
    pixels = np.zeros((16, 24, 3), np.uint8)
    pixels[:, :12, 0] = 200
    pixels[:, 12:, 2] = 200
    return pixels


PNGS = {
    "L": (encoded(Image.fromarray(ROW)), grey(ROW)),
    "1": (encoded(Image.fromarray(ROW > 100)), grey(np.where(ROW > 100, 255, 0).astype(np.uint8))),
    "LA over white": (
        encoded(Image.merge("LA", [Image.fromarray(ROW), Image.new("L", (4, 3), 0)])),
        np.full((3, 4, 3), 255),
    ),
    "RGBA opaque": (encoded(rgba(255)), np.dstack([ROW, np.full_like(ROW, 7), ROW])),
    "RGBA over white": (encoded(rgba(0)), np.full((3, 4, 3), 255)),
    "P": (palette(), np.broadcast_to([10, 20, 30], (3, 4, 3))),
    "P transparent": (palette(transparency=1), np.full((3, 4, 3), 255)),
    "RGB with tRNS": (
        encoded(Image.new("RGB", (4, 3), (1, 2, 3)), transparency=(1, 2, 3)),
        np.full((3, 4, 3), 255),
    ),
    "L with tRNS": (encoded(Image.fromarray(ROW), transparency=0), grey(np.where(ROW == 0, 255, ROW))),
    "I;16": (encoded(Image.fromarray(ROW.astype(np.uint16) * 256 + 255)), grey(ROW)),
    "I;16 dark": (encoded(Image.fromarray(ROW.astype(np.uint16))), np.zeros((3, 4, 3))),
    "I in a dark PGM": (b"P5 4 3 65535\n" + ROW.astype(">u2").tobytes(), np.zeros((3, 4, 3))),
    "I;16 with tRNS": (
        encoded(Image.fromarray(ROW.astype(np.uint16) * 256), transparency=20 * 256),
        grey(np.where(ROW == 20, 255, ROW)),
    ),
    "I;16B": (
        encoded(Image.frombytes("I;16B", (4, 3), (ROW.astype(">u2") * 256 + 7).astype(">u2").tobytes()), "TIFF"),
        grey(ROW),
    ),
    "I with 8 bits": (encoded(Image.fromarray(ROW.astype(np.int32)), "TIFF"), grey(ROW)),
    "I of the largest 8 bits": (encoded(Image.new("I", (4, 3), 255), "TIFF"), np.full((3, 4, 3), 255)),
    "I below and beyond": (
        encoded(Image.fromarray(np.array([[-5, 1 << 17]], np.int32)), "TIFF"),
        grey(np.array([[0, 255]], np.uint8)),
    ),
    "I with 16 bits": (encoded(Image.fromarray(ROW.astype(np.int32) * 257), "TIFF"), grey(ROW)),
    "CMYK": (
        encoded(Image.new("CMYK", (4, 3), (255, 0, 255, 0)), "TIFF"),
        np.broadcast_to([0, 255, 0], (3, 4, 3)),
    ),
    "half over white": (encoded(Image.new("RGBA", (4, 3), (0, 0, 0, 128))), np.full((3, 4, 3), 127)),
    "first frame": (
        encoded(Image.new("L", (4, 3), 9), "GIF", save_all=True, append_images=[Image.new("L", (4, 3), 99)]),
        np.full((3, 4, 3), 9),
    ),
}


@pytest.mark.parametrize("name", PNGS)
def test_modes(name: str, tmp_path: Path):
    content, expected = PNGS[name]
    path = tmp_path / "image"
    path.write_bytes(content)
    for pixels in (read_image(content), read_image(path)):
        assert pixels.dtype == np.uint8
        assert pixels.flags["C_CONTIGUOUS"]
        np.testing.assert_array_equal(pixels, expected)


@pytest.mark.parametrize("at_once", [1, 8])
@pytest.mark.parametrize("name", PNGS)
def test_a_large_image_is_converted_row_by_row(name: str, at_once: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(images, "_AT_ONCE", at_once)
    content, expected = PNGS[name]
    np.testing.assert_array_equal(read_image(content), expected)


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGB", "RGBA", "I;16"])
def test_a_large_image_is_copied_once(mode: str):
    content = encoded(Image.new(mode, (1000, 1000)))
    read_image(content)
    tracemalloc.start()  # which sees Python's and NumPy's memory, not Pillow's
    try:
        pixels = read_image(content)
        assert tracemalloc.get_traced_memory()[1] < 1.3 * pixels.nbytes
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_cameras_orientation_is_applied(orientation: int):
    upright = stripes()
    flipped = {2: np.fliplr, 3: lambda p: np.rot90(p, 2), 4: np.flipud, 5: lambda p: np.swapaxes(p, 0, 1)}
    flipped |= {6: np.rot90, 7: lambda p: np.swapaxes(np.rot90(p, 2), 0, 1), 8: lambda p: np.rot90(p, 3)}
    stored = np.ascontiguousarray(flipped.get(orientation, lambda p: p)(upright))
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(Image.fromarray(stored), "JPEG", quality=95, subsampling=0, exif=exif)
    pixels = read_image(content)
    assert pixels.shape == upright.shape
    assert np.abs(pixels.astype(int) - upright).max() < 30
    assert pixels[8, 2, 0] > 150 > pixels[8, 20, 0]


def test_cmyk_and_grey_jpeg():
    cmyk = read_image(encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG"))
    np.testing.assert_allclose(cmyk, np.broadcast_to([255, 0, 0], (16, 16, 3)), atol=6)
    assert read_image(encoded(Image.new("L", (16, 16), 77), "JPEG"))[3, 3].tolist() == [77, 77, 77]


REFUSED = {
    "text": (b"a,b\n1,2\n", "cannot be read"),
    "empty": (b"", "cannot be read"),
    "truncated png": (
        encoded(Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)))[:-3000],
        "cannot",
    ),
    "truncated jpeg": (encoded(Image.fromarray(stripes()), "JPEG")[:-40], "truncated"),
    "float": (encoded(Image.new("F", (4, 3), 0.5), "TIFF"), "mode F"),
    "lab": (encoded(Image.new("LAB", (4, 3)), "TIFF"), "mode LAB"),
    "postscript": (encoded(Image.new("RGB", (4, 3)), "EPS"), "EPS"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_image_is_refused_by_name(name: str, tmp_path: Path):
    content, reason = REFUSED[name]
    path = tmp_path / "scan.png"
    path.write_bytes(content)
    with pytest.raises(PackageError, match=reason) as refused:
        read_image(path)
    assert str(path) in str(refused.value)
    assert "accepted" in str(refused.value)
    with pytest.raises(PackageError, match="the image"):
        read_image(content)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [12_000, 20_000], ids=["warned by Pillow", "refused by Pillow"])
def test_a_decompression_bomb_is_refused(side: int):
    bomb = encoded(Image.new("1", (side, side)))
    assert len(bomb) < 100_000
    with pytest.raises(PackageError, match="pixels"):
        read_image(bomb)


def test_memory_that_is_out_is_no_fault_of_the_file(monkeypatch: pytest.MonkeyPatch):
    def full(*arguments: object) -> None:
        raise MemoryError

    monkeypatch.setattr(Image, "open", full)
    with pytest.raises(MemoryError):
        read_image(b"")


def test_missing_files_and_folders(tmp_path: Path):
    with pytest.raises(PackageError, match="does not exist"):
        read_image(tmp_path / "absent.png")
    with pytest.raises(PackageError, match="cannot be read"):
        read_image(tmp_path)


def test_a_folder_stands_for_the_images_below_it(tmp_path: Path):
    names = ["b.PNG", "a/z.jpeg", "a/c.webp", "notes.txt", "report.pdf", "film.mpg", ".hidden.png", ".kept/d.png"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "folder.png").mkdir()
    assert image_files(tmp_path) == [tmp_path / name for name in ("a/c.webp", "a/z.jpeg", "b.PNG")]
    assert image_files(tmp_path / "notes.txt") == [tmp_path / "notes.txt"]  # as it was asked for
    with pytest.raises(PackageError, match=r"the folder .*folder\.png holds no images; give the path of .* a folder"):
        image_files(tmp_path / "folder.png")
