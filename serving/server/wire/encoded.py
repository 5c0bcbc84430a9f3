"""JPEG and PNG files in the place of pixels: a model that takes images also takes the input `encoded_images`."""

import asyncio
import base64
import binascii
import io
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from time import perf_counter_ns
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from headstart.serving.errors import PackageError
from headstart.serving.images import read_image
from headstart.serving.manifest import Tensor
from headstart.serving.server.errors import bad_request, too_large, too_many, unavailable
from headstart.serving.server.wire.protocol import InferRequest, InferResponse, Limits

T = TypeVar("T")

ENCODED = "encoded_images"
"""BYTES [N]: files, decoded by the server; in JSON, whose strings carry no bytes, each in base64."""
FORMATS = ("JPEG", "PNG")
_FIRST_BYTES = (b"\xff", b"\x89")  # of JPEG and PNG; no text in UTF-8 begins with one of them
_SMALL_BYTES, _SMALL_PIXELS = 1 << 15, 1 << 16
_FEW = 32
_CHUNKS = {b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"gAMA", b"cHRM", b"sRGB", b"sBIT", b"bKGD", b"pHYs", b"tIME"}
_SEGMENTS = {b"\xff\xe0", b"\xff\xdb", b"\xff\xc4", b"\xff\xc0", b"\xff\xc1", b"\xff\xc2", b"\xff\xdd"}
"""What a PNG or JPEG of pixels alone consists of: no text, profile or EXIF, that inflates or is read bit by bit."""
_SCAN = b"\xff\xda"  # marks one of a progressive JPEG; nowhere else in its coded data, which has 0 behind 255
_MOST_SCANS = 32  # common are 10; 42 bytes for one more cost 75 ms at 25 million pixels, without end
_THREADS = 2
_MOST_WAITING = 64
_MOST_HELD = 512 << 20
"""Bytes of the pixels of all requests, 3 for each; one that waits for a thread is counted as what it will hold.

Beside them each thread takes up to 9 more for a pixel of what it decodes, 450 MB in all: CMYK 9, RGBA and progressive
RGB 7, grey and palettes 3, measured at 25 million pixels."""
_NO_IMAGE = "cannot be decoded; accepted: an undamaged JPEG or PNG"


def pixels_input(inputs: Sequence[Tensor]) -> str | None:
    """The name of the input that files stand in for: a model's only one, uint8 [batch, height, width, 3]; or None."""
    if len(inputs) == 1 and inputs[0].dtype == "uint8" and len(inputs[0].shape) == 4 and inputs[0].shape[3] == 3:
        return inputs[0].name
    return None


class ImageDecoder:
    """Decodes files in threads, within limits on bytes, pixels and what is held at once.

        decoder = ImageDecoder(Limits())
        if ENCODED in request.inputs:
            response = await decoder.infer(request, "images", most=16, run=run)

    Args:
        limits: `max_image_bytes` of each file, `max_pixels` of all that one request brings.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="decode")
        self._waiting = 0
        self._held = 0

    def close(self) -> None:
        """Let go of the threads."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def infer(
        self,
        request: InferRequest,
        name: str,
        most: int,
        run: Callable[[tuple[InferRequest, ...]], list["InferResponse | asyncio.Future[InferResponse]"]],
    ) -> InferResponse:
        """Answer a request whose only input is `ENCODED`.

        Args:
            request: is given its `parts`, one for each size of image, which are cancelled with it.
            name: the model's input, of which files of one size become uint8 [n, height, width, 3].
            most: files in one request.
            run: starts the parts, all of one version.

        Returns:
            the model's answer, with a row for each file in the order of the request, and in its timings the stage
            `images`: until the files were decoded.

        Raises:
            ServeError: 400: no files, too many, one that is no undamaged JPEG or PNG, or outputs that cannot be put
                together; 413: beyond a limit on bytes or pixels; 429, 503: others wait or hold the memory; and what
                `run` raises.
            CancelledError: the client had gone when the files were decoded.
        """
        began = perf_counter_ns()
        files = self._files(request, most)
        at_once = len(files) == 1 and _is_simple(files[0])
        pixels = _count(files) if at_once else await self._apart(_count, files)
        if pixels > self._limits.max_pixels:
            raise too_large(f"the images have {pixels} pixels; accepted: {self._limits.max_pixels}")
        if self._held + 3 * pixels > _MOST_HELD:
            raise unavailable("the images of other requests fill the memory that they may take")
        self._held += 3 * pixels
        try:
            if at_once and pixels <= _SMALL_PIXELS:  # about a millisecond: a thread would not pay
                batches = _decode(files, request)
            else:
                batches = await self._apart(_decode, files, request)
            if request.cancelled:
                raise asyncio.CancelledError  # as a scheduler drops what nobody waits for
            groups = [group for group, _ in batches]
            request.parts = tuple(replace(request, inputs={name: images}, part=True) for _, images in batches)
            decoded = perf_counter_ns()
            answers = run(request.parts)
            if waiting := [one for one in answers if isinstance(one, asyncio.Future)]:
                await asyncio.gather(*waiting)
            responses = [one.result() if isinstance(one, asyncio.Future) else one for one in answers]
            response = _together(responses, groups)
            response.timings_ns = {"images": decoded - began, **response.timings_ns}
            return response
        except BaseException:
            request.cancel()
            raise
        finally:
            self._held -= 3 * pixels

    def _files(self, request: InferRequest, most: int) -> list[bytes]:
        array = request.inputs[ENCODED]
        if len(request.inputs) > 1:
            other = next(name for name in request.inputs if name != ENCODED)
            raise bad_request(f"the request has {ENCODED!r} and {other[:80]!r}; send one of them")
        if array.dtype.kind != "O" or array.ndim != 1 or not array.size:
            kind = "BYTES" if array.dtype.kind == "O" else str(array.dtype)
            raise bad_request(f"{ENCODED!r} is {kind} {list(array.shape)}; accepted: BYTES [N] with a file in each")
        if array.size > most:
            raise bad_request(f"the request has {array.size} images; accepted: {most}; send several requests")
        files = [one if one[:1] in _FIRST_BYTES else _from_base64(one, index) for index, one in enumerate(array)]
        for index, data in enumerate(files):
            if len(data) > self._limits.max_image_bytes:
                raise too_large(f"image {index} has {len(data)} bytes; accepted: {self._limits.max_image_bytes}")
        return files

    async def _apart(self, function: Callable[..., T], *arguments: Any) -> T:
        if self._waiting >= _MOST_WAITING:
            raise too_many(f"the images of {_MOST_WAITING} requests wait to be decoded")
        self._waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._pool, function, *arguments)
        finally:
            self._waiting -= 1


def _from_base64(text: bytes, index: int) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise bad_request(f"image {index} {_NO_IMAGE}, which in JSON is base64") from None


def _is_simple(data: bytes) -> bool:
    """Whether a file is small and of few pieces, all as `_CHUNKS` or `_SEGMENTS` has them: reading it is short work."""
    is_png = data.startswith(_FIRST_BYTES[1])
    place = 8 if is_png else 2
    for _ in range(_FEW if len(data) <= _SMALL_BYTES else 0):
        if is_png:
            kind, size = data[place + 4 : place + 8], 12 + int.from_bytes(data[place : place + 4])
        else:
            kind, size = data[place : place + 2], 2 + int.from_bytes(data[place + 2 : place + 4])
        if kind in (b"IEND", _SCAN):
            return True
        if kind not in (_CHUNKS if is_png else _SEGMENTS) or size < 4:
            return False
        place += size
    return False


def _count(files: list[bytes]) -> int:
    """The pixels that files say they have; none is decoded."""
    return sum(_num_pixels(data, index) for index, data in enumerate(files))


def _num_pixels(data: bytes, index: int) -> int:
    if data.startswith(_FIRST_BYTES[0]) and data.count(_SCAN) > _MOST_SCANS:
        raise too_large(f"image {index} has more than {_MOST_SCANS} scans")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            return int(image.width * image.height)
    except MemoryError:
        raise
    except Image.DecompressionBombError:
        raise too_large(f"image {index} has more than {Image.MAX_IMAGE_PIXELS} pixels") from None
    # Hostile bytes make Pillow's readers raise nearly anything.
    except Exception:
        raise bad_request(f"image {index} {_NO_IMAGE}") from None


def _decode(files: list[bytes], request: InferRequest) -> list[tuple[list[int], NDArray[np.uint8]]]:
    """For each size of image the places of its files, and their pixels [n, H, W, 3]; ends where the client goes."""
    by_size: dict[tuple[int, ...], dict[int, NDArray[np.uint8]]] = {}
    for index, data in enumerate(files):
        if request.cancelled:
            break
        try:
            image = read_image(data)
        except PackageError:
            raise bad_request(f"image {index} {_NO_IMAGE}") from None
        by_size.setdefault(image.shape, {})[index] = image
    return [(list(group), _stacked(list(group.values()))) for group in by_size.values()]


def _stacked(images: list[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    """Images of one size to [n, H, W, 3]; one alone is not copied."""
    return np.stack(images) if len(images) > 1 else images[0][None]


def _together(responses: list[InferResponse], groups: list[list[int]]) -> InferResponse:
    """The rows of several responses, each for the places of its group."""
    first = responses[0]
    if len(responses) == 1:
        return first
    outputs = {}
    for name, array in first.outputs.items():
        whole = np.empty((sum(map(len, groups)), *array.shape[1:]), array.dtype)
        for response, group in zip(responses, groups, strict=True):
            part = response.outputs[name]
            if part.shape != (len(group), *array.shape[1:]):
                raise bad_request(
                    f"the output {name!r} has no row of one size for each image; send those of one size in a request"
                )
            whole[group] = part
        outputs[name] = whole
    longest = max((one.timings_ns for one in responses), key=lambda timings: sum(timings.values()))
    return replace(first, outputs=outputs, timings_ns=longest)
