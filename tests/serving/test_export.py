"""What leaves PyTorch is what PyTorch computed, at any size, or it does not leave."""

import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from headstart.serving.errors import PackageError
from headstart.serving.manifest import MANIFEST
from headstart.serving.package import MODEL, digest, verify
from headstart.serving.parity import prove_parity
from headstart.serving.runtime import Predictor, open_session

from .conftest import LABELS, Model, Net, Pixels, answer

SIZES = [(1, 28, 28), (3, 40, 31), (5, 17, 90), (2, 36, 36), (1, 1, 7), (7, 300, 200)]


def softmax(logits: np.ndarray) -> np.ndarray:
    exponents = np.exp(logits - logits.max(axis=1, keepdims=True))
    return exponents / exponents.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_package_equals_pytorch_at_sizes_it_never_saw(pristine: Path, model: Model, size: tuple[int, ...]):
    images = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    logits, probabilities = Predictor(pristine).predict(images)
    np.testing.assert_allclose(logits, model.reference(images), atol=2e-6)
    np.testing.assert_allclose(probabilities, softmax(logits / 1.5), atol=1e-6)


def test_the_manifest_says_what_the_package_is(pristine: Path):
    manifest = verify(pristine)
    assert [(t.name, t.dtype, t.shape) for t in (*manifest.inputs, *manifest.outputs)] == [
        ("images", "uint8", ("batch", "height", "width", 3)),
        ("logits", "float32", ("batch", 5)),
        ("probabilities", "float32", ("batch", 5)),
    ]
    assert list(manifest.labels) == LABELS
    assert manifest.licence == "not stated"
    assert manifest.provenance["recipe"] == "0" * 64
    assert manifest.provenance["versions"] == {
        "torch": torch.__version__, "onnx": onnx.__version__, "onnxruntime": onnxruntime.__version__, "opset": "20",
    }  # fmt: skip
    assert [(row.batch, row.num_images, row.top1_agreement) for row in manifest.parity.rows] == [
        (1, 8, 1.0),
        (2, 8, 1.0),
        (16, 16, 1.0),
    ]
    assert all(row.relative_difference < 1e-5 for row in manifest.parity.rows)
    assert manifest.latency is not None
    assert manifest.latency.runs == 20


def test_a_second_export_is_the_same_and_tells_nothing_of_this_machine(
    pristine: Path, model: Model, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    model.stages[1].train()
    try:
        model.export(tmp_path / "again")
        assert model.stages[1].training
    finally:
        model.stages[1].eval()
    assert capfd.readouterr().out == ""
    assert digest(tmp_path / "again" / MODEL) == digest(pristine / MODEL)
    content = (pristine / MODEL).read_bytes()
    for trace in (b"site-packages", b".py", b'File "', str(Path.cwd()).encode(), b"pkg.torch"):
        assert trace not in content


def test_large_weights_lie_beside_the_graph_and_are_verified(model: Model, tmp_path: Path):
    directory = tmp_path / "large"
    manifest = model.export(directory, stages=[Pixels(36, 32), model.stages[1]], max_inline_bytes=100)
    assert sorted(manifest.files) == ["model.onnx", "model.onnx.data"]
    data = directory / "model.onnx.data"
    assert data.stat().st_mode & 0o044 == 0o044
    images = np.stack(model.samples[:2])
    np.testing.assert_allclose(Predictor(directory).predict(images)[0], model.reference(images), atol=2e-6)
    content = bytearray(data.read_bytes())
    content[0] ^= 1
    data.write_bytes(content)
    with pytest.raises(PackageError, match=r"model\.onnx\.data was changed"):
        Predictor(directory)


def test_a_small_image_set_is_cropped_and_repeated(model: Model, pristine: Path):
    seen: list[tuple[int, ...]] = []

    def reference(images: np.ndarray) -> np.ndarray:
        seen.append(images.shape)
        return model.reference(images)

    samples = [model.samples[0], model.samples[4], model.samples[1][:30]]
    parity = prove_parity(open_session(pristine / MODEL), reference, samples, 1.5, 5)
    assert [row.num_images for row in parity.rows] == [8, 8, 16]
    assert seen[:3] == [(1, 40, 48, 3), (1, 44, 52, 3), (1, 30, 48, 3)]
    assert set(seen[8:]) == {(2, 30, 48, 3), (16, 30, 48, 3)}


LIES = {
    "one logit": lambda logits: np.where(logits == logits.max(), logits * 1.01, logits),
    "only in a full batch": lambda logits: logits * (1.01 if len(logits) == 16 else 1),
    "nan": lambda logits: np.where(logits == logits.max(), np.nan, logits),
    "classes swapped": lambda logits: logits[:, ::-1],
    "a column short": lambda logits: logits[:, :4],
}


@pytest.mark.parametrize("name", LIES)
def test_an_export_that_is_not_what_pytorch_computes_is_refused(pristine: Path, model: Model, name: str):
    session = open_session(pristine / MODEL)
    with pytest.raises(PackageError, match=r"does not compute|logits are"):
        prove_parity(session, lambda images: LIES[name](model.reference(images)), model.samples, 1.5, 5)


def test_probabilities_of_another_temperature_are_refused(pristine: Path, model: Model):
    with pytest.raises(PackageError, match=r"softmax\(logits / 1\.6\)"):
        prove_parity(open_session(pristine / MODEL), model.reference, model.samples, 1.6, 5)


@pytest.mark.parametrize(("lead", "holds"), [(0.9, True), (1.1, False)], ids=["tie", "clear"])
def test_the_class_may_differ_in_a_tie_alone(pristine: Path, model: Model, lead: float, holds: bool):
    """PyTorch's runner-up leads by `lead` tolerances, though each logit is within one tolerance."""
    session = open_session(pristine / MODEL)
    sample = model.samples[0]
    logits = session.run(["logits"], {"images": sample[None]})[0][0]
    second, first = np.argsort(logits)[-2:]
    gap = logits[first] - logits[second]
    tolerance = float(1.5 * gap / lead / np.abs(logits).max())

    def reference(images: np.ndarray) -> np.ndarray:
        bent = logits.copy()
        bent[[first, second]] = (logits[first] + logits[second]) / 2 + np.array([-0.75, 0.75]) * gap
        return np.stack([bent] * len(images))

    if holds:
        parity = prove_parity(session, reference, [sample], 1.5, 5, tolerance)
        assert [row.top1_agreement for row in parity.rows] == [0, 0, 0]
    else:
        with pytest.raises(PackageError, match="images change class"):
            prove_parity(session, reference, [sample], 1.5, 5, tolerance)


@pytest.mark.parametrize("when", ["lies", "crashes"])
def test_a_failed_export_leaves_the_earlier_package(pristine: Path, model: Model, tmp_path: Path, when: str):
    directory = Path(shutil.copytree(pristine, tmp_path / "package"))
    before = {path.name: digest(path) for path in directory.iterdir()}

    def reference(images: np.ndarray) -> np.ndarray:
        if len(images) == 16 and when == "crashes":
            raise MemoryError
        return model.reference(images) * (2 if len(images) == 16 else 1)

    with pytest.raises(PackageError if when == "lies" else MemoryError):
        model.export(directory, reference=reference)
    assert {path.name: digest(path) for path in directory.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["package"]
    verify(directory)


class Inexportable(nn.Module):
    """A linear head that leaves PyTorch for NumPy on its way."""

    def forward(self, logits: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(np.sort(logits.detach().numpy()))


class FirstTwo(nn.Module):
    """Logits of two images, however many there are."""

    def forward(self, logits: torch.Tensor) -> torch.Tensor:
        return logits[:2]


class FlatWhereHigh(nn.Module):
    """Pixels in one row where there are many rows of them."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        pixels = images.to(torch.float32)
        return pixels.flatten(1) if images.shape[1] > 40 else pixels


UNFIT: dict[str, tuple[list[Any], str]] = {
    "too few columns": ([Pixels(36, 32), Net(4)], r"logits \[2, 4\]; accepted: \[2, 5\]"),
    "one size only": ([nn.Flatten(), nn.Linear(40 * 48 * 3, 5)], "the stage Linear cannot take"),
    "features": ([Pixels(36, 32)], r"logits \[2, 3, 32, 32\]"),
    "no row for each image": ([Pixels(36, 32), nn.Flatten(0), nn.Linear(1, 5)], "row for each image"),
    "always two rows": ([Pixels(36, 32), Net(5), FirstTwo()], "row for each image"),
    "another number of axes": ([FlatWhereHigh(), nn.Flatten(), nn.Linear(5760, 5)], "one number of axes"),
    "not exportable": ([Pixels(36, 32), Net(5), Inexportable()], "cannot export the model"),
}


@pytest.mark.parametrize("name", UNFIT)
def test_stages_that_do_not_fit_are_refused(model: Model, tmp_path: Path, name: str):
    stages, reason = UNFIT[name]
    with pytest.raises(PackageError, match=reason):
        model.export(tmp_path / "package", stages=stages)
    assert list(tmp_path.iterdir()) == []


ARGUMENTS: list[tuple[str, Any]] = [
    ("temperature", 0.0),
    ("temperature", math.inf),
    ("opset", 17),
    ("samples", []),
    ("samples", [np.zeros((40, 48, 3), np.float32)]),
    ("samples", [np.zeros((40, 48), np.uint8)]),
    ("samples", [np.zeros((40, 48, 4), np.uint8)]),
    ("labels", ["a", "a"]),
    ("labels", []),
    ("stages", []),
]


@pytest.mark.parametrize(("name", "value"), ARGUMENTS)
def test_arguments_that_cannot_be_are_refused(model: Model, tmp_path: Path, name: str, value: Any):
    with pytest.raises(ValueError, match=f"^{name} (is|are|must)"):
        model.export(tmp_path / "package", **{name: value})
    assert MANIFEST not in {path.name for path in tmp_path.rglob("*")}


def test_a_graph_whose_size_matters_to_the_end_is_exported_in_one_piece(model: Model, tmp_path: Path):
    class Scale(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images.permute(0, 3, 1, 2).to(torch.float32) / 255

    stages = [Scale(), Net(5, seed=1)]  # fully convolutional: no resize, no crop
    model.export(tmp_path / "package", stages=stages, reference=answer(*stages))
    images = np.random.default_rng(0).integers(0, 256, (3, 57, 33, 3), np.uint8)
    logits, _ = Predictor(tmp_path / "package").predict(images)
    np.testing.assert_allclose(logits, answer(*stages)(images), atol=2e-6)
