"""How a contender is asked, and what its answer says: requests are built once, answers are decoded after the clock."""

import base64
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.serving.models import NAME

_DATATYPES = {"float32": "FP32", "uint8": "UINT8"}


@dataclass(frozen=True, kw_only=True)
class Format:
    """One way to ask."""

    encode: Callable[[NDArray[Any], str, str], bytes]
    """(a row [1, ...], the input's name, the output's name) -> what is sent."""
    decode: Callable[[bytes], NDArray[np.float32]]
    """An answer -> its numbers, float32 [C]."""
    is_grpc: bool = False


def _http(path: str, body: bytes, content_type: str, *extra: str) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", f"Content-Type: {content_type}", *extra]
    return "\r\n".join([*lines, f"Content-Length: {len(body)}", "", ""]).encode() + body


def _body(answer: bytes) -> bytes:
    return answer.partition(b"\r\n\r\n")[2]


def _document(row: NDArray[Any], name: str, output: str) -> dict[str, Any]:
    tensor = {"name": name, "datatype": _DATATYPES[str(row.dtype)], "shape": list(row.shape)}
    return {"inputs": [tensor], "outputs": [{"name": output}]}


def _encode_binary(row: NDArray[Any], name: str, output: str) -> bytes:
    document = _document(row, name, output)
    document["inputs"][0]["parameters"] = {"binary_data_size": row.nbytes}
    document["outputs"][0]["parameters"] = {"binary_data": True}
    head = json.dumps(document).encode()
    length = f"Inference-Header-Content-Length: {len(head)}"
    return _http(f"/v2/models/{NAME}/infer", head + row.tobytes(), "application/octet-stream", length)


def _decode_binary(answer: bytes) -> NDArray[np.float32]:
    head, _, body = answer.partition(b"\r\n\r\n")
    length = int(head.lower().split(b"\r\ninference-header-content-length:")[1].split(b"\r\n")[0])
    return np.frombuffer(body[length:], np.float32)


def _encode_numbers(row: NDArray[Any], name: str, output: str) -> bytes:
    document = _document(row, name, output)
    document["inputs"][0]["data"] = row.ravel().tolist()
    return _http(f"/v2/models/{NAME}/infer", json.dumps(document).encode(), "application/json")


def _decode_numbers(answer: bytes) -> NDArray[np.float32]:
    return np.array(json.loads(_body(answer))["outputs"][0]["data"], np.float32).ravel()


def _encode_json(row: NDArray[Any], name: str, output: str) -> bytes:
    is_image = row.dtype == np.uint8
    document = {"image": base64.b64encode(row.tobytes()).decode()} if is_image else {"inputs": row.tolist()}
    return _http("/predict", json.dumps(document).encode(), "application/json")


def _decode_json(answer: bytes) -> NDArray[np.float32]:
    return np.array(json.loads(_body(answer))["outputs"], np.float32).ravel()


def _encode_rows(row: NDArray[Any], name: str, output: str) -> bytes:
    rows = [base64.b64encode(row.tobytes()).decode()] if row.dtype == np.uint8 else row.tolist()
    return _http("/predict-rows", json.dumps({"rows": rows}).encode(), "application/json")


def _encode_bytes(row: NDArray[Any], name: str, output: str) -> bytes:
    return _http("/bytes", row.tobytes(), "application/octet-stream")


def _encode_grpc(row: NDArray[Any], name: str, output: str) -> bytes:
    from tritonclient.grpc import service_pb2

    tensor = service_pb2.ModelInferRequest.InferInputTensor(
        name=name, datatype=_DATATYPES[str(row.dtype)], shape=list(row.shape)
    )
    wanted = service_pb2.ModelInferRequest.InferRequestedOutputTensor(name=output)
    request = service_pb2.ModelInferRequest(
        model_name=NAME, inputs=[tensor], outputs=[wanted], raw_input_contents=[row.tobytes()]
    )
    message: bytes = request.SerializeToString()
    return message


def _decode_grpc(answer: bytes) -> NDArray[np.float32]:
    from tritonclient.grpc import service_pb2

    response = service_pb2.ModelInferResponse.FromString(answer)
    return np.frombuffer(response.raw_output_contents[0], np.float32)


FORMATS = {
    "binary": Format(encode=_encode_binary, decode=_decode_binary),
    "JSON": Format(encode=_encode_numbers, decode=_decode_numbers),
    "gRPC": Format(encode=_encode_grpc, decode=_decode_grpc, is_grpc=True),
    "own JSON": Format(encode=_encode_json, decode=_decode_json),
    "own JSON of rows": Format(
        encode=_encode_rows, decode=lambda answer: np.array(json.loads(_body(answer)), np.float32).ravel()
    ),
    "bytes": Format(encode=_encode_bytes, decode=lambda answer: np.frombuffer(_body(answer), np.float32)),
}
"""The protocol's binary extension, its JSON and its gRPC; and where a server has no protocol, JSON of the server's own
(an image in base64; one row, or a list of rows) and a row's bytes as the body."""
