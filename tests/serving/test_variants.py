"""fp16 and int8 of a network that has learned real digits: as good as fp32 and smaller, or refused."""

import copy
import dataclasses
import json
import logging
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from onnx import helper
from sklearn.datasets import load_digits
from torch import nn

from headstart.serving import variants
from headstart.serving.device import Device
from headstart.serving.errors import PackageError
from headstart.serving.export import export_package
from headstart.serving.manifest import MANIFEST, Drift, Manifest, Tensor
from headstart.serving.package import MODEL, verify
from headstart.serving.parity import prove_providers
from headstart.serving.runtime import Predictor, open_session
from headstart.serving.server.models.from_package import load_package
from headstart.serving.variants import PARITY_TOLERANCES, make_variant, try_out

from .conftest import Pixels, answer

Image = NDArray[np.uint8]
NUM_TRAINING, NUM_VALIDATION = 1000, 300
LABELS = list("0123456789")


class Backbone(nn.Module):
    """float32 [N, 3, 16, 16] -> features [N, 32]."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Conv2d(3, 16, 3, 1), nn.Conv2d(16, 32, 3, 2), nn.Conv2d(32, 32, 3, 1)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        maps = self.second(self.first(pixels).relu()).relu()
        features: torch.Tensor = self.third(maps).relu().mean((2, 3))
        return features


class Double(nn.Module):
    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features.double()


@dataclass(frozen=True)
class Digits:
    """A trained network, its images, and its package."""

    stages: list[Any]
    images: list[Image]
    labels: NDArray[np.int64]
    package: Path
    drift: Drift

    def validation(self) -> Iterator[tuple[Image, int]]:
        return zip(self.images[-NUM_VALIDATION:], self.labels[-NUM_VALIDATION:].tolist(), strict=True)

    def export(self, directory: Path, stages: list[Any], **changes: Any) -> Manifest:
        return export_package(
            directory, name="digits", stages=stages, labels=LABELS, temperature=1.5, reference=answer(*stages),
            samples=self.images[-NUM_VALIDATION:][:16], preprocessing={"resize": 16, "crop": 16},
            licence="BSD-3-Clause", provenance={"recipe": "0" * 64, "data": "1" * 64},
            **{"drift": self.drift, **changes},
        )  # fmt: skip

    def variant(self, name: str, directory: Path, source: Path | None = None, **changes: Any) -> Manifest:
        fields: dict[str, Any] = {
            "samples": self.images[-NUM_VALIDATION:][:16],
            "validation": self.validation(),
            "calibration": iter(self.images[:64]),
            "max_loss": 0.01,
        }
        return make_variant(name, source or self.package, directory, **{**fields, **changes})


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Digits:
    """Real digits, 24x24 and every third 32x32, and a network that learned 1,000 of them."""
    data = load_digits()
    pixels = (data.images * 15.9375).round().astype(np.uint8)[: NUM_TRAINING + NUM_VALIDATION]
    sizes = [4 if index % 3 == 2 else 3 for index in range(len(pixels))]
    images = [
        np.repeat(np.kron(image, np.ones((size, size), np.uint8))[..., None], 3, axis=2)
        for image, size in zip(pixels, sizes, strict=True)
    ]
    labels = data.target[: len(images)].astype(np.int64)
    torch.manual_seed(0)
    torch.set_num_threads(2)
    preprocess, backbone, head = Pixels(16, 16), Backbone(), nn.Linear(32, 10)
    inputs = torch.cat([preprocess(torch.from_numpy(image)[None]) for image in images[:NUM_TRAINING]])
    targets = torch.from_numpy(labels[:NUM_TRAINING])
    optimizer = torch.optim.AdamW([*backbone.parameters(), *head.parameters()], 5e-3)
    for _ in range(15):
        for rows in torch.randperm(NUM_TRAINING).split(50):
            optimizer.zero_grad()
            nn.functional.cross_entropy(head(backbone(inputs[rows])), targets[rows]).backward()
            optimizer.step()
    with torch.no_grad():
        features = backbone(inputs).double()
    spread = float((features - features.mean(0)).square().sum(1).mean().sqrt())
    drift = Drift(mean=tuple(features.mean(0).tolist()), spread=spread, num_images=NUM_TRAINING)
    folder = tmp_path_factory.mktemp("digits")
    found = Digits([preprocess, backbone, head], images, labels, folder / "package", drift)
    found.export(found.package, found.stages)
    return found


@pytest.fixture(scope="module", params=["fp16", "int8"])
def variant(request: pytest.FixtureRequest, digits: Digits) -> tuple[str, Path, Manifest]:
    folder = digits.package.parent / f"package-{request.param}"
    return request.param, folder, digits.variant(request.param, folder, latency_runs=10)


def accuracy(package: Path, digits: Digits) -> float:
    predictor = Predictor(package)
    return float(np.mean([predictor.predict(image[None])[0].argmax() == label for image, label in digits.validation()]))


def test_a_variant_records_what_it_has_right_beside_fp32(digits: Digits, variant: tuple[str, Path, Manifest]):
    name, folder, manifest = variant
    assert verify(folder) == manifest
    record = manifest.variant
    assert (record.name, record.max_loss, record.num_images) == (name, 0.01, NUM_VALIDATION)
    assert record.calibration_images == 64
    assert record.accuracy == accuracy(folder, digits)
    assert record.fp32_accuracy == accuracy(digits.package, digits) > 0.9
    assert record.latency_ms is not None
    assert record.fp32_latency_ms is not None
    assert 0 < record.latency_ms < 100 > record.fp32_latency_ms > 0
    assert [row.batch for row in manifest.parity.rows] == [1, 2, 16]
    assert manifest.parity.tolerance == PARITY_TOLERANCES[name]
    # Not the same graph, and near it.
    assert all(1e-6 < row.relative_difference < (2e-3 if name == "fp16" else 0.1) for row in manifest.parity.rows)
    assert all(row.top1_agreement >= 0.9 for row in manifest.parity.rows)


def test_a_variant_keeps_all_that_the_package_says(digits: Digits, variant: tuple[str, Path, Manifest]):
    _, _, manifest = variant
    original = verify(digits.package)
    for field in ("name", "inputs", "outputs", "labels", "preprocessing", "temperature", "licence", "drift", "schema"):
        assert getattr(manifest, field) == getattr(original, field)
    assert manifest.provenance == {**original.provenance, "fp32": original.files[MODEL]}
    assert manifest.files != original.files


def test_only_the_body_is_converted(digits: Digits, variant: tuple[str, Path, Manifest]):
    """The preprocessing, the head and the softmax compute with the fp32 numbers that they had."""
    name, folder, _ = variant
    graph, original = onnx.load(folder / MODEL), onnx.load(digits.package / MODEL)
    onnx.checker.check_model(graph, full_check=True)
    kinds = {tensor.name: tensor.data_type for tensor in graph.graph.initializer}
    producers = {output: node for node in graph.graph.node for output in node.output}

    def weights(kind: str) -> list[int]:
        """Types of what the nodes of a kind take, through a DequantizeLinear if there is one."""
        found = [node.input[1] for node in graph.graph.node if node.op_type == kind]
        return [kinds[producers[one].input[0] if one in producers else one] for one in found]

    assert weights("Conv") == 3 * [onnx.TensorProto.FLOAT16 if name == "fp16" else onnx.TensorProto.INT8]
    assert weights("Gemm") == [onnx.TensorProto.FLOAT]
    resize = next(node for node in graph.graph.node if node.op_type == "Resize")
    assert producers[resize.input[0]].op_type not in ("DequantizeLinear", "Cast")
    assert original.graph.output == graph.graph.output
    assert not graph.metadata_props
    assert (folder / MODEL).stat().st_size < 0.8 * (digits.package / MODEL).stat().st_size
    if name == "int8":
        largest = [np.abs(onnx.numpy_helper.to_array(t)).max() for t in graph.graph.initializer if len(t.dims) == 4]
        assert max(largest) <= 64  # 7 bits: two products fit 16 bits on processors without VNNI


def test_a_variant_is_served_and_gives_features(digits: Digits, variant: tuple[str, Path, Manifest]):
    name, folder, _ = variant
    model = load_package(folder, name="digits", version="1", device=Device(threads=1))
    images = np.stack(digits.images[:4:3])
    logits, features = model.run({"images": images}, ["logits", "features"])
    with torch.no_grad():
        expected = digits.stages[1](digits.stages[0](torch.from_numpy(images))).numpy()
    assert features.dtype == np.float32
    assert np.abs(features - expected).max() < (2e-3 if name == "fp16" else 0.1) * np.abs(expected).max()
    np.testing.assert_array_equal(logits, Predictor(folder, threads=1).predict(images)[0])


def test_the_features_are_the_backbones_and_change_no_logit(digits: Digits, tmp_path: Path):
    digits.export(tmp_path / "plain", digits.stages, drift=None)
    assert verify(digits.package).outputs[2] == Tensor(name="features", dtype="float32", shape=("batch", 32))
    session, plain = (open_session(folder / MODEL) for folder in (digits.package, tmp_path / "plain"))
    assert [output.name for output in plain.get_outputs()] == ["logits", "probabilities"]
    for images in (np.stack(digits.images[:9:3]), digits.images[2][None]):
        with torch.no_grad():
            expected = digits.stages[1](digits.stages[0](torch.from_numpy(images))).numpy()
        features, logits = session.run(["features", "logits"], {"images": images})
        np.testing.assert_allclose(features, expected, atol=1e-5)
        np.testing.assert_array_equal(logits, plain.run(["logits"], {"images": images})[0])


def test_features_and_their_record_belong_together(digits: Digits, tmp_path: Path):
    short = dataclasses.replace(digits.drift, mean=digits.drift.mean[:-1])
    with pytest.raises(PackageError, match=r"takes torch.float32 \[2, 32\]; accepted, .* \[2, 31\]"):
        digits.export(tmp_path / "package", digits.stages, drift=short)
    preprocess, backbone, head = digits.stages
    double = [preprocess, nn.Sequential(backbone, Double()), copy.deepcopy(head).double()]
    with pytest.raises(PackageError, match=r"takes torch.float64 \[2, 32\]; accepted, .* float32 \[2, 32\]"):
        digits.export(tmp_path / "package", double)
    package = Path(shutil.copytree(digits.package, tmp_path / "package"))
    document = json.loads((package / MANIFEST).read_text())
    (package / MANIFEST).write_text(json.dumps({**document, "drift": None}))
    with pytest.raises(PackageError, match=r"graph has .* features float32"):
        Predictor(package)


def with_outlier(digits: Digits) -> list[Any]:
    """The same function with one channel a hundred thousand times as large between two layers.

    fp32 does not notice. In int8 that channel's range leaves no step for the others, in fp16 it is infinite.
    """
    backbone = copy.deepcopy(digits.stages[1])
    with torch.no_grad():
        loudest = int(
            backbone.first(digits.stages[0](torch.from_numpy(np.stack(digits.images[:9:3])))).amax((0, 2, 3)).argmax()
        )
        for tensor in (backbone.first.weight, backbone.first.bias):
            tensor[loudest] *= 1e5
        backbone.second.weight[:, loudest] /= 1e5
    return [digits.stages[0], backbone, digits.stages[2]]


REFUSALS = {
    "fp16": r"activations of \d\.\d+e\+05 and fp16 ends at 65504; leave fp16 out",
    "int8": r"int8 has 0\.[0-8]\d+ of 300 validation images right .* more than 0\.01 is lost; leave int8 out",
}


@pytest.mark.parametrize("name", REFUSALS)
def test_a_variant_that_loses_is_refused_and_the_earlier_one_stays(digits: Digits, name: str, tmp_path: Path):
    digits.export(tmp_path / "package", with_outlier(digits))
    assert accuracy(tmp_path / "package", digits) == accuracy(digits.package, digits)
    earlier = Path(shutil.copytree(digits.package, tmp_path / "earlier"))
    for folder in (earlier, tmp_path / "new"):
        with pytest.raises(PackageError, match=REFUSALS[name]):
            digits.variant(name, folder, tmp_path / "package")
    assert {path.name for path in tmp_path.iterdir()} == {"package", "earlier"}
    assert verify(earlier).files == verify(digits.package).files


def test_large_weights_of_a_variant_lie_beside_its_graph(
    digits: Digits, variant: tuple[str, Path, Manifest], tmp_path: Path
):
    name, folder, _ = variant
    source = tmp_path / "package"
    assert sorted(digits.export(source, digits.stages, max_inline_bytes=100).files) == [MODEL, f"{MODEL}.data"]
    manifest = digits.variant(name, tmp_path / name, source, max_inline_bytes=100)
    assert sorted(manifest.files) == [MODEL, f"{MODEL}.data"]
    images = np.stack(digits.images[:9:3])
    np.testing.assert_array_equal(Predictor(tmp_path / name).predict(images)[0], Predictor(folder).predict(images)[0])
    data = tmp_path / name / f"{MODEL}.data"
    data.write_bytes(data.read_bytes()[:-1] + b"!")
    with pytest.raises(PackageError, match=r"model\.onnx\.data was changed"):
        verify(tmp_path / name)


def test_a_manifest_whose_variant_loses_too_much_does_not_verify(variant: tuple[str, Path, Manifest], tmp_path: Path):
    name, folder, _ = variant
    package = Path(shutil.copytree(folder, tmp_path / "package"))
    document = json.loads((package / MANIFEST).read_text())
    for change, reason in (
        ({"accuracy": document["variant"]["fp32_accuracy"] - 0.02}, "more than 0.01 is lost"),
        ({"accuracy": None}, f"{name} was not compared"),
        ({"fp32_accuracy": None}, f"{name} was not compared"),
        ({"max_loss": None}, f"{name} was not compared"),
        ({"num_images": 0}, f"{name} was not compared"),
        ({"name": "int4"}, "its name is 'int4'; accepted: fp32, fp16, int8"),
    ):
        (package / MANIFEST).write_text(json.dumps({**document, "variant": document["variant"] | change}))
        with pytest.raises(PackageError, match=reason):
            verify(package)


def test_what_cannot_become_a_variant_is_refused(digits: Digits, variant: tuple[str, Path, Manifest], tmp_path: Path):
    name, folder, _ = variant
    with pytest.raises(PackageError, match=f"is {name} itself"):
        digits.variant(name, tmp_path / "again", folder)
    with pytest.raises(ValueError, match="name is 'int4'; accepted: fp16, int8"):
        digits.variant("int4", tmp_path / "again")
    for max_loss in (1, -0.01):
        with pytest.raises(ValueError, match=f"max_loss is {max_loss}; accepted: 0 up to 1"):
            digits.variant(name, tmp_path / "again", max_loss=max_loss)
    with pytest.raises(ValueError, match="validation is empty"):
        digits.variant(name, tmp_path / "again", validation=[])
    stages = [Pixels(16, 16), nn.Flatten(), nn.Linear(3 * 16 * 16, 10)]
    digits.export(tmp_path / "linear", stages, drift=None)
    with pytest.raises(PackageError, match="nothing lies before its head"):
        digits.variant(name, tmp_path / "again", tmp_path / "linear")
    assert [path.name for path in tmp_path.iterdir()] == ["linear"]


def crashing() -> onnx.ModelProto:
    """The four nodes of a vision transformer in fp16 on which ONNX Runtime 1.31 ends with a segmentation fault."""
    nodes = [
        helper.make_node("Cast", ["images"], ["pixels"], to=onnx.TensorProto.FLOAT16),
        helper.make_node("Reshape", ["pixels", "shape"], ["x"]),
        helper.make_node("Gelu", ["x"], ["gelu"]),
        helper.make_node("LayerNormalization", ["gelu", "scale", "scale"], ["normal"]),
        helper.make_node("Transpose", ["normal"], ["turned"], perm=[1, 0, 2]),
        helper.make_node("MatMul", ["turned", "weight"], ["logits"]),
    ]
    images = helper.make_tensor_value_info("images", onnx.TensorProto.UINT8, ["batch", "height", "width", 3])
    logits = helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT16, None)
    constants: dict[str, NDArray[Any]] = {
        "scale": np.ones(3, np.float16), "weight": np.ones((3, 3), np.float16), "shape": np.array([0, -1, 3]),
    }  # fmt: skip
    tensors = [onnx.numpy_helper.from_array(array, name) for name, array in constants.items()]
    graph = helper.make_graph(nodes, "crash", [images], [logits], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def test_a_graph_that_crashes_onnx_runtime_takes_down_another_process(
    digits: Digits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    if onnxruntime.__version__ not in ("1.31.0", "1.31.1"):
        pytest.skip("may be mended in this ONNX Runtime")
    monkeypatch.setattr(variants, "convert_body", lambda *_: (crashing(), 0))
    with pytest.raises(PackageError, match=r"crashes on the converted graph \(SIGSEGV\)"):
        digits.variant("fp16", tmp_path / "package")
    assert list(tmp_path.iterdir()) == []


def test_a_trial_minds_nothing_but_a_crash(digits: Digits, tmp_path: Path):
    try_out(digits.package / MODEL, (24, 24, 3))
    (tmp_path / MODEL).write_text("no graph: for the caller to meet")
    try_out(tmp_path / MODEL, (24, 24, 3))


def test_a_variant_of_an_old_package_is_new_and_takes_over_no_timing(
    package: Path, photographs: list[Image], tmp_path: Path
):
    """The package is of schema 1, which knew no variants, and was timed."""
    document = json.loads((package / MANIFEST).read_text()) | {"schema": 1}
    assert document["latency"]
    for name in ("variant", "provider_parity", "drift"):
        del document[name]
    (package / MANIFEST).write_text(json.dumps(document))
    right = [int(Predictor(package).predict(image[None])[0].argmax()) for image in photographs]
    manifest = make_variant(
        "fp16", package, tmp_path / "fp16", samples=photographs, validation=zip(photographs, right, strict=True),
        calibration=photographs, max_loss=0.1,
    )  # fmt: skip
    assert (manifest.schema, manifest.latency, manifest.variant.latency_ms) == (2, None, None)
    assert verify(tmp_path / "fp16") == manifest


@pytest.mark.parametrize("name", ["fp16", "int8"])
def test_no_calibration_images_are_refused(digits: Digits, name: str, tmp_path: Path):
    with pytest.raises(PackageError, match=f"cannot be converted to {name}"):
        digits.variant(name, tmp_path / "package", calibration=[])
    assert list(tmp_path.iterdir()) == []


def test_parity_is_proven_on_providers_that_load(digits: Digits, caplog: pytest.LogCaptureFixture, capfd: Any):
    samples, reference = digits.images[:16], answer(*digits.stages)
    proof = digits.package / MODEL, reference, samples, 1.5, 10
    (parity,) = prove_providers(*proof, providers=["CPUExecutionProvider", "QuantumExecutionProvider"])
    assert parity.provider == "CPUExecutionProvider"
    assert parity.failure() == ""
    with caplog.at_level(logging.WARNING):
        assert (
            prove_providers(proof[0], lambda images: -reference(images), *proof[2:], providers=["CPUExecutionProvider"])
            == ()
        )
    assert "no parity on CPUExecutionProvider" in caplog.text
    capfd.readouterr()
    found = prove_providers(*proof)
    assert all(parity.failure() == "" and parity.provider != "CPUExecutionProvider" for parity in found)
    assert "onnxruntime" not in capfd.readouterr().err  # it says in red what did not load


def test_a_server_warns_of_a_provider_that_was_not_proven(
    digits: Digits, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    package = Path(shutil.copytree(digits.package, tmp_path / "package"))
    with caplog.at_level(logging.WARNING):
        load_package(package, name="digits", version="1", device=Device(threads=1))
    assert caplog.text == ""
    document = json.loads((package / MANIFEST).read_text())
    document["parity"]["provider"] = "CUDAExecutionProvider"
    (package / MANIFEST).write_text(json.dumps(document))
    with caplog.at_level(logging.WARNING):
        load_package(package, name="digits", version="1", device=Device(threads=1))
    assert "digits version 1 runs on CPUExecutionProvider and was proven on CUDAExecutionProvider alone" in caplog.text
