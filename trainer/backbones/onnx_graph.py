"""An ONNX graph as a frozen backbone: cut at the tensor that holds the features and run by ONNX Runtime.

onnx and onnxruntime are imported inside the functions: most backbones need neither.
"""

import hashlib
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from headstart.trainer.backbones.weights import WeightsFile, locked
from headstart.trainer.errors import RunError, SourceError
from headstart.trainer.inputs.preprocessing import Preprocessing

if TYPE_CHECKING:
    import onnx

OUTPUT = "features"
GRAPH_VERSION = "1"  # part of the fingerprint; raised when cutting or pooling changes
NUM_THREADS = 2
# Read as onnxruntime is loaded: by itself it tells Microsoft of sessions and models. What it says already holds.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")


@dataclass(kw_only=True, eq=False)
class OnnxGraph:
    """A graph [N, C, S, S] float32 -> [N, D] float32 with a dynamic batch; it can be pickled."""

    path: Path
    """The cut graph, in the cache."""
    tensor: str
    """The tensor of the original graph that holds the features."""
    input_name: str
    output_name: str = OUTPUT
    num_features: int = 0
    """D."""
    _session: Any = field(default=None, repr=False)

    def __call__(self, pixels: Tensor) -> Tensor:
        """Return features [N, D] on the CPU."""
        if self._session is None:
            self._session = _session(self.path)
        (features,) = self._session.run([self.output_name], {self.input_name: pixels.cpu().contiguous().numpy()})
        return torch.from_numpy(features)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_session": None}  # a session belongs to its process


def cut_graph(weights: WeightsFile, tensor: str, preprocessing: Preprocessing, cache: Path) -> OnnxGraph:
    """Cut the graph in `weights` behind `tensor` and return it; feature maps [N, D, H, W] are averaged over H
    and W.

    An empty `tensor` is the input of the graph's last linear layer. Raises `SourceError` where the file is no
    graph with one image input and a dynamic batch, where it has no such tensor or does not take the
    preprocessing's images, and where it keeps its weights in other files, which no digest covers.
    """
    import onnx

    model = _read(weights.path)
    tensor = tensor or _last_linear_input(model, weights.path)
    _check_tensor(model, tensor, weights.path)
    input_name = _check_input(model, preprocessing, weights.path)
    name = hashlib.sha256(tensor.encode()).hexdigest()[:8]
    prefix = f"{weights.sha256[:16]}-"
    path = cache / "weights" / f"{prefix}{weights.path.stem.removeprefix(prefix)}-{name}.onnx"
    try:
        with locked(path):  # cut anew each time: it takes milliseconds, and a spoilt copy cannot be used
            temporary = path.with_name(f".{path.stem}.part.onnx")
            onnx.utils.extract_model(weights.path, temporary, [input_name], [tensor], check_model=False)
            onnx.save(_pooled(onnx.load(temporary), tensor, weights.path), temporary)
            temporary.replace(path)
    except OSError as error:
        raise RunError(
            f"cannot write {path}: {error}; free space there, or set HEADSTART_CACHE to another disk's folder"
        ) from error
    graph = OnnxGraph(path=path, tensor=tensor, input_name=input_name)
    graph.num_features = _trial(graph, preprocessing, weights.path)
    return graph


def _read(path: Path) -> "onnx.ModelProto":
    """Read a graph and check it."""
    import onnx

    try:
        model = onnx.load(path, load_external_data=False)
        if any(onnx.external_data_helper.uses_external_data(tensor) for tensor in model.graph.initializer):
            raise SourceError(f"{path} keeps its weights in other files; save it as one: onnx.save(model, path)")
        onnx.checker.check_model(model)
    except SourceError:
        raise
    except Exception as error:  # protobuf's and the checker's errors have no common base
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise SourceError(f"{path} is no valid ONNX graph: {reason}") from error
    return model


def _session(path: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = NUM_THREADS
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # spinning threads starve a shared host
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _last_linear_input(model: "onnx.ModelProto", path: Path) -> str:
    constants = {initializer.name for initializer in model.graph.initializer}
    for node in reversed(model.graph.node):
        if node.op_type in ("Gemm", "MatMul") and node.input[1] in constants:
            return str(node.input[0])
    raise SourceError(f"{path} has no linear layer; name the tensor of its features: onnx:{path}#TENSOR")


def _check_tensor(model: "onnx.ModelProto", tensor: str, path: Path) -> None:
    names = [name for node in model.graph.node for name in node.output]
    if tensor not in names:
        raise SourceError(f"{path} has no tensor {tensor!r}; its last ones are {', '.join(names[-8:])}")


def _check_input(model: "onnx.ModelProto", preprocessing: Preprocessing, path: Path) -> str:
    """Return the name of the one input, which must take [N, channels, crop, crop] with N dynamic."""
    constants = {initializer.name for initializer in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in constants]
    if len(inputs) != 1:
        raise SourceError(f"{path} has {len(inputs)} inputs; accepted: a graph with one, the images")
    shape = [d.dim_value if d.HasField("dim_value") else 0 for d in inputs[0].type.tensor_type.shape.dim]
    wanted = [0, preprocessing.channels, preprocessing.crop, preprocessing.crop]
    if len(shape) != 4 or shape[0] != 0 or any(d not in (0, w) for d, w in zip(shape[1:], wanted[1:], strict=True)):
        raise SourceError(
            f"{path} takes images of shape {['N' if d == 0 else d for d in shape]}, the preprocessing gives "
            f"{['N', *wanted[1:]]}; export the graph for that, with N dynamic (height and width may be too)"
        )
    return str(inputs[0].name)


def _pooled(cut: "onnx.ModelProto", tensor: str, path: Path) -> "onnx.ModelProto":
    """Give the cut graph one output `features` [N, D], whatever the rank of `tensor`."""
    import onnx

    rank = _rank(cut, tensor)
    if rank not in (2, 4):
        raise SourceError(f"tensor {tensor!r} of {path} has {rank} axes; accepted: [N, D] or [N, D, H, W]")
    nodes = [onnx.helper.make_node("Identity", [tensor], [OUTPUT])]
    if rank == 4:
        nodes = [onnx.helper.make_node("GlobalAveragePool", [tensor], [f"{OUTPUT}.mean"]),
                 onnx.helper.make_node("Flatten", [f"{OUTPUT}.mean"], [OUTPUT], axis=1)]  # fmt: skip
    cut.graph.node.extend(nodes)
    del cut.graph.output[:]
    cut.graph.output.append(onnx.helper.make_tensor_value_info(OUTPUT, onnx.TensorProto.FLOAT, ["batch", None]))
    onnx.checker.check_model(cut)
    return cut


def _rank(cut: "onnx.ModelProto", tensor: str) -> int:
    import onnx

    inferred = onnx.shape_inference.infer_shapes(cut)
    for value in [*inferred.graph.value_info, *inferred.graph.output]:
        if value.name == tensor and value.type.tensor_type.HasField("shape"):
            return len(value.type.tensor_type.shape.dim)
    return 0


def _trial(graph: OnnxGraph, preprocessing: Preprocessing, path: Path) -> int:
    """Run two black images and return D; two, because a graph may be fixed to one in its inside."""
    pixels = torch.zeros(2, preprocessing.channels, preprocessing.crop, preprocessing.crop, dtype=torch.float32)
    try:
        features = graph(pixels)
    except Exception as error:  # ONNX Runtime's errors have no public base
        raise SourceError(f"ONNX Runtime cannot run {path} up to {graph.tensor!r}: {error}") from error
    if features.ndim != 2 or features.shape[0] != 2:
        raise SourceError(f"tensor {graph.tensor!r} of {path} is {list(features.shape)} for 2 images; accepted: [2, D]")
    return int(features.shape[1])
