"""What is read quickly and written by orjson is what Python's json, their naive twin, reads and writes."""

import gc
import json
from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from headstart.serving.server.errors import ServeError
from headstart.serving.server.wire import decoding, documents
from headstart.serving.server.wire.documents import parse_quickly
from headstart.serving.server.wire.protocol import DATATYPES, Limits
from headstart.serving.server.wire.tensors import from_json, to_json

WHOLE = st.one_of(
    st.integers(-300, 300),
    st.integers(),
    st.builds(
        lambda power, more: (1 << power) + more, st.sampled_from([7, 8, 31, 53, 63, 64, 128]), st.integers(-2, 2)
    ),
    st.sampled_from([10**25, -(10**25), 10**400]),
).map(str)
FRACTIONS = st.one_of(
    st.floats().map(json.dumps),
    st.from_regex(
        r"-?(0|[1-9][0-9]{0,30})(\.[0-9]{1,30})?([eE][+-]?[0-9]{1,3})?", fullmatch=True, alphabet="+-.0123456789Ee"
    ),
)
WORDS = st.sampled_from(
    ["true", "false", "null", "NaN", "-Infinity", "0", "-0", "-0.0", '"text"', '"ä"', "[]", "{}", "[[1]]"]
)
ODD = st.sampled_from(
    [
        *("", "01", "1.", ".5", "+1", "1e", "-", "1 2", "1_0", "\u0663", "\ufeff1", "\x0b1", "\xa01"),
        *("nan", "None", "True", "'a'", "//", "[1,]", '"\\x"', '"\0"', '"\x1f"', '"\ud800"'),
        *('"\\ud800"', '"\\udc00x"', '"\\ud83d\\ude00"', '"\\u0000"'),
        '{"a":1,"a":[]}',
    ]
)
ANYTHING = st.one_of(WHOLE, FRACTIONS, WORDS, ODD)
DATA = st.one_of(*(st.lists(one, max_size=4) for one in (WHOLE, FRACTIONS, WORDS, ANYTHING)))
PARAMETERS = ("own", "priority", "timeout", "binary_data_output")


@st.composite
def bodies(draw: st.DrawFn) -> bytes:
    """A request any value of which may be anything, and a bit of which may have flipped."""
    data, datatype = draw(DATA), draw(st.sampled_from([name for name in DATATYPES if name != "BF16"]))
    size = len(data)
    shape = draw(ANYTHING) if draw(st.integers(0, 5)) == 0 else draw(st.sampled_from([f"[{size}]", f"[1,{size}]"]))
    listed = draw(st.sampled_from(["[{}]", "[[{}]]", " [ {} ]\n"])).format(
        draw(st.sampled_from([",", " , "])).join(data)
    )
    parameters = [f',"parameters":{{"{name}":@}}' for name in PARAMETERS]
    beside = draw(st.sampled_from([*[""] * 6, ',"id":@', ',"inputs":@', *parameters]))
    text = f'{{"inputs":[{{"name":"x","datatype":"{datatype}","shape":{shape},"data":{listed}}}]{beside}}}'
    text = text.replace("@", draw(ANYTHING))
    found = bytearray(text.encode("utf-8", "surrogatepass"))
    if draw(st.integers(0, 9)) == 0:
        found[draw(st.integers(0, len(found) - 1))] ^= 1 << draw(st.integers(0, 7))
    return bytes(found)


@st.composite
def rows_of_numbers(draw: st.DrawFn) -> bytes:
    """A request of rows, long and short ones, at one place of which there may be anything."""
    datatype = draw(st.sampled_from(["FP16", "FP32", "FP64", "INT8", "UINT64"]))
    size = draw(st.sampled_from([1, 2, 16]))
    rows = [["1"] * size, ["2"] * size]
    if draw(st.booleans()):
        rows[draw(st.integers(0, 1))][draw(st.integers(0, size - 1))] = draw(ANYTHING)
    if draw(st.integers(0, 3)) == 0:
        rows[draw(st.integers(0, 1))][0:2] = draw(st.sampled_from([[], ["3"], ["[3]", "4"], ["3", "4", "5"]]))
    texts = ["[" + ",".join(row) + "]" for row in rows]
    if draw(st.integers(0, 3)) == 0:
        texts[draw(st.integers(0, 1))] = draw(ANYTHING)
    shape = draw(st.sampled_from([[2, size], [2 * size], [1, 2, size], [2, 1, size], [size, 2]]))
    name = draw(st.sampled_from(["x", "x[", '\\"[', "\\u005b"]))
    text = f'{{"inputs":[{{"name":"{name}","datatype":"{datatype}","shape":{shape},"data":[{",".join(texts)}]}}]}}'
    return text.encode("utf-8", "surrogatepass")


def verdict(body: bytes) -> Any:
    """All that was read, or the status and words of the refusal."""
    try:
        request, binary = decoding.RequestDecoder(Limits()).decode(memoryview(body), None, model="m", version=None)
    except ServeError as error:
        return error.status, error.message
    inputs = {name: (array.dtype, array.shape, array.tolist()) for name, array in request.inputs.items()}
    # No model sees these; those beyond 64 bits are floats.
    own = {
        name: float(one) if type(one) is int and abs(one) < 10**300 else one for name, one in request.parameters.items()
    }
    return repr((inputs, request.id, request.outputs, own, request.priority, request.deadline is None, binary))


def refuse(text: memoryview) -> Any:
    raise ValueError


@given(st.one_of(bodies(), rows_of_numbers()))
@settings(max_examples=1500, deadline=None)
def test_what_is_read_quickly_and_by_json_comes_to_the_same_verdict(body: bytes):
    short = verdict(body)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "SHORT", 0)
        long = verdict(body)
        patch.setattr(decoding, "parse_quickly", refuse)
        assert verdict(body) == short == long


@pytest.fixture
def read_as_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "SHORT", 0)


def given_data(**members: Any) -> Any:
    """The data that `parse_quickly` gives of the one input of a request."""
    document = {"inputs": [{"name": "x", **members}], "outputs": [{"name": "y"}]}
    return parse_quickly(memoryview(json.dumps(document).encode()))["inputs"][0]["data"]


@pytest.mark.usefixtures("read_as_long")
@pytest.mark.parametrize(
    ("datatype", "dtype"),
    [
        ("FP16", "f8"),
        ("FP32", "f8"),
        ("FP64", "f8"),
        ("INT8", "i8"),
        ("UINT8", "i8"),
        ("INT64", "i8"),
        ("UINT64", "u8"),
    ],
)
@pytest.mark.parametrize("shape", [(), (0,), (3,), (1, 1), (2, 3), (2, 16), (2, 3, 20), (3, 2, 1)], ids=str)
@pytest.mark.parametrize("is_flat", [True, False], ids=["flat", "nested"])
def test_numbers_are_read_as_one_array(is_flat: bool, shape: tuple[int, ...], datatype: str, dtype: str):
    numbers = np.arange(np.prod(shape, dtype=int)).reshape(shape)
    listed = numbers.ravel().tolist() if is_flat else numbers.tolist() if shape else [0]
    found = given_data(datatype=datatype, shape=list(shape), data=listed)
    assert isinstance(found, np.ndarray)
    assert found.dtype == dtype
    assert found.tolist() == numbers.ravel().tolist()


@pytest.mark.usefixtures("read_as_long")
@pytest.mark.parametrize(
    "data",
    [
        [1, [2]],
        [[1], [2]],
        [[1, 2], []],
        [[1] * 16, [2] * 15],
        [[1] * 16, [2] * 16, 3],
        [[1] * 16, [2] * 15 + [[3]]],
        [[1] * 32],
        [1, "2"],
        [1, ","],
        [1, None],
        [1, True],
        [1],
        [[], [], []],
        [[[]], [[1, 2]], [[3]]],
        [[[]], [[1]], [[2]]],
    ],
    ids=str,
)
@pytest.mark.parametrize("shape", [[2], [2, 16], [3, 1, 1]], ids=str)
@pytest.mark.parametrize("beside", ["", "["], ids=["a bracket for each list", "another one"])
def test_data_that_is_not_the_numbers_of_its_shape_is_left_to_json(shape: list[int], data: Any, beside: str):
    with pytest.raises(ValueError, match=r"^$"):
        given_data(datatype="FP32", shape=shape, data=data, beside=beside)


@pytest.mark.usefixtures("read_as_long")
@pytest.mark.parametrize(
    ("datatype", "data"), [("BYTES", [["a"], ["b[]"]]), ("BOOL", [True, False]), ("FP32", "[1,2]"), ("FP32", {"a": 1})]
)
def test_other_data_is_read_as_it_is(datatype: str, data: Any):
    assert given_data(datatype=datatype, shape=[2, 1], data=data) == data


@pytest.mark.usefixtures("read_as_long")
@pytest.mark.parametrize("name", ["\0", "a\0b", "id\0"])
def test_a_name_with_a_zero_byte_is_read_as_json_reads_it(name: str):
    item = {"name": "x", "datatype": "FP32", "shape": [1], "data": [1], name: 2}
    body = json.dumps({"inputs": [item], "id": "one", name: [], "parameters": {name: 3}}).encode()
    found = verdict(body)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoding, "parse_quickly", refuse)
        assert found == verdict(body)


@pytest.mark.usefixtures("read_as_long")
@pytest.mark.parametrize(("shape", "data"), [([2], [1, 2]), ([1, 2], [[1, 2]]), ([2, 16], [[1] * 16, [2] * 16])])
def test_a_bracket_in_a_name_is_no_list(shape: list[int], data: Any):
    item = {"name": "x[", "datatype": "FP32", "shape": shape, "data": data}
    found = parse_quickly(memoryview(json.dumps({"inputs": [item], "other": [[1]]}).encode()))["inputs"][0]["data"]
    assert found.tolist() == np.ravel(data).tolist()


@pytest.mark.usefixtures("read_as_long")
@pytest.mark.parametrize(
    ("shape", "data", "words"),
    [
        ("[2,0]", "[[],[]]", "(2, 0)"),
        ("[2,0,3]", "[[],[]]", "(2, 0, 3)"),
        ("[0,100000000]", "[]", "(0, 100000000)"),
        ("[0,100000000]", "[[]]", "does not fit the shape"),
        ("[0,1000000000000]", "[[]]", "accepted: 268435456 elements"),
        ("[1000000000000,0]", "[[]]", "accepted: 268435456 elements"),
        ("[1000000000000]", "[[1]]", "accepted: 268435456 elements"),
    ],
)
def test_data_with_few_elements_takes_no_memory_for_its_sizes(shape: str, data: str, words: str):
    assert words in str(verdict(with_input(shape, data)))


@pytest.mark.usefixtures("read_as_long")
def test_a_name_given_twice_is_left_to_json():
    text = json.dumps({"inputs": [{"name": "x", "datatype": "FP32", "shape": [2], "data": [1, 2]}]})
    for twice in (
        text.replace('"x"', '"x"}], "inputs": [{"name": "x"'),
        text.replace('"name"', '"data": [1, 2], "name"'),
    ):
        with pytest.raises(ValueError, match=r"^$"):
            parse_quickly(memoryview(twice.encode()))


@pytest.mark.parametrize("was_enabled", [True, False])
def test_no_garbage_is_looked_for_while_many_lists_are_made(was_enabled: bool, monkeypatch: pytest.MonkeyPatch):
    body = with_input(f"[{MANY}]", f"[{','.join(['[1]'] * MANY)}]").replace(b"FP32", b"BOOL")
    found: list[bool] = []
    for name in ("_read", "_decode"):  # of simdjson, and of json for the refusal

        def noting(read: Any, *given: Any) -> Any:
            found.append(gc.isenabled())
            return read(*given)

        monkeypatch.setattr(documents, name, partial(noting, getattr(documents, name)))
    monkeypatch.setattr(documents, "_KEPT", len(body) - 1)
    (gc.enable if was_enabled else gc.disable)()
    try:
        assert verdict(body)[0] == 400
        assert gc.isenabled() == was_enabled
    finally:
        gc.enable()
    assert found == [False, False]


@pytest.mark.usefixtures("read_as_long")
def test_what_was_read_stays_when_the_next_is_read_and_after_a_refusal_too():
    more = ',"outputs":[{"name":"y","parameters":{"a":"text"}}],"parameters":{"b":"word"}'
    first = parse_quickly(memoryview(with_input("[3]", "[1,2,3]", after=more)))
    for _ in range(2):
        with pytest.raises(ValueError, match=r"^$") as refused:  # a number beyond 64 bits, and then the next
            parse_quickly(memoryview(with_input("[1]", f"[{1 << 70}]")))
        second = parse_quickly(memoryview(with_input("[3]", "[4,5,6]", after=more.replace("e", "u"))))
        assert second["inputs"][0]["data"].tolist() == [4, 5, 6]
        assert refused.value.__traceback__ is not None
    assert first["inputs"][0]["data"].tolist() == [1, 2, 3]
    assert first["outputs"] == [{"name": "y", "parameters": {"a": "text"}}]
    assert first["parameters"] == {"b": "word"}


@pytest.mark.usefixtures("read_as_long")
def test_a_parser_is_kept_for_the_next_text_and_not_after_a_long_one(monkeypatch: pytest.MonkeyPatch):
    made = []
    parser = documents.simdjson.Parser
    monkeypatch.setattr(documents.simdjson, "Parser", lambda: made.append(1) or parser())
    documents._spare.clear()
    for _ in range(5):
        parse_quickly(memoryview(with_input()))
    assert len(made) == 1
    monkeypatch.setattr(documents, "_KEPT", 16)
    for _ in range(3):
        parse_quickly(memoryview(with_input()))
    assert len(made) == 4


def with_input(shape: str = "[1]", data: str = "[1]", more: str = "", after: str = "") -> bytes:
    return f'{{"inputs":[{{"name":"x","datatype":"FP32","shape":{shape},"data":{data}{more}}}]{after}}}'.encode()


def members(num: int) -> str:
    return ",".join(f'"{index:x}":0' for index in range(num))


MANY = 100_000  # with work that grows as their square, each would take a minute
COUNTLESS = {
    "members": (with_input(after=f",{members(MANY)}"), None),
    "members of an input": (with_input(more=f",{members(MANY)}"), None),
    "parameters": (with_input(after=f',"parameters":{{{members(MANY)}}}'), "has 100000 parameters; accepted: 64"),
    "sizes": (with_input(f"[{','.join(['9223372036854775807'] * MANY)}]"), "has 100000 dimensions; accepted: 16"),
    "inputs": (b'{"inputs":[%s]}' % b",".join([b'{"shape":[]}'] * MANY), "inputs has 100000 tensors; accepted: 64"),
    "lists of one number": (with_input(f"[{MANY}]", f"[{','.join(['[1]'] * MANY)}]"), "its data holds list"),
    "lists": (with_input("[100000,16]", f"[{','.join(['[]'] * MANY)}]"), "does not fit the shape [100000, 16]"),
}
"""Requests with very many of something, and words of the refusal; None where what is not known is not looked at."""


@pytest.mark.parametrize("what", COUNTLESS)
def test_what_is_countless_is_left_to_json_before_it_is_read(what: str):
    body, words = COUNTLESS[what]
    with pytest.raises(ValueError, match=r"^$"):
        parse_quickly(memoryview(body))
    found = verdict(body)
    if words is None:
        assert found == verdict(with_input())
    else:
        assert found[0] == 400
        assert words in found[1]


@given(hnp.arrays(st.sampled_from([np.float16, np.float32, np.float64]), st.integers(0, 5)))
@settings(max_examples=300, deadline=None)
def test_floats_are_written_as_json_writes_them_and_read_back_exactly(array: np.ndarray):
    array[~np.isfinite(array)] = 0
    text = to_json("y", array)
    assert json.loads(text) == json.loads(json.dumps(array.tolist()))
    datatype = {2: "FP16", 4: "FP32", 8: "FP64"}[array.itemsize]
    assert from_json("x", datatype, array.shape, json.loads(text)).tobytes() == array.tobytes()


@pytest.mark.parametrize("datatype", ["BOOL", "INT8", "UINT8", "INT64", "UINT64", "BYTES"])
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 3)], ids=str)
def test_whole_numbers_and_text_are_written_as_json_writes_them(datatype: str, shape: tuple[int, ...]):
    dtype = DATATYPES[datatype]
    array = np.full(shape, 'ä"' if datatype == "BYTES" else np.iinfo(dtype).max if dtype.kind in "iu" else True, dtype)
    assert to_json("y", array.T) == json.dumps(array.ravel().tolist(), separators=(",", ":")).encode()
