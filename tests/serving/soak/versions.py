"""Packages whose answers tell which of them ran, and what each must answer, by a bare `session.run` of its file."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto, helper

from headstart.serving.manifest import Tensor
from headstart.serving.package import MODEL
from headstart.serving.runtime import open_session
from tests.serving.server.graphs import model_bytes, value, write_package

SIDE, WIDTH, TURNS = 16, 4096, 150
WEIGHTS_MB = 3 * SIDE * SIDE * WIDTH * 4 / 2**20
"""Of one version: what a reload that leaves its session behind would leak."""
TOLERANCE = 1e-4
"""Largest difference of a number from the bare call's, relative to the largest: a batch rounds otherwise than a row."""


@dataclass(frozen=True)
class Version:
    """A package that is not in the repository yet."""

    number: int
    package: Path
    expected: NDArray[np.float32]
    """Its logits for each of `inputs()`, [len(inputs), 3]."""


def inputs(count: int = 16) -> NDArray[np.uint8]:
    """Images to send, uint8 [count, 16, 16, 3]."""
    return np.random.default_rng(7).integers(0, 256, (count, SIDE, SIDE, 3), np.uint8)


def make_version(folder: Path, number: int) -> Version:
    """Write version `number`, with weights from its own seed, into `folder`/NUMBER."""
    shape = ("batch", SIDE, SIDE, 3)
    package = write_package(
        folder / str(number), number, graph=_graph(number), inputs=(Tensor(name="images", dtype="uint8", shape=shape),)
    )
    session = open_session(package / MODEL, threads=1)
    expected = np.concatenate([session.run(["logits"], {"images": image[None]})[0] for image in inputs()])
    return Version(number, package, expected)


def corrupt(version: Version, folder: Path) -> Path:
    """A copy with one bit flipped in the weights."""
    package = folder / f"{version.number}-corrupt"
    shutil.copytree(version.package, package)
    data = bytearray((package / MODEL).read_bytes())
    data[len(data) // 2] ^= 1
    (package / MODEL).write_bytes(data)
    return package


def _graph(seed: int) -> bytes:
    """A product with the seed's own weights and a loop that takes its time, row by row."""
    random = np.random.default_rng(seed)
    body = helper.make_graph(
        [
            helper.make_node("Exp", ["state"], ["power"]),
            helper.make_node("Log", ["power"], ["next"]),
            helper.make_node("Identity", ["go"], ["go_on"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("turn", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            value("state", ["batch", WIDTH]),
        ],
        [helper.make_tensor_value_info("go_on", TensorProto.BOOL, []), value("next", ["batch", WIDTH])],
    )
    nodes = [
        helper.make_node("Cast", ["images"], ["pixels"], to=TensorProto.FLOAT),
        helper.make_node("Reshape", ["pixels", "flat"], ["rows"]),
        helper.make_node("MatMul", ["rows", "weights"], ["products"]),
        helper.make_node("Loop", ["turns", "", "products"], ["same"], body=body),
        helper.make_node("MatMul", ["same", "last"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["probabilities"], axis=1),
    ]
    pixels = 3 * SIDE * SIDE
    constants = {
        "flat": np.array([-1, pixels], np.int64),
        "weights": (random.normal(size=(pixels, WIDTH)) / 255).astype(np.float32),
        "last": (random.normal(size=(WIDTH, 3)) / WIDTH).astype(np.float32),
        "turns": np.array(TURNS, np.int64),
    }
    images = [value("images", ["batch", SIDE, SIDE, 3], TensorProto.UINT8)]
    return model_bytes(nodes, images, [value(name, ["batch", 3]) for name in ("logits", "probabilities")], constants)
