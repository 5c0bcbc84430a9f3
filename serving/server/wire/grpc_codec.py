"""gRPC's inference requests and responses, from and to the bytes of their messages.

Pure functions, no I/O. The tensors' bytes are cut out of a message before protobuf reads the rest: they are not
copied, what protobuf may allocate is bounded by what is left, and a rest that came before need not be read again.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from numpy.typing import NDArray

from headstart.serving.server.errors import bad_request, too_large
from headstart.serving.server.remembered import Remembered
from headstart.serving.server.wire.decoding import RequestPlan, read_plan
from headstart.serving.server.wire.grpc_messages import MESSAGES
from headstart.serving.server.wire.protocol import (
    LONGEST_NAME,
    InferRequest,
    InferResponse,
    Limits,
    RequestedOutput,
    output_of,
)
from headstart.serving.server.wire.tensors import datatype_of, from_binary, from_json, to_binary

_CONTENTS = {"BOOL": "bool_contents", "BYTES": "bytes_contents", "FP32": "fp32_contents", "FP64": "fp64_contents"}
_CONTENTS |= dict.fromkeys(("INT8", "INT16", "INT32"), "int_contents") | {"INT64": "int64_contents"}
_CONTENTS |= dict.fromkeys(("UINT8", "UINT16", "UINT32"), "uint_contents") | {"UINT64": "uint64_contents"}
_RAW_INPUT = 7 << 3 | 2
_RAW_OUTPUT = bytes([6 << 3 | 2])
_STREAMED = bytes([2 << 3 | 2])
_Plan = tuple[str, str | None, RequestPlan]


class GrpcDecoder:
    """Reads ModelInferRequest messages.

        request = GrpcDecoder(Limits()).decode(data)

    Args:
        limits: refused beyond; `max_json_bytes` bounds all of a message but its raw contents.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._remembered: Remembered[tuple[bytes, tuple[int, ...]], _Plan] = Remembered()

    def decode(self, data: bytes) -> InferRequest:
        """A message to a request, whose arrays are views of `data` where their alignment allows.

        Raises:
            ServeError: 400 or 413.
        """
        head, raws = split(data, self.limits)
        key = head, tuple(map(len, raws))
        known = self._remembered.get(key)
        model, version, plan = known or self._plan(head, raws)
        if known is None and len(head) <= 2048 and not plan.id and all(one.data is None for one in plan.inputs):
            self._remembered[key] = model, version, plan
        arrays: dict[str, NDArray[Any]] = {}
        for index, tensor in enumerate(plan.inputs):
            name, datatype, shape = tensor.name, tensor.datatype, tensor.shape
            if tensor.size is not None:
                arrays[name] = from_binary(name, datatype, shape, raws[index], 0, tensor.size)
            elif datatype == "BYTES":
                arrays[name] = _strings(name, shape, tensor.data)
            else:
                arrays[name] = from_json(name, datatype, shape, tensor.data)
        return plan.request(model, version, arrays)

    def _plan(self, head: bytes, raws: list[memoryview]) -> _Plan:
        message = parse("ModelInferRequest", head)
        asked = named(message.model_name, message.model_version)
        if raws and len(raws) != len(message.inputs):
            raise bad_request(
                f"raw_input_contents has {len(raws)} entries for {len(message.inputs)} inputs; accepted: one for each"
            )
        limits = self.limits
        inputs = [_input(tensor, len(raws[n]) if raws else None, limits) for n, tensor in enumerate(message.inputs)]
        document = {
            "id": message.id,
            "parameters": read_parameters(message, limits),
            "inputs": inputs,
            "outputs": [{"name": one.name, "parameters": read_parameters(one, limits)} for one in message.outputs],
        }
        return *asked, read_plan(document, limits)


def split(data: bytes, limits: Limits) -> tuple[bytes, list[memoryview]]:
    """A ModelInferRequest to its bytes without the raw contents, and these.

    Raises:
        ServeError: 400, where it is no protobuf message; 413, where the rest or the number of its fields is
            beyond the limits.
    """
    view = memoryview(data)
    end, offset, fields = len(data), 0, 0
    kept: list[memoryview] = []
    raws: list[memoryview] = []
    try:
        while offset < end:
            start = offset
            tag, offset = _varint(data, offset)
            size, offset = _varint(data, offset) if tag & 7 in (0, 2) else ({1: 8, 5: 4}[tag & 7], offset)
            stop = offset + size if tag & 7 != 0 else offset
            if stop > end:
                raise IndexError
            if tag == _RAW_INPUT:
                raws.append(view[offset:stop])
            else:
                kept.append(view[start:stop])
            offset = stop
            fields += 1
            if fields > 4 * limits.max_tensors + 8:
                raise too_large(f"the message has more than {4 * limits.max_tensors + 8} fields")
    except (IndexError, KeyError):
        raise bad_request("the message is no ModelInferRequest: its bytes end early or are damaged") from None
    head = b"".join(kept)
    if len(head) > limits.max_json_bytes:
        raise too_large(
            f"the message has {len(head)} bytes beside its raw contents; accepted: {limits.max_json_bytes}. "
            "Send tensors as raw_input_contents"
        )
    return head, raws


def _varint(data: bytes, offset: int) -> tuple[int, int]:
    """A number in protobuf's base 128, and where it ends; IndexError where it does not."""
    byte = data[offset]
    if byte < 128:
        return byte, offset + 1
    value, shift = byte & 127, 7
    while shift < 64:
        offset += 1
        byte = data[offset]
        value |= (byte & 127) << shift
        if byte < 128:
            return value, offset + 1
        shift += 7
    raise IndexError


def parse(name: str, data: bytes) -> Any:
    """Bytes to a message.

    Raises:
        ServeError: 400.
    """
    try:
        return MESSAGES[name].FromString(data)
    except DecodeError:
        raise bad_request(f"the message is no {name}: its bytes are damaged") from None


def named(model: str, version: str = "") -> tuple[str, str | None]:
    """The model and the version that a message asks for.

    Raises:
        ServeError: 400, where they are longer than HTTP's paths take them.
    """
    for what, text in (("name", model), ("version", version)):
        if len(text) > LONGEST_NAME:
            raise bad_request(f"the model's {what} has {len(text)} characters; accepted: {LONGEST_NAME}")
    return model, version or None


def read_parameters(message: Any, limits: Limits) -> dict[str, Any]:
    """The `parameters` of a message as Python's values; None where one holds nothing.

    Raises:
        ServeError: 400, where there are more than `max_tensors`, counted before any is turned into an object.
    """
    if not message.parameters:
        return {}
    if len(message.parameters) > limits.max_tensors:
        raise bad_request(f"the message has {len(message.parameters)} parameters; accepted: {limits.max_tensors}")
    chosen = ((name, value, value.WhichOneof("parameter_choice")) for name, value in message.parameters.items())
    return {name: getattr(value, kind) if kind else None for name, value, kind in chosen}


def _input(tensor: Any, size: int | None, limits: Limits) -> dict[str, Any]:
    """An input in the form of the JSON; `size` is that of its raw contents, None where it has none."""
    if len(tensor.shape) > limits.max_rank:
        raise bad_request(
            f"input {tensor.name[:256]!r} has {len(tensor.shape)} dimensions; accepted: {limits.max_rank}"
        )
    item: dict[str, Any] = {"name": tensor.name, "datatype": tensor.datatype, "shape": list(tensor.shape)}
    item["parameters"] = parameters = read_parameters(tensor, limits)
    parameters.pop("binary_data_size", None)
    given = [field.name for field, _ in tensor.contents.ListFields()] if tensor.HasField("contents") else []
    if size is not None:
        if given:
            raise bad_request(f"input {tensor.name[:256]!r} has both contents and raw_input_contents; send one")
        parameters["binary_data_size"] = size
        return item
    field = _CONTENTS.get(tensor.datatype)
    if field is None:
        if tensor.datatype in ("FP16", "BF16"):
            raise bad_request(f"input {tensor.name[:256]!r} is {tensor.datatype}; send it in raw_input_contents")
        return item | {"data": []}  # a datatype that is none, which the plan refuses by name
    if given not in ([], [field]):
        raise bad_request(
            f"input {tensor.name[:256]!r} has {', '.join(given)}; accepted for {tensor.datatype}: {field}"
        )
    return item | {"data": list(getattr(tensor.contents, field))}


def _strings(name: str, shape: tuple[int, ...], data: list[bytes]) -> NDArray[Any]:
    if len(data) != math.prod(shape):
        raise bad_request(
            f"input {name!r}: bytes_contents ({len(data)} elements) does not fit the shape {list(shape)}; "
            f"accepted: {math.prod(shape)} elements"
        )
    array = np.empty(len(data), dtype=object)
    array[:] = data
    return array.reshape(shape)


def encode(
    response: InferResponse, requested: tuple[RequestedOutput, ...] | None, label: Callable[[int], Any]
) -> bytes:
    """A response to a ModelInferResponse with raw contents.

    Args:
        response: what the model answered.
        requested: the outputs to return, in this order; None is all.
        label: the label of a class, for the classification extension.

    Raises:
        ServeError: 400, for an output that the model lacks.
    """
    if requested is None:
        requested = tuple(RequestedOutput(name=name, binary=True) for name in response.outputs)
    message = MESSAGES["ModelInferResponse"](model_name=response.model, model_version=response.version, id=response.id)
    for name, value in response.parameters.items():
        kind = {bool: "bool_param", int: "int64_param", float: "double_param"}.get(type(value), "string_param")
        setattr(message.parameters[name], kind, value)
    parts: list[bytes | memoryview] = [b""]
    for wanted in requested:
        array = output_of(response, wanted, label)
        message.outputs.add(name=wanted.name, datatype=datatype_of(array.dtype), shape=array.shape)
        data = to_binary(array)
        parts += (_RAW_OUTPUT, _write_varint(len(data)), data)
    parts[0] = message.SerializeToString()
    return b"".join(parts)


def streamed(response: bytes) -> bytes:
    """A ModelInferResponse as a ModelStreamInferResponse."""
    return b"".join((_STREAMED, _write_varint(len(response)), response))


def refused(message: str, request_id: str) -> bytes:
    """A ModelStreamInferResponse that refuses the request of this id."""
    kind = MESSAGES["ModelStreamInferResponse"]
    data: bytes = kind(error_message=message, infer_response={"id": request_id}).SerializeToString()
    return data


def _write_varint(value: int) -> bytes:
    digits = bytearray()
    while value > 127:
        digits.append(value & 127 | 128)
        value >>= 7
    digits.append(value)
    return bytes(digits)
