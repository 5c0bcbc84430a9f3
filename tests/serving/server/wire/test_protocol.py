"""The Open Inference Protocol as data: what a body says, what is refused before memory is taken, and the way back."""

import contextlib
import json
import re
import time
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from headstart.serving.server.errors import ServeError
from headstart.serving.server.wire.bodies import only_file
from headstart.serving.server.wire.decoding import HIGHEST_PRIORITY, RequestDecoder
from headstart.serving.server.wire.grpc_codec import GrpcDecoder
from headstart.serving.server.wire.grpc_messages import MESSAGES
from headstart.serving.server.wire.protocol import (
    DATATYPES,
    InferResponse,
    Limits,
    RequestedOutput,
    ResponseEncoder,
    datatype_of,
    encode_response,
)
from headstart.serving.server.wire.tensors import classify, to_json
from tests.serving.server.tiny_service import infer_body

NUMERIC = [name for name in DATATYPES if name not in ("BYTES", "BF16")]


def decode(body: bytes, length: int | None = None, limits: Limits | None = None) -> Any:
    return RequestDecoder(limits or Limits()).decode(memoryview(body), length, model="m", version=None)[0]


def as_json(datatype: str = "FP32", shape: Any = (2,), data: Any = (1, 2), **document: Any) -> bytes:
    tensor = {"name": "x", "datatype": datatype, "shape": shape, "data": data}
    return json.dumps({"inputs": [tensor], **document}).encode()


def refused(body: bytes, length: int | None = None, limits: Limits | None = None, status: int = 400) -> str:
    with pytest.raises(ServeError) as caught:
        decode(body, length, limits)
    assert caught.value.status == status
    return caught.value.message


def binary(size: int, datatype: str = "FP32", shape: Any = (2,)) -> dict[str, Any]:
    return {"name": "x", "datatype": datatype, "shape": shape, "parameters": {"binary_data_size": size}}


@pytest.mark.parametrize("datatype", NUMERIC)
@pytest.mark.parametrize("shape", [(3, 5), (1,), (0, 4), ()], ids=str)
def test_every_numeric_datatype_arrives_as_it_was_sent(datatype: str, shape: tuple[int, ...]):
    array = (np.random.default_rng(0).integers(0, 2, shape)).astype(DATATYPES[datatype])
    body, length = infer_body(array)
    found = decode(body, length).inputs["x"]
    assert (found.dtype, found.shape) == (array.dtype, array.shape)
    assert found.tobytes() == array.tobytes()
    flat = decode(as_json(datatype, shape, array.ravel().tolist())).inputs["x"]
    nested = decode(as_json(datatype, shape, array.tolist())).inputs["x"] if shape else flat
    for one in (flat, nested):
        assert (one.dtype, one.shape) == (array.dtype, array.shape)
        assert one.tobytes() == array.tobytes()


@given(hnp.arrays(np.float32, hnp.array_shapes(max_dims=4, max_side=4), elements=st.floats(width=32)))
@settings(max_examples=60, deadline=None)
def test_floats_cross_json_and_binary_bit_for_bit(array: np.ndarray):
    body, length = infer_body(array)
    assert decode(body, length).inputs["x"].tobytes() == array.tobytes()
    found = decode(as_json("FP32", list(array.shape), array.ravel().tolist())).inputs["x"]
    assert np.array_equal(found, array, equal_nan=True)


def test_numeric_tensors_are_views_of_the_body():
    array = np.arange(2048, dtype=np.float32)
    body, length = infer_body(array)
    whole = memoryview(bytearray(-length % 16) + body)[-length % 16 :]
    request, _ = RequestDecoder(Limits()).decode(whole, length, model="m", version=None)
    assert np.shares_memory(request.inputs["x"], np.frombuffer(whole, np.uint8))
    assert request.inputs["x"].flags.aligned


def test_a_tensor_at_an_odd_offset_is_aligned_by_a_copy():
    body, length = infer_body(np.ones(1, np.uint8), np.arange(3, dtype=np.float64))
    found = decode(body, length).inputs["y"]
    assert found.flags.aligned
    assert found.tolist() == [0, 1, 2]


def test_strings_and_bfloat16():
    raw = b"\x02\0\0\0\xff\0" + b"\0\0\0\0" + b"\x03\0\0\0abc"
    text = json.dumps({"inputs": [binary(len(raw), "BYTES", [3])]}).encode()
    assert decode(text + raw, len(text)).inputs["x"].tolist() == [b"\xff\0", b"", b"abc"]
    assert decode(as_json("BYTES", [1, 2], [["ä", ""]])).inputs["x"].tolist() == [["ä".encode(), b""]]
    text = json.dumps({"inputs": [binary(4, "BF16")]}).encode()
    found = decode(text + b"\x80\x3f\0\0", len(text)).inputs["x"]
    assert found.tolist() == [0x3F80, 0]
    assert datatype_of(found.dtype) == "BF16"
    assert datatype_of(np.dtype(np.uint16)) == "UINT16"


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "not JSON"),
        (b"\xff{}", "UTF-8"),
        (b"[]", "an object"),
        (b'{"inputs": ' + b"[" * 100_000, "nested"),
        (b'{"a":' * 50_000, "nested"),
        (b'{"id": ' + b"9" * 5000 + b"}", "not JSON"),
        (b'{"inputs": []}', "at least one"),
        (b'{"inputs": [7]}', "int"),
        (b'{"inputs": [{"datatype": "FP32"}]}', "name"),
        (as_json("FP99"), "accepted: BOOL, UINT8"),
        (as_json(shape=[2, -1]), "shape"),
        (as_json(shape=[True, 2]), "shape"),
        (as_json(shape=[2.0]), "shape"),
        (as_json(shape="2"), "shape"),
        (as_json(shape=[1] * 17), "17 dimensions"),
        (as_json(shape=[1 << 40]), "accepted: 268435456 elements"),
        (as_json(shape=[0, 1 << 62]), "accepted: 268435456 elements"),
        (as_json(shape=[3]), "2 elements"),
        (as_json(shape=[2, 2], data=[[1, 2], [3]]), "does not fit"),
        (as_json(shape=[2, 2], data=[[1, 2], 3]), "does not fit"),
        (as_json(data="12"), "a list"),
        (as_json(data=[1, "2"]), "str"),
        (as_json(data=[1, None]), "NoneType"),
        (as_json(data=[1, [2]]), "list"),
        (as_json("INT8", data=[1, 1.5]), "float"),
        (as_json("INT8", data=[1, True]), "bool"),
        (as_json("INT8", data=[1, 128]), "range of INT8"),
        (as_json("UINT64", data=[1, -1]), "range of UINT64"),
        (as_json("UINT64", data=[1, 1 << 64]), "range of UINT64"),
        (as_json("FP16", data=[1, 70000]), "range of FP16"),
        (as_json("FP32", data=[1, 1e39]), "range of FP32"),
        (as_json("FP64", data=[1, 10**400]), "range of FP64"),
        (as_json("BOOL", data=[1, 0]), "true and false"),
        (as_json("BYTES", data=["a", 1]), "strings"),
        (b'{"inputs":[{"name":"x","datatype":"BYTES","shape":[1],"data":["\\ud800"]}]}', "surrogate"),
        (as_json("BF16", data=[1, 2]), "binary extension"),
        (as_json(id=7), "id"),
        (as_json(id="i" * 1025), "at most 1024"),
        (as_json(parameters=[1]), "no object"),
        (as_json(parameters={"a": {"b": 1}}), "'a'"),
        (b'{"parameters": {"a": NaN}, "inputs": [1]}', "finite"),
        (as_json(parameters={"binary_data_output": 1}), "true, false"),
        (as_json(parameters={"timeout": "soon"}), "microseconds"),
        (as_json(parameters={"timeout": 10**400}), "microseconds"),
        (as_json(parameters={"priority": -1}), "priority"),
        (as_json(outputs=0), "outputs is not a list"),
        (as_json(outputs=[{"name": "y" * 257}]), "1 to 256"),
        (as_json(outputs=[{"name": "y", "parameters": {"classification": -1}}]), "classification -1"),
        (as_json(outputs=[{"name": "y"}, {"name": "y"}]), "twice"),
        (as_json(outputs=[{"name": "y", "parameters": {"classification": 0.5}}]), "classification"),
        (as_json(outputs=[{"name": "y", "parameters": {"shared_memory_region": "r"}}]), "shared memory"),
        (json.dumps({"inputs": [{"name": "x", "datatype": "FP32", "shape": [1]}]}).encode(), "neither data"),
        (json.dumps({"inputs": [{**binary(8), "data": [1, 2]}]}).encode(), "both data"),
        (json.dumps({"inputs": [binary(8), binary(8)]}).encode(), "twice"),
        (json.dumps({"inputs": [binary(7)]}).encode(), "has 8 bytes"),
        (json.dumps({"inputs": [binary(-8)]}).encode(), "binary_data_size"),
        (json.dumps({"inputs": [binary(7, "BYTES")]}).encode(), "at least 8"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_wrong_request_is_refused_in_words(body: bytes, words: str):
    assert words in refused(body)


@pytest.mark.parametrize("wrong", [-1, 1, 100])
def test_a_body_shorter_or_longer_than_declared_names_both_numbers(wrong: int):
    body, length = infer_body(np.zeros(64, np.float32))
    message = refused(body[:wrong] if wrong < 0 else body + b"\0" * wrong, length)
    assert "256" in message
    assert str(256 + wrong) in message
    assert f"{len(body) + 1}" in refused(body, len(body) + 1)


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"\xff\xff\xff\xff" + b"a" * 8, "element 0 says 4294967295 bytes, 8 are left"),
        (b"\x05\0\0\0hello\0\0\0", "end in element 1"),
        (b"\x01\0\0\0a\x02\0\0\0b", "element 1 says 2 bytes, 1 are left"),
        (b"\x01\0\0\0a\x01\0\0\0bccc", "3 bytes are left"),
    ],
)
def test_strings_that_lie_about_their_length_are_refused(raw: bytes, words: str):
    text = json.dumps({"inputs": [binary(len(raw), "BYTES")]}).encode()
    assert words in refused(text + raw, len(text))


def test_a_boolean_that_is_neither_is_refused():
    text = json.dumps({"inputs": [binary(2, "BOOL")]}).encode()
    assert "neither 0 nor 1" in refused(text + b"\1\2", len(text))


def test_limits_hold_before_anything_is_read():
    many = json.dumps({"inputs": [{**binary(4), "name": str(n)} for n in range(65)]}).encode()
    assert "65 tensors" in refused(many)
    assert "65 parameters" in refused(as_json(parameters={str(n): n for n in range(65)}))
    assert "accepted: 4" in refused(as_json(shape=[5]), limits=Limits(max_elements=4))
    assert "accepted: 1 " in refused(as_json("BYTES", data=["a", "b"]), limits=Limits(max_strings=1))
    assert "binary extension" in refused(as_json(), limits=Limits(max_json_bytes=10), status=413)


def test_what_is_just_within_the_limits_is_read():
    most = {str(n): n for n in range(64)}
    outputs = [{"name": f"{n:256}"} for n in range(64)]
    body = as_json(shape=[1] * 16, data=[1], id="i" * 1024, parameters=most, outputs=outputs)
    request = decode(body, limits=Limits(max_json_bytes=len(body), max_elements=1))
    assert (len(request.id), len(request.parameters), len(request.outputs)) == (1024, 64, 64)
    refused(body, limits=Limits(max_json_bytes=len(body) - 1), status=413)


def test_what_is_said_beside_the_tensors_is_read():
    body, length = infer_body(
        np.zeros(2, np.float32),
        id="seven",
        parameters={"timeout": 2_000_000, "priority": 1, "own": "word", "binary_data_output": True},
        outputs=[{"name": "a"}, {"name": "b", "parameters": {"binary_data": False, "classification": 3}}],
    )
    decoder = RequestDecoder(Limits())
    request, all_binary = decoder.decode(memoryview(body), length, model="m", version="2")
    assert (request.model, request.version, request.id, all_binary) == ("m", "2", "seven", True)
    assert request.parameters == {"own": "word"}
    assert request.priority == HIGHEST_PRIORITY
    assert request.deadline is not None
    assert -60 < request.deadline - time.monotonic() <= 2
    assert request.outputs == (
        RequestedOutput(name="a", binary=True),
        RequestedOutput(name="b", binary=False, classification=3),
    )


def test_a_remembered_plan_is_not_changed_by_those_who_use_it():
    body, length = infer_body(np.zeros(2, np.float32), parameters={"own": 1})
    decoder = RequestDecoder(Limits())
    first, _ = decoder.decode(memoryview(body), length, model="m", version=None)
    first.parameters["own"] = 2
    first.inputs.clear()
    second, _ = decoder.decode(memoryview(body), length, model="n", version=None)
    assert (second.model, second.parameters, list(second.inputs)) == ("n", {"own": 1}, ["x"])


def test_a_request_with_a_name_of_its_own_does_not_take_the_place_of_what_is_remembered():
    decoder = RequestDecoder(Limits())
    for name in ("", *map(str, range(10))):
        body, length = infer_body(np.zeros(2, np.float32), id=name)
        assert decoder.decode(memoryview(body), length, model="m", version=None)[0].id == name
    assert [plan.id for plan in decoder._remembered.values()] == [""]


def answer(array: Any, wanted: list[RequestedOutput] | None = None, *, all_binary: bool = False) -> tuple[Any, bytes]:
    response = InferResponse(model="m", version="1", outputs={"y": np.asarray(array)})
    parts, length = encode_response(response, wanted, all_binary, ["cat", "dog", "eel"].__getitem__)
    body = b"".join(parts)
    return json.loads(body[:length]), body[length:] if length else b""


def test_an_answer_in_json_and_in_bytes():
    array = np.array([[1.5, -2]], np.float16)
    document, rest = answer(array)
    expected = {"name": "y", "datatype": "FP16", "shape": [1, 2]}
    assert document["outputs"] == [{**expected, "data": [1.5, -2]}]
    assert not rest
    document, rest = answer(array.T.copy().T, all_binary=True)
    assert document["outputs"] == [{**expected, "parameters": {"binary_data_size": 4}}]
    assert rest == array.tobytes()
    assert answer(np.array(["ä", "b"]), all_binary=True)[1] == b"\x02\0\0\0" + "ä".encode() + b"\1\0\0\0b"
    big = np.arange(60_000, dtype=np.float32).reshape(300, 200)
    assert answer(big.T, all_binary=True)[1] == big.T.tobytes()


@pytest.mark.parametrize("array", [[np.nan], [np.inf], np.array([b"\xff"], object)], ids=["nan", "inf", "bytes"])
def test_what_json_cannot_carry_is_refused_with_the_way_out(array: Any):
    with pytest.raises(ServeError, match="binary_data: true"):
        answer(array)
    assert answer(array, all_binary=True)[1]


def test_an_output_of_any_name_is_named_in_the_refusal():
    with pytest.raises(ServeError, match=re.escape("output '100%= sure %s'")):
        to_json("100%= sure %s", np.array([np.nan]))


def test_classification_gives_the_largest_with_their_labels():
    wanted = [RequestedOutput(name="y", binary=False, classification=2)]
    document, _ = answer([[0.1, 0.7, 0.2], [3, 1, 2]], wanted)
    assert document["outputs"][0]["shape"] == [2, 2]
    assert document["outputs"][0]["data"] == ["0.700000:1:dog", "0.200000:2:eel", "3.000000:0:cat", "2.000000:2:eel"]
    tied, _ = answer([0.5, 0.5, 0.5], wanted)
    assert tied["outputs"][0]["data"] == ["0.500000:0:cat", "0.500000:1:dog"]
    many = classify("y", np.array([0.5, 0.25] * 50), 50, lambda index: None)
    assert many.tolist() == [b"0.500000:%d" % index for index in range(0, 100, 2)]
    for none in ([True], 1.0, np.zeros((2, 0))):
        with pytest.raises(ServeError, match="no row of scores"):
            answer(none, wanted)
    assert answer(np.zeros((0, 3)), wanted)[0]["outputs"][0]["shape"] == [0, 2]


@pytest.mark.parametrize(
    ("shape", "count", "words"),
    [
        ((1 << 16, 3), 2, "has 196608 scores, and 131072 classes are asked for; accepted: 1048576 scores and 65536 cl"),
        ((3, 1 << 16), 1 << 40, "and 196608 classes are asked for"),
        ((2, 1 << 20), 1, "has 2097152 scores, and 2 classes"),
    ],
)
def test_classes_are_counted_before_any_is_looked_for(shape: tuple[int, ...], count: int, words: str):
    with pytest.raises(ServeError, match=words) as caught:
        answer(np.broadcast_to(np.float32(1), shape), [RequestedOutput(name="y", binary=False, classification=count)])
    assert caught.value.status == 400


def test_an_output_that_the_model_lacks_is_refused():
    with pytest.raises(ServeError, match="no output 'z'; it has y"):
        answer([1.0], [RequestedOutput(name="z", binary=True)])


@pytest.mark.parametrize(
    ("output", "change"),
    [
        ([1.5], {"model": "n"}),
        ([1.5], {"version": "2"}),
        ([1.5], {"id": "i"}),
        ([1.5], {"parameters": {"own": 1}}),
        ([b"a"], {"outputs": {"y": np.array([b"bcd"], object)}}),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_an_answer_is_not_taken_for_one_that_was_remembered(output: list[Any], change: dict[str, Any]):
    encoder = ResponseEncoder()
    dtype = object if isinstance(output[0], bytes) else np.float32
    first: dict[str, Any] = {"model": "m", "version": "1", "outputs": {"y": np.array(output, dtype)}}
    for values in (first, {**first, **change}, first):
        response = InferResponse(**values)
        assert encoder.encode(response, None, True, str) == encode_response(response, None, True)


ANSWERS = st.fixed_dictionaries(
    {
        "model": st.sampled_from(["m", "n"]),
        "version": st.sampled_from(["1", "2"]),
        "id": st.sampled_from(["", "", "", "i"]),
        "outputs": st.dictionaries(
            st.sampled_from(["y", "z"]),
            st.sampled_from(
                [
                    np.array([[1.5, -2.0, 0.5]], np.float32),
                    np.array([[1, 2, 3]], np.float32),
                    np.array([[1.5, -2.0, 0.5]]),
                    np.array([[1.5], [-2.0], [0.5]], np.float32),
                    np.array([[1.5], [-2.0], [0.5]], np.float32).T,
                    np.array([b"a", b"bcd"], object),
                    np.array([1, 2], np.uint16),
                    np.array([1, 2], np.dtype(np.uint16, metadata={"datatype": "BF16"})),
                ]
            ),
            min_size=1,
        ),
        "parameters": st.sampled_from([{}, {}, {"own": 1}]),
    }
)
WANTED = st.builds(
    RequestedOutput,
    name=st.sampled_from(["y", "z"]),
    binary=st.booleans(),
    classification=st.sampled_from([0, 0, 0, 2]),
)


@given(st.lists(st.tuples(ANSWERS, st.none() | st.lists(WANTED, max_size=3).map(tuple), st.booleans()), max_size=12))
@settings(max_examples=200, deadline=None)
def test_remembering_changes_no_answer(asked: list[tuple[dict[str, Any], Any, bool]]):
    """`encode_response` is the naive twin."""
    encoder = ResponseEncoder()
    for values, wanted, binary in asked:
        response = InferResponse(**values)
        label = ["cat", "dog", "eel"].__getitem__
        try:
            expected: Any = encode_response(response, wanted, binary, label)
        except ServeError as error:
            with pytest.raises(ServeError, match=re.escape(error.message)):
                encoder.encode(response, wanted, binary, label)
            continue
        for _ in range(2):
            parts, length = encoder.encode(response, wanted, binary, label)
            assert (b"".join(parts), length) == (b"".join(expected[0]), expected[1])


@given(st.binary(max_size=200), st.one_of(st.none(), st.integers(0, 300)))
@settings(max_examples=200, deadline=None)
def test_noise_is_refused_and_never_breaks(noise: bytes, length: int | None):
    refused(noise, length)


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_a_damaged_request_is_read_right_or_refused(data: st.DataObject):
    body, length = infer_body(np.arange(4, dtype=np.float32), np.array([[True, False]]), id="i")
    damaged = bytearray(body)
    for _ in range(data.draw(st.integers(1, 3))):
        position = data.draw(st.integers(0, len(damaged) - 1))
        damaged[position] ^= 1 << data.draw(st.integers(0, 7))
    cut = bytes(damaged[: data.draw(st.integers(0, len(damaged)))]) if data.draw(st.booleans()) else bytes(damaged)
    try:
        request = decode(cut, data.draw(st.sampled_from([length, length, length + 1, 0, None])))
    except ServeError:
        return
    assert all(array.nbytes <= len(cut) for array in request.inputs.values())


@st.composite
def damaged(draw: st.DrawFn, whole: bytes) -> bytes:
    """What was sent, with bits flipped, numbers in it that lie, pieces twice, or an end that is missing."""
    found = bytearray(whole)
    for _ in range(draw(st.integers(0, 3))):
        position = draw(st.integers(0, len(found) - 1))
        found[position] ^= 1 << draw(st.integers(0, 7))
    if draw(st.booleans()) and (numbers := list(re.finditer(rb"\d+", found))):
        number = draw(st.sampled_from(numbers))
        value = int(number[0][:18])
        lies = [value + 1, max(value - 1, 0), -1, 0, 2 * value + 8, 1 << 31, 1 << 63, 10**25]
        found[number.start() : number.end()] = b"%d" % draw(st.sampled_from(lies))
    if draw(st.booleans()):
        start, stop = sorted((draw(st.integers(0, len(found))), draw(st.integers(0, len(found)))))
        found[stop:stop] = found[start:stop][:200]
    return bytes(found[: draw(st.integers(0, len(found)))] if draw(st.booleans()) else found)


def message(datatype: str, contents: bytes | None = None, **fields: Any) -> bytes:
    """A gRPC request with one input of two elements, and raw contents or none."""
    one = MESSAGES["ModelInferRequest"](model_name="m", id="i", **fields)
    tensor = one.inputs.add(name="x", datatype=datatype, shape=[2])
    one.parameters["timeout"].int64_param = 5000
    one.outputs.add(name="y").parameters["classification"].int64_param = 2
    if contents is None:
        tensor.contents.bytes_contents.extend([b"a", b"bc"])
    else:
        one.raw_input_contents.append(contents)
    return one.SerializeToString()


def read_or_refused(read: Callable[[], Any]) -> Any:
    """What was read, or None where it was refused in words that go over the wire."""
    try:
        return read()
    except ServeError as error:
        refusal = error
    assert refusal.status in (400, 413)
    refusal.message.encode()
    return None


@pytest.mark.parametrize(
    "whole",
    [message("FP64", np.array([np.nan, 1]).tobytes()), message("BYTES"), message("BYTES", b"\1\0\0\0a\0\0\0\0")],
    ids=["raw", "contents", "raw strings"],
)
@given(st.data())
@settings(max_examples=200, deadline=None)
def test_a_damaged_message_of_grpc_is_read_right_or_refused(whole: bytes, data: st.DataObject):
    decoder = GrpcDecoder(Limits())
    decoder.decode(whole)
    sent = data.draw(damaged(whole))
    for _ in range(2):  # the second may be read from what is remembered
        found = read_or_refused(lambda: decoder.decode(sent))
        assert not found or sum(array.nbytes for array in found.inputs.values()) <= 8 * len(sent)


@pytest.mark.parametrize("what", ["dimensions", "parameters"])
def test_a_message_of_grpc_is_counted_before_objects_are_made_of_it(what: str):
    one = MESSAGES["ModelInferRequest"](model_name="m")
    tensor = one.inputs.add(name="x", datatype="FP32")
    if what == "dimensions":
        tensor.shape.extend([1000] * 500_000)
    else:
        for index in range(50_000):
            tensor.parameters[str(index)].int64_param = 1000
    sent = one.SerializeToString()
    tracemalloc.start()
    try:
        with pytest.raises(ServeError, match=f"has [0-9]+0000 {what}; accepted: "):
            GrpcDecoder(Limits()).decode(sent)
        assert tracemalloc.get_traced_memory()[1] < 2 * len(sent) + 100_000
    finally:
        tracemalloc.stop()


@given(st.binary(max_size=300))
@settings(max_examples=200, deadline=None)
def test_noise_is_no_message_of_grpc_that_breaks(noise: bytes):
    with contextlib.suppress(ServeError):
        GrpcDecoder(Limits()).decode(noise)


FORM = b'--B\r\nContent-Disposition: form-data; name="image"\r\n\r\nhello\r\n--B--\r\n'


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_a_damaged_form_is_read_right_or_refused(data: st.DataObject):
    assert only_file('multipart/form-data; boundary="B"', memoryview(FORM)) == b"hello"
    kind = data.draw(damaged(b'multipart/form-data; boundary="B"')).decode("latin-1")
    sent = data.draw(damaged(FORM))
    kind = data.draw(st.sampled_from(["multipart/form-data; boundary=B", kind]))
    assert (read_or_refused(lambda: only_file(kind, memoryview(sent))) or b"") in sent


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@given(
    st.dictionaries(st.sampled_from(["name", "datatype", "shape", "data", "parameters"]), json_values),
    st.dictionaries(st.sampled_from(["id", "outputs", "parameters"]), json_values),
)
@settings(max_examples=300, deadline=None)
def test_any_json_in_any_field_is_read_or_refused(tensor: dict[str, Any], document: dict[str, Any]):
    good = {"name": "x", "datatype": "FP32", "shape": [1], "data": [1]}
    with contextlib.suppress(ServeError):
        decode(json.dumps({"inputs": [{**good, **tensor}], **document}).encode())
