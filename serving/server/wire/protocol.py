"""The Open Inference Protocol v2 as data: what a request asks, what a model answered, and the body of an answer.

Pure functions, no I/O. `decoding` reads the bodies of requests, `tensors` knows the datatypes.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from numpy.typing import NDArray

from headstart.serving.server.errors import ServeError, bad_request
from headstart.serving.server.remembered import Remembered
from headstart.serving.server.wire.tensors import DATATYPES, classify, datatype_of, to_binary, to_json

__all__ = ["DATATYPES", "InferRequest", "InferResponse", "Limits", "RequestedOutput"]
__all__ += ["ResponseEncoder", "datatype_of", "encode_response", "error_body"]

LONGEST_NAME = 128
"""Characters of a model's name, and of a version, that a request may ask for: they go into logs and traces."""
_compact = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a request may ask for, checked before anything is allocated."""

    max_tensors: int = 64
    """Inputs, outputs or parameters in one request."""
    max_rank: int = 16
    """Dimensions of a tensor."""
    max_elements: int = 1 << 28
    """Elements of a numeric tensor."""
    max_strings: int = 1 << 18
    """Elements of a BYTES tensor, each of which is an object in memory."""
    max_json_bytes: int = 8 << 20
    """Bytes of JSON, which take up to twenty times as much memory when read."""
    max_image_bytes: int = 16 << 20
    """Bytes of an encoded image."""
    max_pixels: int = 25_000_000
    """Pixels of all encoded images of a request, checked before one is decoded."""


class RequestedOutput(NamedTuple):
    """An output that a request names."""

    name: str
    """Its name in the model."""
    binary: bool
    """Whether it comes back as bytes after the JSON rather than in it."""
    classification: int = 0
    """How many of the largest scores to return as `score:index:label`; 0 is the tensor itself."""


@dataclass(kw_only=True, slots=True)
class InferRequest:
    """An inference request, whatever brought it."""

    model: str
    """Name of the model."""
    version: str | None = None
    """Version asked for; None leaves it to the server."""
    id: str = ""
    """The client's own name of the request, echoed in the response."""
    inputs: dict[str, NDArray[Any]]
    """Arrays by the inputs' names, as `DATATYPES` types them."""
    outputs: tuple[RequestedOutput, ...] | None = None
    """The outputs asked for; None is all."""
    parameters: dict[str, Any] = field(default_factory=dict)
    """What else the client said: strings, numbers and booleans."""
    deadline: float | None = None
    """When the client stops waiting, in seconds of `time.monotonic`; None is never."""
    priority: int = 0
    """Larger goes first."""
    alone: bool = False
    """Whether its client is the only one, whom a model that holds up the event loop keeps waiting in any case."""
    cancelled: bool = False
    """Set by `cancel` when the client has gone."""
    request_id: str = ""
    """The transport's name of the request, for the log."""
    parts: tuple["InferRequest", ...] = ()
    """What it was split into, where it was."""
    part: bool = False
    """Whether it is of the `parts` of another, which is counted in its place."""

    def cancel(self) -> None:
        """Drop the work: nobody waits for it."""
        for one in (self, *self.parts):
            one.cancelled = True


@dataclass(kw_only=True, slots=True)
class InferResponse:
    """What a model answered."""

    model: str
    """Name of the model."""
    version: str
    """Version that ran."""
    id: str = ""
    """The request's."""
    outputs: dict[str, NDArray[Any]]
    """Arrays by the outputs' names."""
    parameters: dict[str, Any] = field(default_factory=dict)
    """What else the server says: strings, numbers and booleans."""
    timings_ns: dict[str, int] = field(default_factory=dict)
    """Nanoseconds by stage: `queue`, `compute`, and before them `images`, where files were decoded."""
    labels: Sequence[str] | None = None
    """Class names of the model that answered, in the order of its outputs' columns, where it has them."""


def output_of(response: InferResponse, wanted: RequestedOutput, label: Callable[[int], str | None]) -> NDArray[Any]:
    """A requested output, of any shape and type, or its classes where those are asked for.

    Raises:
        ServeError: 400, for an output that the model lacks, or one that has no scores to classify by.
    """
    array = response.outputs.get(wanted.name)
    if array is None:
        known = ", ".join(response.outputs)
        raise bad_request(f"model {response.model!r} has no output {wanted.name!r}; it has {known}")
    return classify(wanted.name, array, wanted.classification, label) if wanted.classification else array


def encode_response(
    response: InferResponse,
    requested: Sequence[RequestedOutput] | None,
    binary: bool,
    label: Callable[[int], str | None] = lambda index: None,
) -> tuple[list[bytes | memoryview], int | None]:
    """A response to the parts of a body.

    Args:
        response: what the model answered.
        requested: the outputs to return, in this order; None is all.
        binary: whether outputs come back as bytes where `requested` is None.
        label: the label of a class, for the classification extension.

    Returns:
        the body's parts, JSON first, and the length of the JSON, or None where it is all there is.

    Raises:
        ServeError: 400, for an output that the model lacks or that JSON cannot carry.
    """
    if requested is None:
        requested = [RequestedOutput(name=name, binary=binary) for name in response.outputs]
    # Written out: all of this takes 4.4 us for one output, where the encoder takes 5.2 us for the document alone.
    outputs: list[str] = []
    parts: list[bytes | memoryview] = [b""]
    for wanted in requested:
        array = output_of(response, wanted, label)
        if wanted.binary:
            data = to_binary(array)
            content = f'"parameters":{{"binary_data_size":{len(data)}}}'
            parts.append(data)
        else:
            content = f'"data":{to_json(wanted.name, array).decode()}'
        shape = ",".join(map(str, array.shape))
        outputs.append(
            f'{{"name":{_compact(wanted.name)},"datatype":"{datatype_of(array.dtype)}","shape":[{shape}],{content}}}'
        )
    beside = f'"id":{_compact(response.id)},' if response.id else ""
    if response.parameters:
        beside += f'"parameters":{_compact(response.parameters)},'
    parts[0] = head = (
        f'{{"model_name":{_compact(response.model)},"model_version":{_compact(response.version)},{beside}'
        f'"outputs":[{",".join(outputs)}]}}'
    ).encode()
    return parts, len(head) if len(parts) > 1 else None


class ResponseEncoder:
    """`encode_response`; the JSON of answers that are all binary is remembered, which is the same for one shape."""

    def __init__(self) -> None:
        self._remembered: Remembered[Any, tuple[bytes, list[str]]] = Remembered()

    def encode(
        self,
        response: InferResponse,
        requested: tuple[RequestedOutput, ...] | None,
        binary: bool,
        label: Callable[[int], str | None],
    ) -> tuple[list[bytes | memoryview], int | None]:
        """As `encode_response`."""
        if response.id or response.parameters:
            return encode_response(response, requested, binary, label)
        outputs = response.outputs
        tensors = tuple([(name, datatype_of(array.dtype), array.shape) for name, array in outputs.items()])
        key = (response.model, response.version, requested, binary, tensors)
        remembered = self._remembered.get(key)
        if remembered is not None:
            head, names = remembered
            return [head, *[to_binary(outputs[name]) for name in names]], len(head)
        parts, length = encode_response(response, requested, binary, label)
        wanted = [RequestedOutput(name, binary) for name in outputs] if requested is None else requested
        if wanted and all(_is_plain(one, outputs[one.name]) for one in wanted):
            self._remembered[key] = bytes(parts[0]), [one.name for one in wanted]
        return parts, length


def _is_plain(wanted: RequestedOutput, array: NDArray[Any]) -> bool:
    """Whether shape and type tell all that the JSON says of an output."""
    return wanted.binary and not wanted.classification and array.dtype.kind not in "OSU"


def error_body(error: ServeError) -> bytes:
    """`{"error": "..."}`, the protocol's form of every refusal."""
    return _compact({"error": error.message}).encode()
