"""The body of an inference request to arrays: JSON, or JSON followed by the tensors' bytes.

Pure functions, no I/O. Everything is checked before anything is allocated for it; what a client got wrong
raises `ServeError`, and so does what is beyond the limits.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from headstart.serving.server.errors import ServeError, bad_request, too_large
from headstart.serving.server.remembered import Remembered
from headstart.serving.server.wire.documents import parse_json, parse_quickly
from headstart.serving.server.wire.protocol import DATATYPES, InferRequest, Limits, RequestedOutput
from headstart.serving.server.wire.tensors import from_binary, from_json

HIGHEST_PRIORITY = 100
_SHORT = 2048
_SCALARS = (str, bool, int, float)
_SHARED_MEMORY = "shared memory is not supported; send the tensor in the body"


@dataclass(frozen=True, kw_only=True, slots=True)
class InferInput:
    """An input as its JSON describes it, checked."""

    name: str
    """Its name in the model."""
    datatype: str
    """A key of `DATATYPES`."""
    shape: tuple[int, ...]
    """Sizes, each at least 0."""
    size: int | None
    """Its bytes after the JSON, or None where `data` holds it."""
    data: Any
    """Its JSON data, or the numbers of it as one array."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RequestPlan:
    """All that the JSON of a request says."""

    id: str
    inputs: tuple[InferInput, ...]
    outputs: tuple[RequestedOutput, ...] | None
    binary: bool
    parameters: dict[str, Any]
    timeout: float | None
    priority: int
    size: int

    def request(self, model: str, version: str | None, inputs: dict[str, NDArray[Any]]) -> InferRequest:
        """The request that this plan and its arrays are; its time runs from now on."""
        return InferRequest(
            model=model,
            version=version,
            id=self.id,
            inputs=inputs,
            outputs=self.outputs,
            parameters=dict(self.parameters),
            deadline=None if self.timeout is None else time.monotonic() + self.timeout,
            priority=self.priority,
        )


class RequestDecoder:
    """Reads bodies of inference requests.

        request, binary = RequestDecoder(Limits()).decode(body, header_length, model="cat", version=None)

    Clients that send one shape send the same JSON with every request, so the reading of a short one without
    data and id is remembered by its bytes. All else is read quickly; what cannot be, or is then refused, is read again
    by Python's json, whose word counts.

    Args:
        limits: refused beyond.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._remembered: Remembered[bytes, RequestPlan] = Remembered()

    def decode(
        self, body: memoryview, header_length: int | None, *, model: str, version: str | None
    ) -> tuple[InferRequest, bool]:
        """A body to a request.

        Args:
            body: all of it, uncompressed.
            header_length: bytes of JSON at its start; None where it is JSON alone.
            model: name in the path.
            version: version in the path.

        Returns:
            the request, whose arrays are views of `body`, and whether outputs that it does not name come back
            as bytes.

        Raises:
            ServeError: 400 or 413.
        """
        total = len(body)
        length = total if header_length is None else header_length
        if length > total:
            raise bad_request(f"Inference-Header-Content-Length is {length}, the body has {total} bytes")
        if length > self.limits.max_json_bytes:
            raise too_large(
                f"the request has {length} bytes of JSON; accepted: {self.limits.max_json_bytes}. "
                "Send tensors with the binary extension"
            )
        key = bytes(body[:length]) if length <= _SHORT else b""
        try:
            plan, arrays = self._read(parse_quickly, key, body, length)
        except (ServeError, ValueError):
            plan = None
        if plan is None:  # no earlier: while an exception is handled, all that the first reading made is kept
            plan, arrays = self._read(parse_json, key, body, length)
        return plan.request(model, version, arrays), plan.binary

    def _read(
        self, read: Callable[[memoryview], dict[str, Any]], key: bytes, body: memoryview, length: int
    ) -> tuple[RequestPlan, dict[str, NDArray[Any]]]:
        """What a body asks, and its arrays; `key` is its JSON where that is short."""
        plan = self._remembered.get(key)
        if plan is None:
            plan = read_plan(read(body[:length]), self.limits)
            if key and not plan.id and all(tensor.size is not None for tensor in plan.inputs):
                self._remembered[key] = plan
        if plan.size != len(body) - length:
            raise bad_request(
                f"the inputs declare {plan.size} bytes of binary data, {len(body) - length} follow the JSON; "
                "send Inference-Header-Content-Length and every binary_data_size as they are"
            )
        arrays: dict[str, NDArray[Any]] = {}
        offset = length
        for tensor in plan.inputs:
            if tensor.size is None:
                arrays[tensor.name] = from_json(tensor.name, tensor.datatype, tensor.shape, tensor.data)
            else:
                arrays[tensor.name] = from_binary(tensor.name, tensor.datatype, tensor.shape, body, offset, tensor.size)
                offset += tensor.size
        return plan, arrays


def read_plan(document: dict[str, Any], limits: Limits) -> RequestPlan:
    """What a request asks, checked; gRPC's requests come here in the form of the JSON.

    Raises:
        ServeError: 400.
    """
    request_id = document.get("id", "")
    if type(request_id) is not str or len(request_id) > 1024:
        raise bad_request("id is not a string of at most 1024 characters")
    parameters = read_parameters(document, "the request", limits)
    binary = _flag(parameters, "binary_data_output", False)
    timeout = parameters.pop("timeout", None)
    if timeout is not None and (type(timeout) is not int or not 0 <= timeout < 1 << 63):
        raise bad_request("parameter timeout is not a whole number of microseconds from 0 to 9223372036854775807")
    priority = parameters.pop("priority", 0)
    if type(priority) is not int or priority < 0:
        raise bad_request("parameter priority is not a whole number, 0 or more")
    inputs = tuple(_read_input(item, limits) for item in _items(document, "inputs", limits))
    outputs = None
    if document.get("outputs") not in (None, []):
        outputs = tuple(_read_output(item, binary, limits) for item in _items(document, "outputs", limits))
    for what, names in (("inputs", [one.name for one in inputs]), ("outputs", [one.name for one in outputs or ()])):
        if len(set(names)) != len(names):
            raise bad_request(f"{what} names {next(n for n in names if names.count(n) > 1)!r} twice")
    return RequestPlan(
        id=request_id,
        inputs=inputs,
        outputs=outputs,
        binary=binary,
        parameters=parameters,
        timeout=timeout / 1e6 if timeout else None,
        # Triton's 1 goes first and 0 is a model's default; ours is larger first.
        priority=max(0, HIGHEST_PRIORITY + 1 - priority) if priority else 0,
        size=sum(one.size or 0 for one in inputs),
    )


def _read_input(item: Any, limits: Limits) -> InferInput:
    name = _name(item, "inputs")
    datatype, shape = item.get("datatype"), item.get("shape")
    if type(datatype) is not str or datatype not in DATATYPES:
        raise bad_request(f"input {name!r} has datatype {_short(datatype)}; accepted: {', '.join(DATATYPES)}")
    if type(shape) is not list or any(type(size) is not int or size < 0 for size in shape):
        raise bad_request(f"input {name!r} has shape {_short(shape)}; accepted: a list of whole numbers, 0 or more")
    if len(shape) > limits.max_rank:
        raise bad_request(f"input {name!r} has {len(shape)} dimensions; accepted: {limits.max_rank}")
    most = limits.max_strings if datatype == "BYTES" else limits.max_elements
    if math.prod(size for size in shape if size) > most:
        raise bad_request(f"input {name!r} has shape {shape}; accepted: {most} elements")
    parameters = read_parameters(item, f"input {name!r}", limits)
    if "shared_memory_region" in parameters:
        raise bad_request(f"input {name!r}: {_SHARED_MEMORY}")
    size = parameters.get("binary_data_size")
    if size is None:
        if "data" not in item:
            raise bad_request(f"input {name!r} has neither data nor the parameter binary_data_size")
    else:
        if "data" in item:
            raise bad_request(f"input {name!r} has both data and the parameter binary_data_size; send one")
        if type(size) is not int or size < 0:
            raise bad_request(f"input {name!r} has binary_data_size {_short(size)}; accepted: a whole number")
        expected = math.prod(shape) * DATATYPES[datatype].itemsize
        if datatype != "BYTES" and size != expected:
            raise bad_request(
                f"input {name!r} has binary_data_size {size}; {datatype} of shape {shape} has {expected} bytes"
            )
        if datatype == "BYTES" and size < 4 * math.prod(shape):
            raise bad_request(
                f"input {name!r} has binary_data_size {size}; BYTES of shape {shape} has at least "
                f"{4 * math.prod(shape)} bytes"
            )
    return InferInput(name=name, datatype=datatype, shape=tuple(shape), size=size, data=item.get("data"))


def _read_output(item: Any, binary: bool, limits: Limits) -> RequestedOutput:
    name = _name(item, "outputs")
    parameters = read_parameters(item, f"output {name!r}", limits)
    if "shared_memory_region" in parameters:
        raise bad_request(f"output {name!r}: {_SHARED_MEMORY}")
    count = parameters.get("classification", 0)
    if type(count) is not int or count < 0:
        raise bad_request(f"output {name!r} has classification {_short(count)}; accepted: a whole number")
    return RequestedOutput(name=name, binary=_flag(parameters, "binary_data", binary), classification=count)


def _items(document: dict[str, Any], key: str, limits: Limits) -> list[Any]:
    items = document.get(key)
    if type(items) is not list or not items:
        raise bad_request(f"{key} is not a list of at least one tensor")
    if len(items) > limits.max_tensors:
        raise bad_request(f"{key} has {len(items)} tensors; accepted: {limits.max_tensors}")
    return items


def _name(item: Any, key: str) -> str:
    if type(item) is not dict:
        raise bad_request(f"{key} holds a {type(item).__name__}; accepted: objects")
    name = item.get("name")
    if type(name) is not str or not 0 < len(name) <= 256:
        raise bad_request(f"{key} holds an object whose name is not a string of 1 to 256 characters")
    return name


def read_parameters(document: dict[str, Any], owner: str, limits: Limits) -> dict[str, Any]:
    """The `parameters` of a request or a tensor: strings, booleans and finite numbers.

    Raises:
        ServeError: 400, naming `owner`.
    """
    parameters = document.get("parameters")
    if parameters is None:
        return {}
    if type(parameters) is not dict:
        raise bad_request(f"the parameters of {owner} are no object")
    if len(parameters) > limits.max_tensors:
        raise bad_request(f"{owner} has {len(parameters)} parameters; accepted: {limits.max_tensors}")
    for name, value in parameters.items():
        if not isinstance(value, _SCALARS) or (type(value) is float and not math.isfinite(value)):
            raise bad_request(f"parameter {_short(name)} of {owner} is not a string, a finite number or a boolean")
    return dict(parameters)


def _flag(parameters: dict[str, Any], name: str, default: bool) -> bool:
    value = parameters.pop(name, default)
    if type(value) is not bool:
        raise bad_request(f"parameter {name} is {_short(value)}; accepted: true, false")
    return value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
