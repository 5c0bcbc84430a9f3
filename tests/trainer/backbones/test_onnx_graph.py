"""Graphs as backbones: cut where the features are, one output [N, D], clear refusals."""

import hashlib
import pickle

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from headstart.trainer.backbones.onnx_graph import cut_graph
from headstart.trainer.backbones.weights import WeightsFile
from headstart.trainer.errors import SourceError
from headstart.trainer.inputs.preprocessing import Preprocessing

GREY = Preprocessing(resize=8, crop=8, channels=1, mean=(0.5,), std=(0.5,))


@pytest.fixture
def write(tmp_path):
    """Writes images [batch, 1, 8, 8] -> convolution -> maps -> mean -> flat [N, 4] -> linear -> softmax."""
    (tmp_path / "weights").mkdir()
    rng = np.random.default_rng(0)
    kernel, linear = rng.normal(size=(4, 1, 3, 3)), rng.normal(size=(4, 5))

    def make(batch: int | str = "batch", side: int = 8, classifier: bool = True) -> WeightsFile:
        nodes = [
            helper.make_node("Conv", ["images", "kernel"], ["maps"]),
            helper.make_node("GlobalAveragePool", ["maps"], ["mean"]),
            helper.make_node("Flatten", ["mean"], ["flat"]),
        ]
        if classifier:
            nodes += [
                helper.make_node("MatMul", ["flat", "linear"], ["logits"]),
                helper.make_node("Softmax", ["logits"], ["out"]),
            ]
        graph = helper.make_graph(
            nodes, "g",
            [helper.make_tensor_value_info("images", TensorProto.FLOAT, [batch, 1, side, side])],
            [helper.make_tensor_value_info("out" if classifier else "flat", TensorProto.FLOAT, [batch, None])],
            [numpy_helper.from_array(v.astype(np.float32), n) for n, v in (("kernel", kernel), ("linear", linear))],
        )  # fmt: skip
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 15)], ir_version=10)
        path = tmp_path / "g.onnx"
        onnx.save(model, path)
        return WeightsFile(path=path, sha256=hashlib.sha256(path.read_bytes()).hexdigest())

    make.kernel = torch.from_numpy(kernel.astype(np.float32))
    return make


@pytest.mark.parametrize("tensor", ["flat", "mean", "maps", ""], ids=["flat", "pooled", "maps", "found"])
def test_features_are_pooled_to_rows(write, tensor, tmp_path):
    graph = cut_graph(write(), tensor, GREY, tmp_path)
    pixels = torch.randn(3, 1, 8, 8)
    expected = torch.nn.functional.conv2d(pixels, write.kernel).mean(dim=(2, 3))
    torch.testing.assert_close(graph(pixels), expected)
    torch.testing.assert_close(graph(pixels[:1]), expected[:1])
    assert (graph.input_name, graph.output_name, graph.num_features) == ("images", "features", 4)
    assert graph.tensor == (tensor or "flat")
    cut = onnx.load(graph.path)
    assert [output.name for output in cut.graph.output] == ["features"]
    assert "MatMul" not in {node.op_type for node in cut.graph.node}


def test_graph_survives_pickling_without_its_session(write, tmp_path):
    graph = cut_graph(write(), "flat", GREY, tmp_path)
    pixels = torch.randn(2, 1, 8, 8)
    assert torch.equal(pickle.loads(pickle.dumps(graph))(pixels), graph(pixels))


def test_spoilt_copy_in_the_cache_is_cut_anew(write, tmp_path):
    path = cut_graph(write(), "flat", GREY, tmp_path).path
    path.write_bytes(b"spoilt")
    assert cut_graph(write(), "flat", GREY, tmp_path)(torch.zeros(1, 1, 8, 8)).shape == (1, 4)


def test_unknown_tensor_lists_the_last(write, tmp_path):
    with pytest.raises(SourceError, match="no tensor 'nothing'; its last ones are maps, mean, flat, logits, out"):
        cut_graph(write(), "nothing", GREY, tmp_path)


def test_graph_without_a_linear_layer_needs_a_name(write, tmp_path):
    with pytest.raises(SourceError, match="has no linear layer; name the tensor"):
        cut_graph(write(classifier=False), "", GREY, tmp_path)


@pytest.mark.parametrize(
    ("batch", "side", "message"),
    [
        (1, 8, r"images of shape \[1, 1, 8, 8\].*gives \['N', 1, 8, 8\]; .*with N dynamic"),
        ("batch", 16, r"images of shape \['N', 1, 16, 16\].*gives \['N', 1, 8, 8\]"),
    ],
    ids=["fixed-batch", "other-size"],
)
def test_shapes_are_checked(write, batch, side, message, tmp_path):
    with pytest.raises(SourceError, match=message):
        cut_graph(write(batch=batch, side=side), "flat", GREY, tmp_path)


def test_channels_are_checked(write, tmp_path):
    colour = Preprocessing(resize=8, crop=8, mean=(0.5,) * 3, std=(0.5,) * 3)
    with pytest.raises(SourceError, match=r"gives \['N', 3, 8, 8\]"):
        cut_graph(write(), "flat", colour, tmp_path)


def test_no_graph_at_all(tmp_path):
    path = tmp_path / "x.onnx"
    path.write_bytes(b"not a graph")
    with pytest.raises(SourceError, match="no valid ONNX graph"):
        cut_graph(WeightsFile(path=path, sha256="0" * 64), "", GREY, tmp_path)


def test_weights_in_other_files_are_refused(write, tmp_path):
    weights = write()
    onnx.save(onnx.load(weights.path), weights.path, save_as_external_data=True, size_threshold=0)
    with pytest.raises(SourceError, match="keeps its weights in other files; save it as one"):
        cut_graph(weights, "flat", GREY, tmp_path)
