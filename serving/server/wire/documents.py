"""The JSON of a request as Python objects: quickly, with no object for each number of its data, or to the letter."""

import collections
import gc
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import orjson
import simdjson
from numpy.typing import NDArray

from headstart.serving.server.errors import bad_request

_FLOATS, _SIGNED, _UNSIGNED = (("d", np.float64), ("i", np.int64), ("u", np.uint64))
_NUMBERS: dict[Any, tuple[Any, Any]] = {
    **dict.fromkeys(("FP16", "FP32", "FP64"), _FLOATS),
    **dict.fromkeys(("INT8", "INT16", "INT32", "INT64", "UINT8", "UINT16", "UINT32"), _SIGNED),
    "UINT64": _UNSIGNED,
}
"""What simdjson calls the widest numbers of a datatype's kind, and what NumPy does."""

_LISTED = ("BOOL", "BYTES")
"""Datatypes whose data stays in lists; of others than these and numbers there is no JSON."""

SHORT = 4096
"""Bytes below which orjson is faster: simdjson takes 15 us for its lists and objects, and 50 ns less for a number."""

_MOST_MEMBERS = 64
"""Members of an object, inputs, and sizes of a shape that are read quickly; Python's json reads more of them, since
simdjson looks each name up from the first on and the product of thousands of sizes has thousands of digits."""

_SHORT_ROW = 16
"""Numbers of an innermost list below which writing all of them anew costs less than looking at each list."""

_OF_NUMBERS = b"0123456789+-.eE"

_KEPT = 1 << 20
"""Bytes of text up to which a parser is kept for the next: its memory, 14 times as much, costs more page by page than
the reading does."""
_spare: collections.deque[Any] = collections.deque(maxlen=1)

_decode = json.JSONDecoder().decode


def parse_quickly(text: memoryview) -> dict[str, Any]:
    """As `parse_json` of an inference request, but that numbers of an input's data are an array where the text is long.

    They are in one list, or nested as the input's shape says: float64, int64 or uint64, [count], in row-major order. On
    what is refused, here or later, `parse_json` has the word: neither library knows NaN, and orjson makes a float of a
    whole number beyond 64 bits.

    Raises:
        ValueError: this is no JSON, or not the JSON of a request, as far as it is known here.
    """
    if len(text) < SHORT:
        short = orjson.loads(text)
        if type(short) is not dict:
            raise ValueError
        return short
    if len(text) > _KEPT:
        with _uncollected():
            return _read(simdjson.Parser(), text)
    try:
        parser = _spare.pop()
    except IndexError:
        parser = simdjson.Parser()
    read = _read(parser, text)
    _spare.append(parser)  # not after what is refused: the exception holds objects of this parser
    return read


def _read(parser: Any, text: memoryview) -> dict[str, Any]:
    """`parse_quickly` of a long text; no object of the parser is left."""
    try:
        document = _members(parser.parse(text))
    except RuntimeError as error:  # a whole number beyond 64 bits
        raise ValueError from error
    if type(document.get("inputs")) is not simdjson.Array or len(document["inputs"]) > _MOST_MEMBERS:
        raise ValueError
    inputs = [_members(item) for item in document["inputs"]]
    # All lists that the text has, unless a name has a bracket or a list is where none belongs.
    lists = sum(type(value) is simdjson.Array for each in (document, *inputs) for value in each.values())
    brackets = int(np.count_nonzero(np.frombuffer(text, np.uint8) == ord("[")))
    shapes = [_shape(item, len(text) // 2) for item in inputs]
    inner = [_inner_lists(item.get("data"), shape) for item, shape in zip(inputs, shapes, strict=True)]
    known = None not in inner and lists + sum(filter(None, inner)) == brackets
    read = [_read_input(item, shape, known, brackets) for item, shape in zip(inputs, shapes, strict=True)]
    return {name: read if name == "inputs" else _plain(value) for name, value in document.items()}


def _members(value: Any) -> dict[str, Any]:
    """The members of an object, lists and objects unread: of two of a name simdjson gives the first, json the last."""
    if type(value) is not simdjson.Object or len(value) > _MOST_MEMBERS:
        raise ValueError
    names = list(value.keys())
    try:
        members = {name: value[name] for name in names}
    except KeyError as error:  # a name with a zero byte is looked for up to there
        raise ValueError from error
    if len(members) != len(names):
        raise ValueError
    return members


def _plain(value: Any) -> Any:
    """What is no data, as Python's objects."""
    if type(value) in (simdjson.Array, simdjson.Object) and len(value) > _MOST_MEMBERS:
        raise ValueError
    if type(value) is simdjson.Array:
        return value.as_list()
    return value.as_dict() if type(value) is simdjson.Object else value


def _shape(item: dict[str, Any], most: int) -> list[int]:
    """The sizes of an input, of no more than the `most` elements that the text has room for."""
    shape = _plain(item.get("shape"))
    if type(shape) is not list or len(shape) > _MOST_MEMBERS or any(type(size) is not int for size in shape):
        raise ValueError
    if min(shape, default=0) < 0 or (item.get("data") is not None and math.prod(shape) > most):
        raise ValueError
    return shape


def _read_input(item: dict[str, Any], shape: list[int], known: bool, brackets: int) -> dict[str, Any]:
    """The members of an input, data of numbers as one array.

    `known`: whether the lists within its data are those of its shape.
    """
    data, datatype = item.get("data"), item.get("datatype")
    read = {name: _plain(value) for name, value in item.items() if name != "data"}
    if "data" in item:
        if type(data) is not simdjson.Array:
            read["data"] = _plain(data)
        elif datatype in _LISTED:
            read["data"] = data.as_list()
        elif datatype in _NUMBERS and (known or _is_nested(data, shape, brackets)):
            read["data"] = _numbers(data, *_NUMBERS[datatype], math.prod(shape))
        else:
            raise ValueError
    return read


def _inner_lists(data: Any, shape: list[int]) -> int | None:
    """The lists within data, 0 where it is flat; None where they are not those of the shape, or have few numbers."""
    if data is None:
        return 0
    if type(data) is not simdjson.Array:
        return None
    count = math.prod(shape)
    if len(data) == count and (not data or type(data[0]) is not simdjson.Array):
        return 0
    if len(shape) < 2 or shape[-1] < _SHORT_ROW or count == 0:
        return None
    level, inner = [data], 0
    for size in shape[:-1]:
        if any(len(one) != size for one in level):
            return None
        items = [item for one in level for item in one]
        level = [item for item in items if type(item) is simdjson.Array]
        if len(level) != len(items):
            return None
        inner += len(level)
    return inner if all(len(one) == shape[-1] for one in level) else None


def _is_nested(data: Any, shape: list[int], brackets: int) -> bool:
    """Whether data, where it is as many numbers as its shape has, is flat or nested like that: with no object a list.

    `brackets`: of the whole text, which limits what is compared with; without elements the sizes do not.
    """
    if 0 in shape or sum(math.prod(shape[:depth]) for depth in range(1, len(shape))) >= brackets:
        return False
    written = data.mini.translate(None, _OF_NUMBERS)
    nested = b"," * (shape[-1] - 1) if shape else b""
    for size in reversed(shape[:-1]):
        nested = b",".join([b"[" + nested + b"]"] * size)
    return written in (b"[" + nested + b"]", b"[" + b"," * (math.prod(shape) - 1) + b"]")


def _numbers(data: Any, kind: Any, dtype: Any, count: int) -> NDArray[Any]:
    """So many numbers of that kind, and nothing else, as one array."""
    try:
        numbers = np.frombuffer(data.as_buffer(of_type=kind), dtype)
    except TypeError as error:
        raise ValueError from error
    if len(numbers) != count:
        raise ValueError
    return numbers


def parse_json(text: memoryview) -> dict[str, Any]:
    """A body that must be a JSON object in UTF-8; NaN, Infinity and whole numbers of any size are read.

    Raises:
        ServeError: 400.
    """
    try:
        with _uncollected():
            document = _decode(str(text, "utf-8"))
    except UnicodeDecodeError as error:
        raise bad_request(f"the JSON is not UTF-8 at byte {error.start}") from None
    except RecursionError:
        raise bad_request("the JSON is nested too deeply") from None
    except ValueError as error:  # JSONDecodeError, or an integer of thousands of digits
        where = f" at byte {error.pos}: {error.msg}" if isinstance(error, json.JSONDecodeError) else ""
        raise bad_request(f"the body is not JSON{where}") from None
    if type(document) is not dict:
        raise bad_request(f"the JSON is a {type(document).__name__}; accepted: an object")
    return document


@contextmanager
def _uncollected() -> Iterator[None]:
    """Let no garbage be looked for: of millions of lists, which have no cycles, that is most of what they cost."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
