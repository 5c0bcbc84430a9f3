"""ONNX graphs: a stretch cut out of a file, brought to a common opset, and joined in a row.

Imports onnx and not torch: what PyTorch computes comes here as a graph.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.inliner
import onnx.version_converter

from headstart.serving.errors import PackageError, first_line
from headstart.serving.manifest import FEATURES
from headstart.serving.runtime import INPUT, OUTPUTS

MAX_INLINE_BYTES = 1 << 30  # protobuf ends at 2 GiB; weights of larger graphs lie in model.onnx.data


@dataclass(frozen=True, kw_only=True)
class OnnxStage:
    """A stretch of an ONNX graph, used as it is between PyTorch stages."""

    path: Path
    """The graph's file; its external data lies beside it."""
    input: str
    """The tensor that takes the output of the stage before, of a recorded type; its first axis must be a free batch."""
    output: str
    """The tensor that the next stage takes: an output of the graph, or an inner tensor where it is cut."""


def cut(stage: OnnxStage) -> onnx.ModelProto:
    """The part of an ONNX file between two of its tensors.

    Written here because `onnx.utils.extract_model` (1.23) does not follow what the bodies of If and Loop
    capture, and needs shape inference to know the inner tensor.

    Raises:
        PackageError: the file is no ONNX graph, has no such tensors or a fixed batch, or the output depends on
            another input.
    """
    try:
        whole = inlined(onnx.load(stage.path))
    # protobuf's DecodeError and onnx's errors have no common base below Exception.
    except Exception as error:
        raise PackageError(
            f"{stage.path} cannot be read as an ONNX graph ({first_line(error)}); give another file"
        ) from error
    graph = whole.graph
    producers = {output: node for node in graph.node for output in node.output if output}
    known = {value.name: value for value in (*graph.value_info, *graph.output, *graph.input)}
    if stage.input not in known:
        raise PackageError(_unknown(stage, "input", stage.input, graph.input, "an inner tensor whose type it records"))
    if stage.output not in producers:
        raise PackageError(_unknown(stage, "output", stage.output, graph.output, "an inner tensor"))
    tensor_type = known[stage.input].type.tensor_type
    if tensor_type.shape.dim and tensor_type.shape.dim[0].HasField("dim_value"):
        raise PackageError(
            f"{stage.path}: the batch of {stage.input} is fixed to {tensor_type.shape.dim[0].dim_value}; "
            f"export that graph again with a free first axis"
        )
    needed, pending = {stage.input}, [stage.output]
    while pending:
        tensor = pending.pop()
        if tensor not in needed:
            needed.add(tensor)
            pending.extend(reads(producers[tensor]) if tensor in producers else ())
    constants = {tensor.name for tensor in graph.initializer}
    outside = {value.name for value in graph.input} - constants - {stage.input}
    if unbound := sorted(needed & outside):
        raise PackageError(f"{stage.path}: {stage.output} also depends on the input {unbound[0]}; cut elsewhere")
    piece = onnx.ModelProto(ir_version=whole.ir_version, opset_import=whole.opset_import)
    piece.graph.name = "cut"
    kept = needed - {stage.input}
    piece.graph.node.extend(node for node in graph.node if kept.intersection(node.output))
    piece.graph.initializer.extend(tensor for tensor in graph.initializer if tensor.name in kept)
    piece.graph.sparse_initializer.extend(tensor for tensor in graph.sparse_initializer if tensor.values.name in kept)
    piece.graph.input.append(known[stage.input])
    piece.graph.output.append(onnx.ValueInfoProto(name=stage.output))
    return piece


def inlined(graph: onnx.ModelProto) -> onnx.ModelProto:
    """Without local functions, whose names would have to be told apart as well."""
    return onnx.inliner.inline_local_functions(graph) if graph.functions else graph


def reads(node: onnx.NodeProto) -> Iterator[str]:
    """Names of the tensors that a node, or a body within it, reads."""
    yield from filter(None, node.input)
    for body in _bodies(node):
        for inner in body.node:
            yield from reads(inner)


def _bodies(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """The sub-graphs of an If, Loop or Scan."""
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g


def convert(piece: onnx.ModelProto, opset: int, stage: OnnxStage) -> onnx.ModelProto:
    """The cut of `stage` at another opset; PackageError where onnx has no way there."""
    if opsets(piece)[""] == opset:
        return piece
    try:
        return onnx.version_converter.convert_version(piece, opset)
    # The converter is C++ behind pybind11: RuntimeError, ConvertError and others.
    except Exception as error:
        raise PackageError(
            f"{stage.path} has opset {opsets(piece)['']} and cannot be brought to {opset} ({first_line(error)}); "
            f"export that graph again with opset {opset}"
        ) from error


def opsets(graph: onnx.ModelProto) -> dict[str, int]:
    """Version of each operator set; the default domain is written as the empty string."""
    return {
        entry.domain.replace("ai.onnx", "", entry.domain == "ai.onnx"): entry.version for entry in graph.opset_import
    }


def join(
    graphs: Sequence[onnx.ModelProto],
    inputs: Sequence[tuple[np.dtype[Any], Sequence[int | str]]],
    opset: int,
    num_labels: int,
    features: int | None = None,
) -> onnx.ModelProto:
    """Graphs in a row as one, free of everything that is not computed with; the given ones are used up.

    Written here because `onnx.compose` (1.23) misses initializers that the bodies of If and Loop capture, and
    keeps the exporter's stack traces.

    Args:
        graphs: from images to logits [N, C] and probabilities [N, C]; each but the last has one output.
        inputs: dtype and sizes of what each graph takes; a word is a free size.
        opset: of all graphs.
        num_labels: C.
        features: number of the graph whose input becomes the output `features`; None leaves it out.
    """
    versions: dict[str, int] = {}
    for graph in graphs:
        versions |= {name: max(version, versions.get(name, 1)) for name, version in opsets(graph).items()}
    joined = onnx.ModelProto(ir_version=max(graph.ir_version for graph in graphs), producer_name="headstart")
    joined.opset_import.extend(onnx.helper.make_opsetid(*item) for item in sorted({**versions, "": opset}.items()))
    joined.graph.name = "headstart"
    feeds = INPUT
    for number, (graph, (dtype, sizes)) in enumerate(zip(graphs, inputs, strict=True)):
        outputs = OUTPUTS if graph is graphs[-1] else [FEATURES if number + 1 == features else f"{number}/out"]
        names = {value.name: name for value, name in zip(graph.graph.output, outputs, strict=True)}
        names[graph.graph.input[0].name] = feeds
        rename(graph.graph, f"{number}/" if len(graphs) > 1 else "", names)
        if number:  # the sizes that are fixed from here on; ONNX Runtime infers the others
            element = onnx.helper.np_dtype_to_tensor_dtype(dtype)
            joined.graph.value_info.append(onnx.helper.make_tensor_value_info(feeds, element, sizes))
        joined.graph.node.extend(graph.graph.node)
        joined.graph.initializer.extend(graph.graph.initializer)
        joined.graph.sparse_initializer.extend(graph.graph.sparse_initializer)
        feeds = outputs[0]
    images = onnx.helper.make_tensor_value_info(INPUT, onnx.TensorProto.UINT8, ["batch", "height", "width", 3])
    joined.graph.input.append(images)
    columns: dict[str, int | str] = dict.fromkeys(OUTPUTS, num_labels)
    if features is not None:
        columns[FEATURES] = inputs[features][1][1]
    for name, width in columns.items():
        row = onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["batch", width])
        joined.graph.output.append(row)
    return joined


def save(graph: onnx.ModelProto, path: Path, max_inline_bytes: int = MAX_INLINE_BYTES) -> None:
    """Write a graph to `path`; weights of more than `max_inline_bytes` go to a file beside it."""
    # Not graph.ByteSize(), which serialises the graph and fails beyond 2 GiB.
    num_bytes = sum(
        math.prod(tensor.dims) * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
        for tensor in graph.graph.initializer
    )
    if num_bytes <= max_inline_bytes:
        path.write_bytes(graph.SerializeToString(deterministic=True))
    else:
        data = f"{path.name}.data"
        onnx.save_model(graph, path, save_as_external_data=True, location=data, size_threshold=1024)
        path.with_name(data).chmod(0o644)  # onnx makes it readable by its owner alone


def rename(graph: onnx.GraphProto, prefix: str, names: Mapping[str, str]) -> None:
    """Give every tensor its name in `names`, or else the prefix, and drop remarks and metadata."""

    def renamed(name: str) -> str:
        return names.get(name, prefix + name) if name else name

    for node in graph.node:
        node.input[:] = [renamed(name) for name in node.input]
        node.output[:] = [renamed(name) for name in node.output]
        node.name = prefix + node.name if node.name else ""
        node.ClearField("doc_string")
        node.ClearField("metadata_props")
        for body in _bodies(node):
            rename(body, prefix, names)
    for tensor in (*graph.initializer, *(sparse.values for sparse in graph.sparse_initializer)):
        tensor.name = renamed(tensor.name)
        tensor.ClearField("doc_string")
        tensor.ClearField("metadata_props")
    for value in (*graph.input, *graph.output):
        value.name = renamed(value.name)
        value.ClearField("doc_string")
        value.ClearField("metadata_props")
    for part in ("value_info", "doc_string", "metadata_props", "quantization_annotation"):
        graph.ClearField(part)


def _unknown(stage: OnnxStage, role: str, found: str, accepted: Iterable[onnx.ValueInfoProto], inner: str) -> str:
    names = ", ".join(value.name for value in accepted)
    return f"{stage.path} has no tensor {found!r} to be its {role}; accepted: {names} or {inner}"
