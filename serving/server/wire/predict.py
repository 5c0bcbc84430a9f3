"""`POST /v1/predict`: an encoded image in, a label and probabilities out."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headstart.serving.server.errors import ServeError, bad_request, not_found, unavailable
from headstart.serving.server.interface import InferenceService
from headstart.serving.server.wire.bodies import only_file
from headstart.serving.server.wire.encoded import ENCODED
from headstart.serving.server.wire.protocol import InferResponse

MEDIA_TYPES = ("image/jpeg", "image/png", "multipart/form-data")


def uploaded(content_type: str, body: memoryview) -> NDArray[Any]:
    """The file in a request's body, as the input `ENCODED` has it: BYTES [1].

    Raises:
        ServeError: 400 or 415.
    """
    media = content_type.partition(";")[0].strip().lower()
    if media not in MEDIA_TYPES:
        raise ServeError(
            415,
            f"Content-Type {content_type[:80]!r} is not known here; accepted: {', '.join(MEDIA_TYPES)}",
            grpc="INVALID_ARGUMENT",
        )
    data = only_file(content_type, body) if media == "multipart/form-data" else bytes(body)
    files = np.empty(1, dtype=object)
    files[0] = data
    return files


def only_model(service: InferenceService) -> str:
    """The model that a request means which names none.

    One that is not ready is meant where it is the only one there is: whoever is asked for it says what is wrong.

    Raises:
        ServeError: 400 where there are several, 404 where there is none, 503 while not all have been looked at.
    """
    if not service.ready():
        raise unavailable("the server is not ready; try again")
    names = _names(service, ready=True) or _names(service, ready=False)
    if not names:
        raise not_found("there is no model; POST /v2/repository/index lists those that are")
    if len(names) > 1:
        raise bad_request(f"there are {len(names)} models: {', '.join(names)}; name one with ?model=NAME")
    return names[0]


def _names(service: InferenceService, *, ready: bool) -> list[str]:
    return sorted({str(row["name"]) for row in service.repository_index(ready)})


def check(metadata: Mapping[str, Any]) -> None:
    """See that a model takes image files and gives probabilities.

    Raises:
        ServeError: 400.
    """
    taken, given = ({one["name"] for one in metadata.get(side, ())} for side in ("inputs", "outputs"))
    if ENCODED not in taken or "probabilities" not in given:
        raise bad_request(
            f"model {metadata.get('name')!r} does not classify images; send tensors to /v2/models/{{name}}/infer"
        )


def prediction(response: InferResponse) -> dict[str, Any]:
    """The document that answers: `label`, its `probability`, and `probabilities` by label."""
    row, labels = response.outputs["probabilities"].reshape(-1).tolist(), response.labels
    names = labels if labels is not None and len(labels) == len(row) else [str(index) for index in range(len(row))]
    best = max(range(len(row)), key=row.__getitem__)
    return {
        "model": response.model,
        "version": response.version,
        "label": names[best],
        "probability": row[best],
        "probabilities": dict(zip(names, row, strict=True)),
    }
