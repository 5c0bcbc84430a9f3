"""`POST /v1/predict`: an encoded image in, a label and probabilities out."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from headstart.serving.errors import PackageError
from headstart.serving.images import read_image
from headstart.serving.server.bodies import only_file
from headstart.serving.server.errors import ServeError, bad_request, not_found, too_large
from headstart.serving.server.interface import InferenceService
from headstart.serving.server.protocol import InferResponse

FORMATS = ("JPEG", "PNG")
MEDIA_TYPES = ("image/jpeg", "image/png", "multipart/form-data")
_SMALL_BYTES, _SMALL_PIXELS = 1 << 15, 1 << 16
_NO_IMAGE = "the image cannot be decoded; accepted: an undamaged JPEG or PNG"


def uploaded(content_type: str, body: memoryview, max_bytes: int) -> bytes:
    """The encoded image in a request's body.

    Raises:
        ServeError: 400, 413 or 415.
    """
    media = content_type.partition(";")[0].strip().lower()
    if media not in MEDIA_TYPES:
        raise ServeError(
            415,
            f"Content-Type {content_type[:80]!r} is not known here; accepted: {', '.join(MEDIA_TYPES)}",
            grpc="INVALID_ARGUMENT",
        )
    data = only_file(content_type, body) if media == "multipart/form-data" else bytes(body)
    if len(data) > max_bytes:
        raise too_large(f"the image has {len(data)} bytes; accepted: {max_bytes}")
    return data


def num_pixels(data: bytes) -> int:
    """The pixels that an encoded image says it has; none is decoded.

    Raises:
        ServeError: 400 where it is neither JPEG nor PNG, 413 where Pillow takes it for a decompression bomb.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            return int(image.width * image.height)
    except MemoryError:
        raise
    except Image.DecompressionBombError:
        raise too_large(f"the image has more than {Image.MAX_IMAGE_PIXELS} pixels") from None
    # Hostile bytes make Pillow's readers raise nearly anything.
    except Exception:
        raise bad_request(_NO_IMAGE) from None


def is_small(data: bytes) -> bool:
    """Whether an image is decoded in about a millisecond, so that a thread would not pay."""
    return len(data) <= _SMALL_BYTES and num_pixels(data) <= _SMALL_PIXELS


def decode(data: bytes, max_pixels: int) -> NDArray[np.uint8]:
    """An encoded image to uint8 [1, H, W, 3]; its pixels are counted before any is decoded.

    Raises:
        ServeError: 400 where it is not an undamaged JPEG or PNG, 413 where it has more than `max_pixels`; in
            words that name nothing of the server.
    """
    if (pixels := num_pixels(data)) > max_pixels:
        raise too_large(f"the image has {pixels} pixels; accepted: {max_pixels}")
    try:
        return read_image(data)[None]
    except PackageError:
        raise bad_request(_NO_IMAGE) from None


def only_model(service: InferenceService) -> str:
    """The model that a request means which names none.

    Raises:
        ServeError: 400 where there are several, 404 where there is none.
    """
    names = sorted({str(row["name"]) for row in service.repository_index(True)})
    if not names:
        raise not_found("no model is ready")
    if len(names) > 1:
        raise bad_request(f"there are {len(names)} models: {', '.join(names)}; name one with ?model=NAME")
    return names[0]


def image_input(metadata: Mapping[str, Any]) -> str:
    """The name of the one input of a model that takes uint8 [N, H, W, 3].

    Raises:
        ServeError: 400, where the model takes something else or gives no `probabilities`.
    """
    inputs = metadata.get("inputs", [])
    if len(inputs) == 1 and inputs[0]["datatype"] == "UINT8":
        shape = [int(size) for size in inputs[0]["shape"]]
        named = {output["name"] for output in metadata.get("outputs", [])}
        if len(shape) == 4 and shape[3] in (-1, 3) and "probabilities" in named:
            return str(inputs[0]["name"])
    raise bad_request(
        f"model {metadata.get('name')!r} does not classify images; send tensors to /v2/models/{{name}}/infer"
    )


def prediction(response: InferResponse, labels: Sequence[str] | None) -> dict[str, Any]:
    """The document that answers: `label`, its `probability`, and `probabilities` by label."""
    row = response.outputs["probabilities"].reshape(-1).tolist()
    names = labels if labels is not None and len(labels) == len(row) else [str(index) for index in range(len(row))]
    best = max(range(len(row)), key=row.__getitem__)
    return {
        "model": response.model,
        "version": response.version,
        "label": names[best],
        "probability": row[best],
        "probabilities": dict(zip(names, row, strict=True)),
    }
