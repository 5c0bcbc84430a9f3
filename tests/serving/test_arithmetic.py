"""What of a graph is converted, and what is too large for it: graphs of a few nodes, each with one hard thing."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from headstart.serving.arithmetic import convert_body
from headstart.serving.errors import PackageError
from headstart.serving.runtime import open_session

Nodes = Sequence[onnx.NodeProto]
IMAGES = list(np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), np.uint8))
BEFORE = [helper.make_node("Mul", ["numbers", "scale"], ["scaled"])]
MIDDLE = [helper.make_node("Relu", ["maps"], ["active"])]
HEAD = [helper.make_node("Gemm", ["features", "head"], ["logits"])]


def write(
    folder: Path, *, before: Nodes = BEFORE, middle: Nodes = MIDDLE, head: Nodes = HEAD, **changes: NDArray[Any] | float
) -> Path:
    """`before` makes `scaled` of `numbers`, a Conv `maps`, `middle` `active`, and `head` `logits` of their `features`.

    No node has a name. `changes` take the place of constants or are new ones.
    """
    random = np.random.default_rng(1)
    constants = {"scale": 1 / 255, "bias": np.zeros(4)} | changes
    constants.setdefault("weight", random.normal(size=(4, 3, 3, 3)))
    constants.setdefault("head", random.normal(size=(4, 5)))
    nodes = [
        helper.make_node("Cast", ["images"], ["numbers"], to=TensorProto.FLOAT),
        *before,
        helper.make_node("Transpose", ["scaled"], ["pixels"], perm=[0, 3, 1, 2]),
        helper.make_node("Conv", ["pixels", "weight", "bias"], ["maps"]),
        *middle,
        helper.make_node("GlobalAveragePool", ["active"], ["mean"]),
        helper.make_node("Flatten", ["mean"], ["features"]),
        *head,
    ]
    images = helper.make_tensor_value_info("images", TensorProto.UINT8, ["batch", "height", "width", 3])
    outputs = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", width])
        for name, width in (("logits", 5), ("features", 4))
    ]
    tensors = [numpy_helper.from_array(np.asarray(value, np.float32), name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "small", [images], outputs, tensors)
    path = folder / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


def converted(name: str, path: Path) -> onnx.ModelProto:
    """The graph in another arithmetic, which is sound and computes nearly what it did."""
    graph, num_images = convert_body(name, path, IMAGES)
    assert num_images == len(IMAGES)
    onnx.checker.check_model(graph, full_check=True)
    found, expected = (
        open_session(model).run(None, {"images": np.stack(IMAGES)}) for model in (graph.SerializeToString(), path)
    )
    for ours, theirs in zip(found, expected, strict=True):
        assert np.abs(ours - theirs).max() < (5e-3 if name == "fp16" else 0.1) * np.abs(theirs).max()
    return graph


def constants(graph: onnx.ModelProto) -> dict[str, NDArray[Any]]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.graph.initializer}


def of_kind(graph: onnx.ModelProto, kind: str) -> onnx.NodeProto:
    return next(node for node in graph.graph.node if node.op_type == kind)


def maker(graph: onnx.ModelProto, tensor: str) -> onnx.NodeProto:
    return next(node for node in graph.graph.node if tensor in node.output)


TOO_LARGE: dict[str, tuple[dict[str, Any], str]] = {
    "far below zero": ({"bias": np.full(4, -1e5)}, r"1e\+05"),
    "what the body takes": ({"scale": 1e3, "weight": np.full((4, 3, 3, 3), 1e-4)}, r"2\.55e\+05"),
    "not a number": ({"bias": np.full(4, -1e3), "middle": [helper.make_node("Sqrt", ["maps"], ["active"])]}, "nan"),
}


@pytest.mark.parametrize("name", TOO_LARGE)
def test_what_fp16_cannot_hold_is_refused(name: str, tmp_path: Path):
    changes, largest = TOO_LARGE[name]
    with pytest.raises(PackageError, match=f"activations of {largest} and fp16 ends at 65504"):
        convert_body("fp16", write(tmp_path, **changes), IMAGES)


def test_another_name_is_not_taken_for_fp16(tmp_path: Path):
    with pytest.raises(ValueError, match="name is 'bf16'; accepted: fp16, int8"):
        convert_body("bf16", write(tmp_path), IMAGES)


def test_large_numbers_outside_of_the_body_stay_in_fp32(tmp_path: Path):
    before = [
        helper.make_node("Mul", ["numbers", "large"], ["far"]),
        helper.make_node("Div", ["far", "larger"], ["scaled"]),
    ]
    head = [
        helper.make_node("Gemm", ["features", "head"], ["row"]),
        helper.make_node("Mul", ["row", "large"], ["logits"]),
    ]
    converted("fp16", write(tmp_path, before=before, head=head, large=1e6, larger=255e6))


def test_nodes_that_fp16_does_not_suit_stay_in_fp32(tmp_path: Path):
    middle = [
        helper.make_node("Gelu", ["maps"], ["bent"]),
        helper.make_node("LayerNormalization", ["bent", "ones"], ["normal"]),
        helper.make_node("Max", ["bent", "floor"], ["high"]),  # of the tensor that another one reads
        helper.make_node("Add", ["normal", "high"], ["active"]),
    ]
    graph = converted("fp16", write(tmp_path, middle=middle, ones=np.ones(6), floor=-1.0))
    for kind in ("Gelu", "LayerNormalization", "Max"):
        cast = maker(graph, of_kind(graph, kind).input[0])
        assert (cast.op_type, cast.attribute[0].i) == ("Cast", TensorProto.FLOAT), kind
    assert constants(graph)[of_kind(graph, "LayerNormalization").input[1]].dtype == np.float32
    assert constants(graph)[of_kind(graph, "Conv").input[1]].dtype == np.float16


def test_a_constant_of_the_body_may_be_one_of_the_preprocessing_too(tmp_path: Path):
    middle = [helper.make_node("Mul", ["maps", "scale"], ["active"])]
    head = [helper.make_node("MatMul", ["features", "head"], ["logits"])]
    graph = converted("fp16", write(tmp_path, middle=middle, head=head))
    assert constants(graph)["scale"].dtype == np.float32


@pytest.mark.parametrize("name", ["fp16", "int8"])
def test_features_within_the_body_are_an_output_still(name: str, tmp_path: Path):
    """The head has two layers, of which the first belongs to the body."""
    head = [
        helper.make_node("Gemm", ["features", "square"], ["row"]),
        helper.make_node("Relu", ["row"], ["hidden"]),
        helper.make_node("Gemm", ["hidden", "head"], ["logits"]),
    ]
    converted(name, write(tmp_path, head=head, square=np.random.default_rng(2).normal(size=(4, 4))))


def test_an_output_without_a_name_is_not_an_input_without_one(tmp_path: Path):
    """Dropout leaves out its mask and the head its bias: nothing leads from the one to the other."""
    head = [
        helper.make_node("Gemm", ["features", "head", ""], ["row"]),
        helper.make_node("Dropout", ["row"], ["logits", ""]),
    ]
    graph = converted("fp16", write(tmp_path, head=head))
    assert constants(graph)[of_kind(graph, "Gemm").input[1]].dtype == np.float32


def test_int8_has_a_scale_for_each_channel_and_unsigned_activations(tmp_path: Path):
    graph = converted("int8", write(tmp_path, weight=np.geomspace(1e-2, 1, 108).reshape(4, 3, 3, 3)))
    pixels, weight = (maker(graph, tensor) for tensor in of_kind(graph, "Conv").input[:2])
    assert (pixels.op_type, weight.op_type) == ("DequantizeLinear", "DequantizeLinear")
    assert constants(graph)[pixels.input[2]].dtype == np.uint8
    integers, scales = (constants(graph)[name] for name in weight.input[:2])
    assert integers.dtype == np.int8
    # Channel by channel, so that the smallest has all steps as well.
    np.testing.assert_array_equal(np.abs(integers).max(axis=(1, 2, 3)), np.full(4, 64))
    assert scales.shape == (4,)
    assert constants(graph)[of_kind(graph, "Gemm").input[1]].dtype == np.float32
