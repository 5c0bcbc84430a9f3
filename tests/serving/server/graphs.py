"""Small ONNX graphs and packages, built in milliseconds, whose answers say which of them ran."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from headstart.serving.manifest import MANIFEST, Latency, Manifest, Parity, ParityRow, Tensor
from headstart.serving.package import MODEL, verify

LABELS = ("red", "green", "blue")
MARK = 1000.0  # a package's logits are its mark times this, plus the mean of each channel


def model_bytes(nodes: list[Any], inputs: list[Any], outputs: list[Any], constants: dict[str, np.ndarray]) -> bytes:
    graph = helper.make_graph(
        nodes, "small", inputs, outputs, [numpy_helper.from_array(value, name) for name, value in constants.items()]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model)
    return model.SerializeToString()


def value(name: str, shape: list[int | str], dtype: int = TensorProto.FLOAT) -> Any:
    return helper.make_tensor_value_info(name, dtype, shape)


def mlp(features: int = 16, hidden: int = 32, classes: int = 5) -> bytes:
    """`x` float32 [batch, features] -> `y` float32 [batch, classes]."""
    random = np.random.default_rng(0)
    first = random.normal(size=(features, hidden)).astype(np.float32)
    second = random.normal(size=(hidden, classes)).astype(np.float32)
    nodes = [
        helper.make_node("MatMul", ["x", "first"], ["a"]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("MatMul", ["b", "second"], ["y"]),
    ]
    inputs, outputs = [value("x", ["batch", features])], [value("y", ["batch", classes])]
    return model_bytes(nodes, inputs, outputs, {"first": first, "second": second})


def looping(turns: int, size: int = 64) -> bytes:
    """`x` float32 [batch, size] -> `y` of that shape and x's values, after `turns` products that take their time."""
    body = helper.make_graph(
        [
            helper.make_node("MatMul", ["state", "identity"], ["next"]),
            helper.make_node("Identity", ["go"], ["go_on"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("turn", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            value("state", ["batch", size]),
        ],
        [helper.make_tensor_value_info("go_on", TensorProto.BOOL, []), value("next", ["batch", size])],
    )
    nodes = [helper.make_node("Loop", ["turns", "", "x"], ["y"], body=body)]
    constants = {"turns": np.array(turns, np.int64), "identity": np.eye(size, dtype=np.float32)}
    return model_bytes(nodes, [value("x", ["batch", size])], [value("y", ["batch", size])], constants)


def identities(dtypes: dict[str, int]) -> bytes:
    """An input `in_NAME` and an output `out_NAME` [batch, 2] of each type."""
    nodes = [helper.make_node("Identity", [f"in_{name}"], [f"out_{name}"]) for name in dtypes]
    inputs = [value(f"in_{name}", ["batch", 2], dtype) for name, dtype in dtypes.items()]
    outputs = [value(f"out_{name}", ["batch", 2], dtype) for name, dtype in dtypes.items()]
    return model_bytes(nodes, inputs, outputs, {})


def classifier(mark: float, *, turns: int = 0, line: int | None = None) -> bytes:
    """`images` uint8 [batch, height, width, 3] -> `logits` = 1000 mark + mean of each channel, `probabilities`.

    `turns` of a loop make it slow; `line` makes it fail on images that have no such line.
    """
    body_inputs = [
        helper.make_tensor_value_info("turn", TensorProto.INT64, []),
        helper.make_tensor_value_info("go", TensorProto.BOOL, []),
        value("state", ["batch", "height", "width", 3]),
    ]
    body = helper.make_graph(
        [helper.make_node("Mul", ["state", "one"], ["next"]), helper.make_node("Identity", ["go"], ["go_on"])],
        "body",
        body_inputs,
        [
            helper.make_tensor_value_info("go_on", TensorProto.BOOL, []),
            value("next", ["batch", "height", "width", 3]),
        ],
    )
    nodes = [
        helper.make_node("Cast", ["images"], ["pixels"], to=TensorProto.FLOAT),
        helper.make_node("Loop", ["turns", "", "pixels"], ["same"], body=body),
        helper.make_node("Gather", ["same", "line"], ["looked_at"], axis=1),
        helper.make_node("ReduceMean", ["same" if line is None else "looked_at", "axes"], ["means"], keepdims=0),
        helper.make_node("Add", ["means", "mark"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["probabilities"], axis=1),
    ]
    constants = {
        "turns": np.array(turns, np.int64),
        "one": np.array(1, np.float32),
        "axes": np.array([1, 2], np.int64),
        "line": np.array([line or 0], np.int64),
        "mark": np.full(3, MARK * mark, np.float32),
    }
    outputs = [value(name, ["batch", 3]) for name in ("logits", "probabilities")]
    inputs = [value("images", ["batch", "height", "width", 3], TensorProto.UINT8)]
    return model_bytes(nodes, inputs, outputs, constants)


def logits(images: np.ndarray, mark: float) -> np.ndarray:
    """What a package of this mark answers, float32 [N, 3]."""
    return images.astype(np.float32).mean((1, 2)) + np.float32(MARK * mark)


def write_package(folder: Path, mark: float, *, graph: bytes | None = None, **changes: Any) -> Path:
    """A package that verifies, of a graph that `mark` tells from others."""
    folder.mkdir(parents=True)
    graph = graph or classifier(mark)
    (folder / MODEL).write_bytes(graph)
    rows = tuple(
        ParityRow(
            batch=batch, num_images=16, difference=0, relative_difference=0, top1_agreement=1, num_disagreements=0
        )
        for batch in (1, 2, 16)
    )
    fields: dict[str, Any] = {
        "name": f"mark-{mark:g}",
        "inputs": (Tensor(name="images", dtype="uint8", shape=("batch", "height", "width", 3)),),
        "outputs": tuple(
            Tensor(name=name, dtype="float32", shape=("batch", 3)) for name in ("logits", "probabilities")
        ),
        "labels": LABELS,
        "preprocessing": {},
        "temperature": 1.0,
        "parity": Parity(tolerance=1e-3, provider="CPUExecutionProvider", rows=rows),
        "latency": Latency(
            batch=1,
            shape=(1, 4, 4, 3),
            runs=1,
            provider="CPUExecutionProvider",
            threads=1,
            predict_p50_ms=1.0,
            session_run_p50_ms=1.0,
            ratio=1.0,
        ),
        "licence": "not stated",
        "provenance": {},
        "files": {MODEL: hashlib.sha256(graph).hexdigest()},
        "created": "2026-01-01T00:00:00+00:00",
    }
    (folder / MANIFEST).write_text(Manifest(**{**fields, **changes}).to_json())
    if not changes:
        verify(folder)
    return folder


def rewrite_manifest(folder: Path, **changes: Any) -> None:
    """Change a package's manifest as a text, with what it says of its files left as it was."""
    document = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({**document, **changes}))
