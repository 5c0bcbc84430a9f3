"""The drift gauge: near 0 on images like those of the training, above on others, and its cost when it is off."""

import hashlib
import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from sklearn.datasets import load_digits, load_sample_images

from headstart.serving.device import Device
from headstart.serving.errors import PackageError
from headstart.serving.manifest import Drift, Tensor
from headstart.serving.server.models.drift import LEAST_ROWS, WINDOW, DriftGauge, distance
from headstart.serving.server.models.from_package import load_package
from headstart.serving.server.models.model import LoadedModel, WatchedModel
from headstart.serving.server.service import Service
from headstart.serving.server.watching.metrics import Metrics, added
from tests.serving.server.graphs import LABELS, classifier, value, write_package
from tests.serving.server.models.test_repository import infer, serving
from tests.serving.server.scheduling.test_batching import on_a_loop


def training_record(features: np.ndarray) -> Drift:
    mean = features.mean(0)
    spread = float(np.sqrt(((features - mean) ** 2).sum(1).mean()))
    return Drift(mean=tuple(mean.tolist()), spread=spread, num_images=len(features))


def digits() -> np.ndarray:
    """Real features, float32 [1797, 64]: the pixels of handwritten digits, in an order without meaning."""
    found = load_digits().data.astype(np.float32)
    return found[np.random.default_rng(0).permutation(len(found))]


def measure(gauge: DriftGauge, features: np.ndarray, batch: int = 8) -> float:
    for start in range(0, len(features), batch):
        gauge.observe(features[start : start + batch])
    found = distance(gauge.state())
    assert found is not None
    return found


def test_images_like_the_training_images_read_near_0_and_others_do_not():
    features = digits()
    training, live = features[:900], features[900:]
    record = training_record(training)
    same = measure(DriftGauge(record, 1.0), live)
    # What the formula takes off: without it the same rows read as the noise of two means.
    naive = float(np.linalg.norm(live.mean(0) - training.mean(0)) / record.spread)
    assert 1 / np.sqrt(len(live)) < naive < 0.1
    assert same < naive / 2
    zeros = load_digits().data[load_digits().target == 0].astype(np.float32)
    inverted = 16 - live
    shifted = measure(DriftGauge(record, 1.0), live + np.float32(0.1 * record.spread / np.sqrt(64)))
    one_class, other = (measure(DriftGauge(record, 1.0), rows) for rows in (zeros, inverted))
    assert shifted == pytest.approx(0.1, abs=0.05)
    assert same < shifted < one_class < other
    assert one_class > 0.3
    assert other > 1


def test_the_distance_of_a_sample_of_the_training_is_0_in_the_mean():
    random = np.random.default_rng(1)
    features = random.normal(size=(4000, 32)).astype(np.float32)
    record = training_record(features)
    squares = []
    for _ in range(60):
        gauge = DriftGauge(record, 1.0)
        gauge.observe(random.normal(size=(50, 32)).astype(np.float32))
        state = gauge.state()
        worth = state["worth"]
        assert worth == pytest.approx(50)
        squares.append(sum(one * one for one in state["offset"]) / worth**2 - 1 / worth - 1 / 4000)
    # A single one has a standard deviation of sqrt(2 / 32) / 50 = 0.005.
    assert abs(np.mean(squares)) < 3 * 0.005 / np.sqrt(60)


def test_the_window_forgets_and_knows_what_it_is_worth():
    random = np.random.default_rng(2)
    record = training_record(random.normal(size=(100_000, 16)).astype(np.float32))
    gauge = DriftGauge(record, 1.0)
    assert measure(gauge, random.normal(3, 1, size=(4 * WINDOW, 16)).astype(np.float32)) > 2
    # An exponential window is worth twice its length.
    assert gauge.state()["worth"] == pytest.approx(2 * WINDOW, rel=0.05)
    assert measure(gauge, random.normal(size=(12 * WINDOW, 16)).astype(np.float32)) < 0.05
    assert gauge.state()["rows"] == 16 * WINDOW
    huge = DriftGauge(record, 1.0)
    assert measure(huge, np.full((5 * WINDOW, 16), 1, np.float32), batch=5 * WINDOW) == pytest.approx(1.0, abs=0.05)


def test_too_few_rows_have_no_distance_and_what_is_not_finite_is_left_out():
    features = digits()
    gauge = DriftGauge(training_record(features), 1.0)
    gauge.observe(features[: LEAST_ROWS - 1])
    assert distance(gauge.state()) is None
    broken = features[:3].copy()
    broken[:2, 3] = np.nan, np.inf
    gauge.observe(broken)
    assert gauge.state()["rows"] == LEAST_ROWS
    assert distance(gauge.state()) is not None
    gauge.observe(np.full((3, 64), np.nan, np.float32))
    assert gauge.state()["rows"] == LEAST_ROWS
    gauge.clear()
    assert gauge.state()["rows"] == 0


def test_the_states_of_several_processes_add_up():
    features = digits()
    record = training_record(features[:900])
    whole, *parts = (DriftGauge(record, 1.0) for _ in range(4))
    live = features[900:1200] + 2
    whole.observe(live)
    for part, rows in zip(parts, (live[:50], live[50:290], live[290:]), strict=True):
        part.observe(rows)
    first, second, third = (json.loads(json.dumps(part.state())) for part in parts)
    assert distance(added(added(first, second), third)) == pytest.approx(distance(whole.state()), rel=1e-6)
    empty = DriftGauge(record, 1.0).state()
    assert distance(added(whole.state(), empty)) == pytest.approx(distance(whole.state()))


def test_threads_lose_no_rows():
    features = digits()
    gauge = DriftGauge(training_record(features), 1.0)
    threads = [threading.Thread(target=lambda: [gauge.observe(features[:3]) for _ in range(200)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert gauge.state()["rows"] == 2400


def with_features(mark: float) -> bytes:
    """`classifier` with a third output `features`, float32 [batch, 3]: the mean of each channel."""
    model = onnx.load_from_string(classifier(mark))
    model.graph.node.append(helper.make_node("Identity", ["means"], ["features"]))
    model.graph.output.append(value("features", ["batch", 3], TensorProto.FLOAT))
    return model.SerializeToString()


def pieces(side: int) -> np.ndarray:
    """Pieces of a real photograph, uint8 [N, 8, 8, 3]."""
    image = load_sample_images().images[side]
    places = np.random.default_rng(side).integers(0, (image.shape[0] - 8, image.shape[1] - 8), (600, 2))
    return np.stack([image[top : top + 8, left : left + 8] for top, left in places])


def write_watched(folder: Path, mark: float = 1) -> Path:
    features = pieces(0)[:300].astype(np.float32).mean((1, 2))
    outputs = (
        *(Tensor(name=name, dtype="float32", shape=("batch", len(LABELS))) for name in ("logits", "probabilities")),
        Tensor(name="features", dtype="float32", shape=("batch", 3)),
    )
    graph = with_features(mark)
    files = {"model.onnx": hashlib.sha256(graph).hexdigest()}
    return write_package(folder, mark, graph=graph, outputs=outputs, files=files, drift=training_record(features))


def figures(service: Service) -> dict[str, float]:
    text = service.metrics_text()
    assert isinstance(text, bytes)
    lines = [
        line for line in text.decode().splitlines() if line.startswith("headstart_drift") and "created" not in line
    ]
    return {line.split("{")[0]: float(line.rpartition(" ")[2]) for line in lines}


@on_a_loop
async def test_a_served_model_shows_its_drift_and_hides_the_features(tmp_path: Path):
    write_watched(tmp_path / "demo" / "1")
    async with serving(tmp_path, drift=1.0) as service:
        outputs = service.model_metadata("demo", None)["outputs"]
        assert [one["name"] for one in outputs] == ["logits", "probabilities"]
        assert "headstart_drift_distance" not in figures(service), "the warm-up is no live image"
        assert service.card("demo")["drift"] == {"distance": None, "rows": 0}
        same, other = pieces(0)[300:], pieces(1)
        for start in range(0, 300, 10):
            response = await infer(service, inputs={"images": same[start : start + 10]})
            assert set(response.outputs) == {"logits", "probabilities"}
        near = figures(service)
        assert near["headstart_drift_rows_total"] == 300
        assert near["headstart_drift_distance"] < 0.15
        for start in range(0, 600, 10):
            await infer(service, inputs={"images": other[start : start + 10]})
        far = figures(service)
        assert far["headstart_drift_distance"] > 3 * near["headstart_drift_distance"]
        assert service.card("demo")["drift"]["distance"] == pytest.approx(far["headstart_drift_distance"])
        summed = Metrics.summed([service.metrics.counts(), service.metrics.counts()], {}, 0)
        assert b'headstart_drift_rows_total{model="demo",version="1"} 1800.0' in summed.metrics_text()


@on_a_loop
async def test_a_share_of_the_executions_is_looked_at(tmp_path: Path):
    write_watched(tmp_path / "demo" / "1")
    image = pieces(0)[:1]
    async with serving(tmp_path, drift=0.25) as service:
        for _ in range(400):
            await infer(service, inputs={"images": image})
        # 100 on average, standard deviation 8.7
        assert 50 < figures(service)["headstart_drift_rows_total"] < 150


def test_off_is_the_plain_model_and_an_old_package_has_no_gauge(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    def loaded(folder: Path, drift: float) -> LoadedModel:
        return load_package(folder, name="a", version="1", device=Device(threads=1), drift=drift)

    watched, plain = write_watched(tmp_path / "watched"), write_package(tmp_path / "plain", 1)
    assert type(loaded(watched, 0.0)) is LoadedModel
    assert type(loaded(plain, 0.0)) is LoadedModel
    assert not caplog.text
    assert type(loaded(plain, 1.0)) is LoadedModel
    assert "a version 1 has no record of drift" in caplog.text
    assert type(loaded(watched, 0.5)) is WatchedModel
    assert LoadedModel.drift is None
    for share in (-0.1, 1.1, float("nan")):
        with pytest.raises(PackageError, match="share for drift"):
            loaded(watched, share)


def test_features_are_not_for_clients(tmp_path: Path):
    model: Any = load_package(write_watched(tmp_path / "w"), name="a", version="1", device=Device(threads=1))
    assert [one.name for one in model.outputs] == ["logits", "probabilities"]
