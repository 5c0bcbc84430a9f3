"""Tensors of the Open Inference Protocol as NumPy arrays: their datatypes, JSON data and little-endian bytes.

Every function here is pure. What a client sent and cannot be read raises `ServeError` with status 400.
"""

import json
import math
import struct
from collections.abc import Callable, Iterable
from itertools import chain, groupby
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from headstart.serving.server.errors import ServeError, bad_request

BFLOAT16 = np.dtype(np.uint16, metadata={"datatype": "BF16"})
"""The bits of bfloat16, which NumPy lacks; the mark goes with views, reshapes and copies, not with np.concatenate."""

DATATYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    "UINT8": np.dtype(np.uint8),
    "UINT16": np.dtype(np.uint16),
    "UINT32": np.dtype(np.uint32),
    "UINT64": np.dtype(np.uint64),
    "INT8": np.dtype(np.int8),
    "INT16": np.dtype(np.int16),
    "INT32": np.dtype(np.int32),
    "INT64": np.dtype(np.int64),
    "FP16": np.dtype(np.float16),
    "FP32": np.dtype(np.float32),
    "FP64": np.dtype(np.float64),
    "BF16": BFLOAT16,
    "BYTES": np.dtype(object),
}
"""NumPy's type of each datatype of the protocol; BYTES are arrays of Python `bytes`."""

_NAMES = {dtype: name for name, dtype in DATATYPES.items() if name != "BF16"}
_JSON_TYPES: dict[str, tuple[set[type], str]] = {
    "b": ({bool}, "true and false"),
    "u": ({int}, "whole numbers"),
    "i": ({int}, "whole numbers"),
    "f": ({int, float}, "numbers"),
    "O": ({str}, "strings"),
}
_LENGTH = struct.Struct("<I")
_MOST_SCORES, _MOST_CLASSES = 1 << 20, 1 << 16  # sorted and written while nobody else is served, in .1 s each


def datatype_of(dtype: np.dtype[Any]) -> str:
    """The protocol's name of a NumPy type: `FP32` for float32; strings of any kind are BYTES.

    Raises:
        ValueError: the protocol has no name for it (complex numbers, dates).
    """
    if dtype.metadata and "datatype" in dtype.metadata:
        return str(dtype.metadata["datatype"])
    if dtype.kind in "SU":
        return "BYTES"
    try:
        return _NAMES[dtype]
    except KeyError:
        raise ValueError(f"the protocol has no datatype for {dtype}; it has {', '.join(DATATYPES)}") from None


def from_json(name: str, datatype: str, shape: tuple[int, ...], data: Any) -> NDArray[Any]:
    """JSON data, flat or nested like `shape`, to an array of `shape`.

    `data`: lists, or the array of all of its numbers that `documents.parse_quickly` made of them.

    Whole numbers are not taken for booleans nor fractions for whole numbers; a number beyond the datatype's
    range is refused and not wrapped. NaN and Infinity, which Python's and Triton's clients write, are accepted
    in floating datatypes.

    Raises:
        ServeError: 400, with the input's name.
    """
    dtype = DATATYPES[datatype]
    if datatype == "BF16":
        raise bad_request(f"input {name!r} is BF16, which JSON cannot carry; send it with the binary extension")
    if type(data) is np.ndarray:
        return _narrowed(name, datatype, data).reshape(shape)
    flat = _flatten(name, shape, data)
    accepted, words = _JSON_TYPES[dtype.kind]
    if strange := _types(flat, mixed=dtype.kind == "f") - accepted:
        found = ", ".join(sorted(kind.__name__ for kind in strange))
        raise bad_request(f"input {name!r} is {datatype} and its data holds {found}; accepted: {words}")
    try:
        if dtype.kind == "O":
            array = np.empty(len(flat), dtype=object)
            array[:] = [text.encode() for text in flat]
        elif dtype == np.uint8:
            array = np.frombuffer(bytes(flat), np.uint8)  # in a third of the time of np.array
        else:
            with np.errstate(over="raise"):
                array = np.array(flat, dtype=dtype)
    except UnicodeEncodeError:
        raise bad_request(f"input {name!r} holds a string that is not Unicode text (a lone surrogate)") from None
    except (ValueError, OverflowError, FloatingPointError):
        raise _beyond(name, datatype) from None
    return array.reshape(shape)


def _narrowed(name: str, datatype: str, numbers: NDArray[Any]) -> NDArray[Any]:
    """Numbers of the widest type of their kind in that of a datatype, or the refusal of one that it has not."""
    try:
        with np.errstate(over="raise"):
            array = numbers.astype(DATATYPES[datatype], copy=False)
    except FloatingPointError:
        raise _beyond(name, datatype) from None
    if array.dtype.kind != "f" and not np.array_equal(array, numbers):
        raise _beyond(name, datatype)
    return array


def _beyond(name: str, datatype: str) -> ServeError:
    return bad_request(f"input {name!r} holds a number beyond the range of {datatype}")


def _flatten(name: str, shape: tuple[int, ...], data: Any) -> list[Any]:
    """The elements of `data` in row-major order."""
    count = math.prod(shape)
    if type(data) is not list:
        raise bad_request(f"input {name!r}: data is {type(data).__name__}; accepted: a list")
    if len(data) == count and (not data or type(data[0]) is not list):
        return data
    level: list[Any] = [data]
    for size in shape:
        if _types(level) - {list} or {length for length, _ in groupby(level, len)} - {size}:
            found = len(data) if len(shape) == 1 or type(data[0] if data else None) is not list else "nested"
            raise bad_request(
                f"input {name!r}: data ({found} elements) does not fit the shape {list(shape)}; "
                f"accepted: {count} elements in one list, or lists nested like the shape"
            )
        level = list(chain.from_iterable(level))
    return level


def _types(items: Iterable[Any], *, mixed: bool = False) -> set[type]:
    """The types of some objects: where they are not mixed, groups are found in half the time that a set needs."""
    return set(map(type, items)) if mixed else {kind for kind, _ in groupby(items, type)}


def from_binary(
    name: str, datatype: str, shape: tuple[int, ...], body: memoryview, offset: int, size: int
) -> NDArray[Any]:
    """`size` bytes of a body from `offset` on, little-endian and row-major, to an array of `shape`.

    Numeric arrays are views of `body`, copied only where their offset breaks the type's alignment.

    Raises:
        ServeError: 400; the caller has checked that `size` is that of the shape and lies within the body.
    """
    if datatype == "BYTES":
        return _decode_bytes(name, body[offset : offset + size], math.prod(shape)).reshape(shape)
    dtype = DATATYPES[datatype]
    if size == 0:
        return np.empty(shape, dtype)
    array = np.frombuffer(body, dtype, size // dtype.itemsize, offset)
    if datatype == "BOOL" and body[offset : offset + size].tobytes().strip(b"\0\1"):
        raise bad_request(f"input {name!r} is BOOL and holds a byte that is neither 0 nor 1")
    if not array.flags.aligned:
        array = array.copy()
    return array.reshape(shape)


def _decode_bytes(name: str, view: memoryview, count: int) -> NDArray[Any]:
    """Elements of 4 bytes of length, then that many bytes, to an object array [count]."""
    array = np.empty(count, dtype=object)
    offset, end = 0, len(view)
    for index in range(count):
        if end - offset < 4:
            raise bad_request(f"input {name!r}: its bytes end in element {index}; its shape has {count}")
        (length,) = _LENGTH.unpack_from(view, offset)
        offset += 4
        if end - offset < length:
            raise bad_request(f"input {name!r}: element {index} says {length} bytes, {end - offset} are left")
        array[index] = view[offset : offset + length].tobytes()
        offset += length
    if offset != end:
        raise bad_request(f"input {name!r}: {end - offset} bytes are left after its {count} elements")
    return array


def to_json(name: str, array: NDArray[Any]) -> bytes:
    """The elements of an output in row-major order, as a list in JSON.

    Floats are written as float64, the shortest digits of which are read back exactly whatever a client makes of them:
    those of float32 are not where a float64 is read and then rounded.

    Raises:
        ServeError: 400, where JSON has no word for an element and the client must ask for binary data.
    """
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise _not_in_json(name, "holds NaN or infinite numbers")
    datatype = datatype_of(array.dtype)
    if datatype == "BF16":
        raise _not_in_json(name, "is BF16")
    if datatype != "BYTES":
        flat = array.ravel()
        if array.dtype.kind == "f":
            flat = flat.astype(np.float64, copy=False)
        return orjson.dumps(flat, option=orjson.OPT_SERIALIZE_NUMPY)
    try:
        texts = [text.decode() if isinstance(text, bytes) else str(text) for text in array.ravel().tolist()]
    except UnicodeDecodeError:
        raise _not_in_json(name, "holds bytes that are not UTF-8") from None
    return json.dumps(texts, separators=(",", ":")).encode()


def _not_in_json(name: str, what: str) -> ServeError:
    return bad_request(f"output {name!r} {what}, which JSON cannot carry; ask for it with binary_data: true")


def to_binary(array: NDArray[Any]) -> bytes | memoryview:
    """The elements of an output as little-endian bytes in row-major order."""
    if array.dtype.kind in "OSU":
        parts: list[bytes] = []
        for element in array.ravel().tolist():
            data = element if isinstance(element, bytes) else str(element).encode()
            parts += (_LENGTH.pack(len(data)), data)
        return b"".join(parts)
    if array.nbytes < 65536:
        return array.tobytes()
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def classify(name: str, array: NDArray[Any], count: int, label: Callable[[int], str | None]) -> NDArray[Any]:
    """Triton's classification extension: the `count` largest of the last axis as `score:index:label`.

    Args:
        name: the output's.
        array: scores [..., C].
        count: how many of each row; at least 1.
        label: the label of a class, or None where it has none.

    Returns:
        BYTES, an object array [..., min(count, C)], the largest first.
    """
    if array.ndim == 0 or not array.shape[-1] or array.dtype.kind not in "iuf":
        raise bad_request(f"output {name!r} is no row of scores; ask for it without classification")
    num_classes = array.size // array.shape[-1] * min(count, array.shape[-1])
    if array.size > _MOST_SCORES or num_classes > _MOST_CLASSES:
        raise bad_request(
            f"output {name!r} has {array.size} scores, and {num_classes} classes are asked for; accepted: "
            f"{_MOST_SCORES} scores and {_MOST_CLASSES} classes; ask for fewer, or for it without classification"
        )
    scores = array.reshape(-1, array.shape[-1]).astype(np.float64)
    best = np.argsort(-scores, axis=1, kind="stable")[:, :count]
    texts = np.empty(best.shape, dtype=object)
    for row, column in np.ndindex(*best.shape):
        index = int(best[row, column])
        text, known = f"{scores[row, index]:f}:{index}", label(index)
        texts[row, column] = (text if known is None else f"{text}:{known}").encode()
    return texts.reshape((*array.shape[:-1], best.shape[1]))
