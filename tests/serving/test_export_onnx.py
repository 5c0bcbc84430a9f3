"""An ONNX graph between PyTorch stages: cut, brought to one opset, joined, and equal to its parts."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from headstart.serving.errors import PackageError
from headstart.serving.graph import OnnxStage, cut
from headstart.serving.runtime import Predictor, open_session

from .conftest import Model, Net, Pixels


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network exported by PyTorch at opset 18, which ends in a softmax that the next stage must not see."""

    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net(7, seed=3)

        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            return torch.softmax(self.net(pixels), dim=1)

    path = tmp_path_factory.mktemp("onnx") / "backbone.onnx"
    torch.onnx.export(
        Classifier().eval(),
        (torch.zeros(2, 3, 32, 32),),
        path,
        dynamo=True,
        opset_version=18,
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        input_names=["pixels"],
        output_names=["shares"],
        external_data=False,
        verbose=False,
    )
    return path


def inner_tensor(path: Path) -> str:
    """What the last Softmax of a graph reads."""
    return next(node.input[0] for node in onnx.load(path).graph.node if node.op_type == "Softmax")


def joined(model: Model, directory: Path, stage: OnnxStage, head: nn.Module, pixels: nn.Module) -> Any:
    """Export, with the stage's own file under ONNX Runtime as the reference."""
    graph = onnx.load(stage.path)
    graph.graph.output.append(onnx.ValueInfoProto(name=stage.output))
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])

    def reference(images: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            (features,) = session.run([stage.output], {stage.input: pixels(torch.from_numpy(images)).numpy()})
            return head(torch.from_numpy(features)).numpy()

    manifest = model.export(directory, stages=[pixels, stage, head], reference=reference)
    return manifest, reference


def test_a_cut_backbone_between_torch_stages_equals_its_parts(model: Model, backbone: Path, tmp_path: Path):
    torch.manual_seed(0)
    stage = OnnxStage(path=backbone, input="pixels", output=inner_tensor(backbone))
    manifest, reference = joined(model, tmp_path / "package", stage, nn.Linear(7, 5), Pixels(36, 32))
    assert manifest.inputs[0].shape == ("batch", "height", "width", 3)
    assert manifest.provenance["versions"]["opset"] == "20"
    predictor = Predictor(tmp_path / "package")
    for size in [(1, 30, 40), (3, 64, 33), (11, 32, 32)]:
        images = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
        np.testing.assert_allclose(predictor.predict(images)[0], reference(images), atol=2e-6)
    graph = onnx.load(tmp_path / "package" / "model.onnx")
    assert [node.op_type for node in graph.graph.node].count("Softmax") == 1
    onnx.checker.check_model(graph, full_check=True)
    assert not graph.metadata_props


def hand_made(path: Path, *, opset: int, batch: int | str = "n") -> Path:
    """flat [n, 12] -> If(max > 0: flat @ weight, else flat @ -weight); the bodies capture outer tensors."""
    weight = np.random.default_rng(0).normal(size=(12, 5)).astype(np.float32)
    minus = helper.make_node("Neg", ["weight"], ["minus"])
    bodies = [
        helper.make_graph(
            [helper.make_node("MatMul", ["flat", name], [f"{name}_out"])],
            name,
            [],
            [helper.make_tensor_value_info(f"{name}_out", TensorProto.FLOAT, None)],
        )
        for name in ("weight", "minus")
    ]
    nodes = [
        helper.make_node("Reshape", ["x", "shape"], ["flat"]),
        minus,
        helper.make_node("ReduceMax", ["flat"], ["high"], keepdims=0),
        helper.make_node("Greater", ["high", "zero"], ["positive"]),
        helper.make_node("If", ["positive"], ["y"], then_branch=bodies[0], else_branch=bodies[1]),
        helper.make_node("Softmax", ["y"], ["shares"]),
    ]
    constants = {"shape": np.array([-1, 12], np.int64), "zero": np.float32(0), "weight": weight}
    graph = helper.make_graph(
        nodes,
        "made by hand",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, 3, 2, 2])],
        [helper.make_tensor_value_info("shares", TensorProto.FLOAT, [batch, 5])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
        value_info=[helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch, 5])],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8), path)
    return path


@pytest.mark.parametrize(("opset", "expected"), [(13, "20"), (20, "20"), (21, "21")])
def test_old_and_new_opsets_and_bodies_that_capture(model: Model, tmp_path: Path, opset: int, expected: str):
    path = hand_made(tmp_path / "hand.onnx", opset=opset)
    stage = OnnxStage(path=path, input="x", output="y")
    manifest, reference = joined(model, tmp_path / "package", stage, nn.Identity(), Pixels(2, 2))
    assert manifest.provenance["versions"]["opset"] == expected
    images = np.random.default_rng(1).integers(0, 256, (3, 9, 12, 3), np.uint8)
    np.testing.assert_allclose(Predictor(tmp_path / "package").predict(images)[0], reference(images), atol=2e-6)


def with_weights_among_the_inputs(graph: onnx.ModelProto) -> None:
    """As IR 3 asked for."""
    graph.graph.input.append(helper.make_tensor_value_info("weight", TensorProto.FLOAT, [12, 5]))


def with_the_default_domain_by_its_name(graph: onnx.ModelProto) -> None:
    graph.opset_import[0].domain = "ai.onnx"


def with_an_output_left_out(graph: onnx.ModelProto) -> None:
    """And an input left out by a node before it, which does not lead there."""
    next(node for node in graph.graph.node if node.op_type == "ReduceMax").input.append("")
    graph.graph.node.append(helper.make_node("Dropout", ["shares"], ["kept", ""]))


def with_a_sparse_weight(graph: onnx.ModelProto) -> None:
    weight = next(tensor for tensor in graph.graph.initializer if tensor.name == "weight")
    values = numpy_helper.to_array(weight)
    graph.graph.initializer.remove(weight)
    tensors = (numpy_helper.from_array(values.ravel(), "weight"), numpy_helper.from_array(np.arange(values.size), ""))
    graph.graph.sparse_initializer.append(helper.make_sparse_tensor(*tensors, values.shape))


def with_a_local_function(graph: onnx.ModelProto) -> None:
    flatten = next(node for node in graph.graph.node if node.op_type == "Reshape")
    body = helper.make_node("Reshape", ["x", "shape"], ["flat"])
    versions = list(graph.opset_import)
    graph.functions.append(helper.make_function("mine", "Flat", ["x", "shape"], ["flat"], [body], versions))
    graph.opset_import.append(helper.make_opsetid("mine", 1))
    flatten.domain, flatten.op_type = "mine", "Flat"


MANNERS = [
    with_weights_among_the_inputs, with_the_default_domain_by_its_name, with_an_output_left_out, with_a_sparse_weight,
    with_a_local_function,
]  # fmt: skip


@pytest.mark.parametrize("change", MANNERS)
def test_graphs_are_written_in_more_than_one_manner(
    model: Model, tmp_path: Path, change: Callable[[onnx.ModelProto], None]
):
    graph = onnx.load(hand_made(tmp_path / "hand.onnx", opset=20))
    change(graph)
    onnx.save(graph, tmp_path / "hand.onnx")
    stage = OnnxStage(path=tmp_path / "hand.onnx", input="x", output="y")
    _, reference = joined(model, tmp_path / "package", stage, nn.Identity(), Pixels(2, 2))
    images = np.random.default_rng(1).integers(0, 256, (3, 9, 12, 3), np.uint8)
    np.testing.assert_allclose(Predictor(tmp_path / "package").predict(images)[0], reference(images), atol=2e-6)


def test_a_cut_begins_at_an_inner_tensor_whose_type_is_known(tmp_path: Path):
    path = hand_made(tmp_path / "hand.onnx", opset=20)
    stage = OnnxStage(path=path, input="flat", output="y")
    with pytest.raises(PackageError, match="'flat' to be its input; accepted: x or an inner tensor whose type"):
        cut(stage)
    graph = onnx.load(path)
    graph.graph.value_info.append(helper.make_tensor_value_info("flat", TensorProto.FLOAT, ["n", 12]))
    onnx.save(graph, path)
    flat = np.random.default_rng(1).normal(size=(3, 12)).astype(np.float32)
    (found,) = open_session(cut(stage).SerializeToString()).run(None, {"flat": flat})
    whole = open_session(_with_output(stage).SerializeToString())
    np.testing.assert_allclose(found, whole.run(["y"], {"x": flat.reshape(3, 3, 2, 2)})[0], atol=1e-6)


def test_the_last_stage_may_be_an_onnx_graph(model: Model, tmp_path: Path):
    stage = OnnxStage(path=hand_made(tmp_path / "hand.onnx", opset=18), input="x", output="y")
    session = onnxruntime.InferenceSession(_with_output(stage).SerializeToString(), providers=["CPUExecutionProvider"])
    pixels = Pixels(2, 2)
    manifest = model.export(
        tmp_path / "package",
        stages=[pixels, stage],
        reference=lambda images: session.run(["y"], {"x": pixels(torch.from_numpy(images)).numpy()})[0],
    )
    assert manifest.outputs[1].name == "probabilities"


def _with_output(stage: OnnxStage) -> Any:
    graph = onnx.load(stage.path)
    graph.graph.output.append(onnx.ValueInfoProto(name=stage.output))
    return graph


def test_what_cannot_be_joined_is_refused(model: Model, tmp_path: Path):
    hand = hand_made(tmp_path / "hand.onnx", opset=18)
    fixed = hand_made(tmp_path / "fixed.onnx", opset=18, batch=1)
    (tmp_path / "text.onnx").write_text("not a graph")
    refusals = [
        (
            OnnxStage(path=hand, input="x", output="pooled"),
            "'pooled' to be its output; accepted: shares",
        ),
        (OnnxStage(path=hand, input="pixels", output="y"), "'pixels' to be its input; accepted: x"),
        (OnnxStage(path=hand, input="y", output="flat"), "depends on the input x"),
        (OnnxStage(path=fixed, input="x", output="y"), "batch of x is fixed to 1"),
        (OnnxStage(path=tmp_path / "text.onnx", input="x", output="y"), "cannot be read as an ONNX graph"),
        (OnnxStage(path=tmp_path / "absent.onnx", input="x", output="y"), "cannot be read as an ONNX graph"),
        (OnnxStage(path=hand, input="x", output="positive"), "row for each image"),
    ]
    for stage, reason in refusals:
        with pytest.raises(PackageError, match=reason):
            model.export(tmp_path / "package", stages=[Pixels(2, 2), stage])
    with pytest.raises(PackageError, match=r"hand\.onnx cannot take the torch\.float32 \[2, 3, 5, 5\]"):
        model.export(tmp_path / "package", stages=[Pixels(5, 5), OnnxStage(path=hand, input="x", output="y")])
    assert not (tmp_path / "package").exists()
