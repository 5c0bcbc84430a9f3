"""The models that are served: a tiny MLP and two networks for images, with weights from a seed.

What an execution costs does not depend on what the weights have learnt. Each is a package with its parity proven, in
a repository of its own, so that `headstart serve FOLDER/mlp` serves it as it would any other.
"""

import datetime
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headstart.serving.manifest import MANIFEST, Manifest, Parity, ParityRow
from headstart.serving.package import MODEL, digest, new_package
from headstart.serving.runtime import CPU, describe, open_session

MODELS = ("mlp", "mobilenet_v2", "resnet50")
NAME = "it"
"""Of the model in its repository."""
NUM_FEATURES = 2048
NUM_INPUTS = 8
"""Different requests; a server that mixed up its clients' answers would be seen."""


def make_model(folder: Path, model: str) -> Path:
    """Write the repository `folder`/`model` unless it is there, and return its package.

    Raises:
        ValueError: no such model.
    """
    package = folder / model / NAME / "1"
    if model not in MODELS:
        raise ValueError(f"the model is {model!r}; accepted: {', '.join(MODELS)}")
    if not (package / MANIFEST).exists():
        (_make_mlp if model == "mlp" else _make_network)(package, model)
    return package


def sample_inputs(model: str) -> list[NDArray[Any]]:
    """Rows to send: float32 [1, 2048], or uint8 [1, 224, 224, 3]."""
    random = np.random.default_rng(1)
    if model == "mlp":
        return [random.normal(size=(1, NUM_FEATURES)).astype(np.float32) for _ in range(NUM_INPUTS)]
    return [random.integers(0, 256, (1, 224, 224, 3), np.uint8) for _ in range(NUM_INPUTS)]


def _make_mlp(package: Path, model: str) -> None:
    """2048 -> 128 -> 10, `logits` alone."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    random = np.random.default_rng(0)
    first = (random.normal(size=(NUM_FEATURES, 128)) / 45).astype(np.float32)
    second = random.normal(size=(128, 10)).astype(np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["features", "first"], ["products"]),
            helper.make_node("Relu", ["products"], ["hidden"]),
            helper.make_node("MatMul", ["hidden", "second"], ["logits"]),
        ],
        model,
        [helper.make_tensor_value_info("features", TensorProto.FLOAT, ["batch", NUM_FEATURES])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 10])],
        [numpy_helper.from_array(first, "first"), numpy_helper.from_array(second, "second")],
    )
    with new_package(package) as folder:
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), folder / MODEL)
        session = open_session(folder / MODEL, threads=1)
        features = np.concatenate([*sample_inputs(model), *sample_inputs(model)])
        expected = np.maximum(features @ first, 0) @ second
        rows = tuple(_parity_row(session, features, expected, batch) for batch in (1, 2, len(features)))
        manifest = Manifest(
            name=model,
            inputs=describe(session.get_inputs()),
            outputs=describe(session.get_outputs()),
            labels=tuple(map(str, range(10))),
            preprocessing={},
            temperature=1.0,
            parity=Parity(tolerance=1e-3, provider=CPU, rows=rows),
            licence="none: the weights are random",
            provenance={"seed": 0},
            files={MODEL: digest(folder / MODEL)},
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        )
        (folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")


def _parity_row(session: Any, features: NDArray[Any], expected: NDArray[Any], batch: int) -> ParityRow:
    """NumPy's product against ONNX Runtime's."""
    starts = range(0, len(features), batch)
    found = np.concatenate([session.run(None, {"features": features[i : i + batch]})[0] for i in starts])
    difference, agrees = float(np.abs(found - expected).max()), found.argmax(1) == expected.argmax(1)
    return ParityRow(
        batch=batch,
        num_images=len(features),
        difference=difference,
        relative_difference=difference / float(np.abs(expected).max()),
        top1_agreement=float(agrees.mean()),
        num_disagreements=int((~agrees).sum()),
    )


def _make_network(package: Path, model: str) -> None:
    """A torchvision network with random weights; pixels are scaled and ordered in the graph."""
    import torch
    import torchvision

    from headstart.serving.export import export_package

    class Preprocess(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return ((images.float() / 255 - 0.449) / 0.226).permute(0, 3, 1, 2)

    torch.manual_seed(0)
    network = torchvision.models.get_model(model).eval()
    stages = [Preprocess(), network]

    def reference(images: NDArray[np.uint8]) -> NDArray[np.float32]:
        with torch.no_grad():
            answer: NDArray[np.float32] = torch.nn.Sequential(*stages)(torch.from_numpy(images)).numpy()
        return answer

    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    export_package(
        package,
        name=model,
        stages=stages,
        labels=[f"class {index}" for index in range(1000)],
        temperature=1.0,
        reference=reference,
        samples=[image[0] for image in sample_inputs(model)] * 2,
        preprocessing={"scale": 1 / 255, "mean": 0.449, "std": 0.226},
        licence="none: the weights are random",
        provenance={"seed": 0},
    )
