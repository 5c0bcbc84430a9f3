"""A graph in other arithmetic: its body in fp16 or int8, by the tools of ONNX Runtime.

The body is what lies between the first and the last Conv, Gemm or MatMul. The preprocessing before it and the head and
softmax after it stay in fp32: they take next to no time, and the head's rounding would go straight into the logits.
"""

import tempfile
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import onnx

from headstart.serving.errors import PackageError, first_line
from headstart.serving.graph import reads, rename
from headstart.serving.parity import Images
from headstart.serving.runtime import INPUT

_HEAVY = {"Conv", "ConvTranspose", "Gemm", "MatMul"}
_LARGEST_FP16 = 65504.0
# In fp16 LayerNormalization may give other results from the second run on (microsoft/onnxruntime#27768), and Gelu with
# LayerNormalization behind it ends ONNX Runtime 1.31 with a segmentation fault on a CPU: a test has the four nodes.
_KEPT_FP32 = ("LayerNormalization", "Gelu")


def convert_body(name: str, model: Path, calibration: Iterable[Images]) -> tuple[onnx.ModelProto, int]:
    """A package's graph in another arithmetic, and the number of images that it was calibrated with.

    Args:
        name: `fp16` or `int8`.
        model: the fp32 graph, its external data beside it; read only.
        calibration: real images, uint8 [H, W, 3], of any sizes. Their activations give int8 its ranges, and are looked
            at for what is too large for fp16: a CPU, which computes in fp32 between them, would not show it.

    Raises:
        PackageError: there is no body, it has activations too large for fp16, or the tools cannot convert it.
        ValueError: another name.
    """
    if name not in ("fp16", "int8"):
        raise ValueError(f"name is {name!r}; accepted: fp16, int8")
    reader = _Reader(calibration)
    large = any(model.parent.glob(f"{model.name}.*"))
    try:
        with tempfile.TemporaryDirectory(prefix="headstart-") as folder:
            prepared = _prepared(model, Path(folder), large)
            if name == "int8":
                graph = _int8(prepared, reader, large)
            else:
                graph = _fp16(model)
                if not (largest := _largest(prepared, reader, large)) <= _LARGEST_FP16:
                    raise PackageError(
                        f"the graph has activations of {largest:.3g} and fp16 ends at {_LARGEST_FP16:g}; "
                        "leave fp16 out of export.variants"
                    )
    except PackageError:
        raise
    # The tools raise nearly anything, ONNX Runtime's own errors among it.
    except Exception as error:
        raise PackageError(
            f"the graph cannot be converted to {name}: {first_line(error)}; leave {name} out of export.variants"
        ) from error
    for part in ("value_info", "doc_string", "metadata_props"):
        graph.graph.ClearField(part)
    graph.ClearField("metadata_props")
    graph.producer_name = "headstart"
    return graph, reader.num_images


class _Reader:
    """Images one by one, as the tools ask for them."""

    def __init__(self, images: Iterable[Images]) -> None:
        self.images = iter(images)
        self.num_images = 0

    def get_next(self) -> dict[str, Images] | None:
        image = next(self.images, None)
        if image is None:
            return None
        self.num_images += 1
        return {INPUT: image[None]}


def _prepared(model: Path, folder: Path, large: bool) -> Path:
    """A copy with constants folded and normalisations fused into their convolutions."""
    from onnxruntime.quantization import quant_pre_process

    prepared = folder / "prepared.onnx"
    # Its own symbolic shape inference fails on images of free size.
    quant_pre_process(model, prepared, skip_symbolic_shape=True, save_as_external_data=large)
    return prepared


def _body(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """The nodes that depend on the first Conv, Gemm or MatMul and on which the last one depends, in their order."""
    heavy = [node for node in graph.node if node.op_type in _HEAVY]
    if len(heavy) < 2:
        raise PackageError(f"the graph has {len(heavy)} Conv, Gemm or MatMul; nothing lies before its head to convert")
    producers = {output: node for node in graph.node for output in node.output}
    needed, pending = set[str](), list(reads(heavy[-1]))
    while pending:
        tensor = pending.pop()
        if tensor in producers and tensor not in needed:
            needed.add(tensor)
            pending.extend(reads(producers[tensor]))
    body: list[onnx.NodeProto] = []
    made = set[str]()
    for node in graph.node:
        if needed.intersection(node.output) and (node.op_type in _HEAVY or made.intersection(reads(node))):
            made.update(node.output)
            body.append(node)
    return body


def _fp16(path: Path) -> onnx.ModelProto:
    """The graph with its body in fp16, which takes fp32 and gives fp32.

    The body is cut out, converted alone and put back, because the tool (ONNX Runtime 1.31) rounds to fp16 between any
    two nodes that it is told to leave alone.
    """
    from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16

    model = onnx.load(path, load_external_data=False)
    inferred = onnx.shape_inference.infer_shapes(model)  # before the weights are there: it ends at 2 GiB
    types = {value.name: value for value in inferred.graph.value_info}
    onnx.load_external_data_for_model(model, str(path.parent))
    graph = model.graph
    body = _body(graph)
    made = [output for node in body for output in node.output if output]
    read = set(filter(None, (tensor for node in body for tensor in reads(node))))
    others = [node for node in graph.node if not set(made).intersection(node.output)]
    wanted = {tensor for node in others for tensor in reads(node)} | {value.name for value in graph.output}
    constants = [tensor for tensor in graph.initializer if tensor.name in read]
    takes = sorted(read - {*made} - {tensor.name for tensor in constants})
    gives = [tensor for tensor in made if tensor in wanted]
    values = {**types, **{value.name: value for value in (*graph.input, *graph.output)}}
    piece = onnx.helper.make_graph(body, "body", [values[n] for n in takes], [values[n] for n in gives], constants)
    # All inner types, since the tool's own inference would end at 2 GiB as well.
    piece.value_info.extend(types[tensor] for tensor in made if tensor in types and tensor not in gives)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one for each weight that is too small for fp16
        half = convert_float_to_float16(
            onnx.helper.make_model(piece, opset_imports=model.opset_import),
            keep_io_types=True,
            disable_shape_infer=True,
            op_block_list=[*DEFAULT_OP_BLOCK_LIST, *_KEPT_FP32],
        )
    rename(half.graph, "fp16/", {name: name for name in (*takes, *gives)})
    # One cast for each node that stays in fp32, all of one name where these read the same tensor.
    halves = {tuple(node.output): node for node in half.graph.node}
    initializers = [tensor for tensor in graph.initializer if tensor.name in wanted] + [*half.graph.initializer]
    nodes = list(_sorted([*others, *halves.values()]))
    del graph.node[:], graph.initializer[:]
    graph.node.extend(nodes)
    graph.initializer.extend(initializers)
    return model


def _sorted(nodes: list[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """Nodes in an order in which each reads what earlier ones made; ONNX asks for it."""
    pending = {output for node in nodes for output in node.output}
    while nodes:
        waiting = []
        for node in nodes:
            if pending.intersection(reads(node)):
                waiting.append(node)
            else:
                pending.difference_update(node.output)
                yield node
        nodes = waiting


def _int8(prepared: Path, reader: _Reader, large: bool) -> onnx.ModelProto:
    """The graph with its body quantised, per channel and with ranges from images.

    Activations are unsigned and weights signed and of 7 bits: the one pair that is fast on x86 (signed activations
    made MobileNetV2 slower than fp32), and whose sums cannot overflow on processors without VNNI, so that the
    accuracy measured on one machine holds on the others.
    """
    from onnxruntime import quantization as tool

    model = onnx.load(prepared)
    for number, node in enumerate(model.graph.node):
        node.name = node.name or f"node{number}"
    quantised = prepared.with_name("quantised.onnx")
    tool.quantize_static(
        model,
        quantised,
        reader,
        quant_format=tool.QuantFormat.QDQ,
        per_channel=True,
        reduce_range=True,
        activation_type=tool.QuantType.QUInt8,
        weight_type=tool.QuantType.QInt8,
        nodes_to_quantize=[node.name for node in _body(model.graph)],
        use_external_data_format=large,
    )
    return onnx.load(quantised)


def _largest(prepared: Path, reader: _Reader, large: bool) -> float:
    """The largest absolute activation that the body takes or makes: either is held in fp16."""
    from onnxruntime import quantization as tool

    calibrator = tool.calibrate.create_calibrator(
        prepared, augmented_model_path=str(prepared.with_name("ranges.onnx")), use_external_data_format=large
    )
    calibrator.collect_data(reader)
    ranges = calibrator.compute_data()
    body = _body(onnx.load(prepared, load_external_data=False).graph)
    held = {tensor for node in body for tensor in (*reads(node), *node.output)}
    # Not max(): a NaN must come through.
    return float(np.max([np.abs(ranges[name].range_value).max() for name in ranges.keys() if name in held]))  # noqa: SIM118
