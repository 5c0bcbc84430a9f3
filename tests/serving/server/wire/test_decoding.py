"""What orjson reads and writes is what Python's json, its naive twin, reads and writes."""

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from headstart.serving.server.errors import ServeError, bad_request
from headstart.serving.server.wire import decoding
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
    raise bad_request("as if orjson could not read it")


@given(bodies())
@settings(max_examples=1000, deadline=None)
def test_orjson_and_json_come_to_the_same_verdict(body: bytes):
    found = verdict(body)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoding, "_read_quickly", refuse)
        assert found == verdict(body)


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
