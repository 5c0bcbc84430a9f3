"""Fixed batch sizes and buffers: a GPU's path, run on the CPU provider and compared with plain runs bit for bit."""

import gc
import re
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from headstart.serving.device import CUDA, Device, open_on
from headstart.serving.errors import PackageError
from headstart.serving.one_thread import OneThread
from headstart.serving.server.models import bound as module
from headstart.serving.server.models.bound import Bound, buckets
from headstart.serving.server.models.model import LoadedModel, load_graph
from tests.serving.server.graphs import classifier, identities, looping, mlp, model_bytes, value

BUCKETS = (1, 2, 4, 6)


def bind(graph: bytes, sizes: tuple[int, ...] = BUCKETS) -> tuple[Bound, Any]:
    model = load_graph(graph, name="m", device=Device(threads=1), max_batch=max(sizes))
    session = open_on(Device(threads=1), graph)
    return Bound(session, model.inputs, model.outputs, buckets=sizes, device="cpu"), session


def padded(array: np.ndarray, sizes: tuple[int, ...] = BUCKETS) -> np.ndarray:
    size = next(one for one in sizes if one >= len(array))
    return np.concatenate([array, np.repeat(array[-1:], size - len(array), axis=0)])


@pytest.mark.parametrize(
    ("most", "sizes"),
    [(1, (1,)), (2, (1, 2)), (3, (1, 2, 3)), (16, (1, 2, 4, 8, 16)), (17, (1, 2, 4, 8, 16, 17))],
)
def test_buckets_double_up_to_the_largest_batch(most: int, sizes: tuple[int, ...]):
    assert buckets(most) == sizes


def test_a_bound_run_is_the_plain_run_of_the_padded_batch_bit_for_bit():
    bound, session = bind(mlp())
    random = np.random.default_rng(0)
    kept = []
    for rows in (*range(1, 7), *range(6, 0, -1)):
        x = random.normal(size=(rows, 16)).astype(np.float32)
        (found,) = bound.run(["y"], {"x": x})
        (plain,) = session.run(["y"], {"x": padded(x)})
        assert np.array_equal(found, plain[:rows])
        kept.append((found, plain[:rows].copy()))
    assert all(np.array_equal(found, plain) for found, plain in kept), "an answer changes when the next one is computed"
    assert sorted(bucket for bucket, *_ in bound._held.plans) == [1, 2, 4, 6], "one set of buffers for each size"


@pytest.mark.parametrize("rows", [1, 2, 3], ids=["bound", "padded", "beyond the buckets"])
def test_a_run_is_cut_off_and_so_are_all_that_follow(rows: int):
    bound, _ = bind(looping(1 << 40), (1, 2))
    x = {"x": np.ones((rows, 64), np.float32)}
    cutting = threading.Timer(0.2, bound.cut)
    cutting.start()
    for _ in range(2):
        with pytest.raises(Exception, match="terminate flag"):
            bound.run(["y"], x)
    with pytest.raises(Exception, match="terminate flag"):
        bound.run(["y"], {"x": np.ones((3 - rows % 2, 64), np.float32)})


def test_a_cut_that_comes_while_buffers_are_bound_cuts_their_run_off(monkeypatch: pytest.MonkeyPatch):
    bound, _ = bind(looping(1 << 40), (1,))
    made = bound._bind
    monkeypatch.setattr(bound, "_bind", lambda *given: [made(*given), bound.cut()][0])
    with pytest.raises(Exception, match="terminate flag"):
        bound.run(["y"], {"x": np.ones((1, 64), np.float32)})


def test_buffers_stay_where_they_are():
    bound, _ = bind(mlp())
    x = np.ones((3, 16), np.float32)
    places = []
    for _ in range(3):
        bound.run(["y"], {"x": x})
        (plan,) = bound._held.plans.values()
        places.append({name: value.data_ptr() for name, value in plan._values.items()})
    assert places[0] == places[1] == places[2]
    assert set(places[0]) == {"x", "y"}


@pytest.mark.parametrize("width", [None, "n"], ids=["nameless", "named"])
def test_an_output_of_any_width_runs_without_buffers(width: str | None):
    nodes = [onnx.helper.make_node("Abs", ["x"], ["y"])]
    bound, _ = bind(model_bytes(nodes, [value("x", ["batch", width])], [value("y", ["batch", width])], {}))
    x = np.arange(-3, 6, dtype=np.float32).reshape(3, 3)
    assert np.array_equal(bound.run(["y"], {"x": x})[0], np.abs(x))
    assert not bound._held.plans


def test_each_set_of_buffers_has_a_graph_of_its_own_and_what_runs_without_has_none():
    def graph(options: onnxruntime.RunOptions) -> str:
        return options.get_run_config_entry("gpu_graph_id")

    bound, _ = bind(mlp())
    for rows in (1, 2, 4, 6):
        bound.run(["y"], {"x": np.ones((rows, 16), np.float32)})
    assert [graph(plan.options) for plan in bound._held.plans.values()] == ["1", "2", "3", "4"]  # 0 is any run's
    assert graph(bound._options) == "-1"


def test_every_type_is_bound_and_strings_run_without():
    kinds = {
        onnx.helper.tensor_dtype_to_np_dtype(kind).name: kind
        for name, kind in onnx.TensorProto.DataType.items()
        if re.fullmatch("FLOAT|DOUBLE|FLOAT16|BOOL|U?INT(8|16|32|64)", name)
    }
    bound, _ = bind(identities(kinds))
    feed = {f"in_{name}": np.array([[1, 0], [3, 7], [0, 1]]).astype(name) for name in kinds}
    for name, array in zip(kinds, bound.run([f"out_{name}" for name in kinds], feed), strict=True):
        np.testing.assert_array_equal(array, feed[f"in_{name}"], strict=True)
    assert len(bound._held.plans) == 1
    bound, _ = bind(identities({"s": onnx.TensorProto.STRING}))
    texts = np.array([["a", "é"], ["", "b"], ["c", "d"]], dtype=object)
    assert bound.run(["out_s"], {"in_s": texts})[0].tolist() == texts.tolist()
    assert not bound._held.plans


def test_images_of_many_sizes_run_without_buffers_of_their_own(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "_MOST_PLANS", 2)
    bound, session = bind(classifier(1))
    for size in (4, 5, 6, 7, 4, 7):
        images = np.random.default_rng(size).integers(0, 256, (3, size, size, 3), np.uint8)
        for found, plain in zip(
            bound.run(["probabilities", "logits"], {"images": images}),
            session.run(["probabilities", "logits"], {"images": padded(images)}),
            strict=True,
        ):
            assert np.array_equal(found, plain[:3])
    assert [shape[:2] for _, shape in bound._held.plans] == [(4, 4), (5, 5)]


def test_buffers_are_of_the_shapes_of_all_inputs_and_no_row_is_made_up():
    nodes = [
        onnx.helper.make_node("ReduceMax", ["a", "across"], ["largest"]),
        onnx.helper.make_node("ReduceSum", ["b", "across"], ["sum"]),
        onnx.helper.make_node("Add", ["largest", "sum"], ["rows"]),
        onnx.helper.make_node("ReduceMin", ["rows", "down"], ["least"]),
        onnx.helper.make_node("Sub", ["rows", "least"], ["y"]),  # a row's number depends on those beside it
    ]
    inputs = [value("a", ["batch", "n"]), value("b", ["batch", "m"])]
    constants = {"across": np.array([1]), "down": np.array([0])}
    bound, session = bind(model_bytes(nodes, inputs, [value("y", ["batch", 1])], constants))
    for width in (2, 5, 2):
        feed = {"a": np.full((3, 4), 7, np.float32), "b": np.arange(1, 3 * width + 1, dtype=np.float32).reshape(3, -1)}
        assert np.array_equal(bound.run(["y"], feed)[0], session.run(["y"], feed)[0])
    assert len(bound._held.plans) == 2


def test_a_batch_beyond_the_largest_runs_as_it_is():
    bound, session = bind(mlp())
    x = np.random.default_rng(0).normal(size=(9, 16)).astype(np.float32)
    assert np.array_equal(bound.run(["y"], {"x": x})[0], session.run(["y"], {"x": x})[0])


def test_threads_do_not_read_each_others_buffers():
    bound, session = bind(mlp())
    wrong: list[int] = []

    def ask(seed: int) -> None:
        random = np.random.default_rng(seed)
        for _ in range(100):
            x = random.normal(size=(3, 16)).astype(np.float32)
            if not np.array_equal(bound.run(["y"], {"x": x})[0], session.run(["y"], {"x": padded(x)})[0][:3]):
                wrong.append(seed)

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_model_with_buckets_is_bound_and_warmed_at_each():
    session = open_on(Device(threads=1), mlp())
    model = LoadedModel(name="m", version="1", session=session, max_batch=6, buckets=BUCKETS)
    assert len(model.warm_up()) == 3
    bound = model._compute.__self__
    assert sorted(bucket for bucket, *_ in bound._held.plans) == [1, 2, 4, 6]
    x = np.random.default_rng(0).normal(size=(5, 16)).astype(np.float32)
    assert np.array_equal(model.run({"x": x}, ["y"])[0], session.run(["y"], {"x": padded(x)})[0][:5])


def test_one_thread_alone_uses_a_session_and_ends_it():
    thread = OneThread("graphs")
    begun: list[str] = []

    class Seen:
        """A session that says who uses it."""

        def __init__(self, session: Any) -> None:
            self._session = session

        def __getattr__(self, name: str) -> Any:
            begun.append(threading.current_thread().name)
            return getattr(self._session, name)

        def __del__(self) -> None:
            begun.append(threading.current_thread().name + " ends")

    plain = load_graph(mlp(), name="m", device=Device(threads=1), max_batch=6)
    model = LoadedModel(
        name="m",
        version="1",
        session=Seen(open_on(Device(threads=1), mlp())),
        max_batch=6,
        buckets=BUCKETS,
        thread=thread,
    )
    begun.clear()  # what it has, read when it was made
    model.warm_up()
    random = np.random.default_rng(0)
    asked = [random.normal(size=(rows, 16)).astype(np.float32) for rows in (1, 2, 3, 6, 7) * 8]
    with ThreadPoolExecutor(4) as pool:
        found = [pool.submit(model.run, {"x": x}, ["y"]) for x in asked]
    for x, run in zip(asked, found, strict=True):
        expected = plain.run({"x": padded(x, (*BUCKETS, 7))}, ["y"])[0]
        np.testing.assert_array_equal(run.result()[0], expected[: len(x)])
    model.close()
    model.cut()  # as it may be after its end
    del model, found, run
    gc.collect()
    thread.submit(int).result()
    assert set(begun[:-1]) == {"graphs"}
    assert begun[-1] == "graphs ends"


def test_that_thread_ends_a_session_also_where_it_is_the_faster():
    class Prompt(OneThread):
        """Has made a call before it is told of the next."""

        def leave(self, function: Callable[[], Any]) -> None:
            super().leave(function)
            self.submit(int).result(10)

    class Ends:
        def __del__(self) -> None:
            ended.append(threading.current_thread().name)

    ended: list[str] = []
    thread = Prompt("graphs")
    model = load_graph(mlp(), name="m", device=Device(threads=1), max_batch=1)
    bound = Bound(Ends(), model.inputs, model.outputs, buckets=(1,), device="cpu", thread=thread)
    del bound
    thread.submit(int).result(10)
    assert ended == ["graphs"]


def on_cuda(graphs: bool) -> LoadedModel:
    device = Device(provider=CUDA, threads=1, options={"enable_cuda_graph": "1"} if graphs else {})
    try:
        session = open_on(device, mlp())
    except PackageError as error:
        pytest.skip(str(error))
    buffers = {"buckets": BUCKETS, "memory": device.memory, "thread": device.thread}
    return LoadedModel(name="m", version="1", session=session, max_batch=6, **buffers)


def check_rows(model: LoadedModel, plain: Any, sizes: tuple[int, ...]) -> None:
    for rows in sizes:
        x = np.random.default_rng(rows).normal(size=(rows, 16)).astype(np.float32)
        expected = plain.run(["y"], {"x": x})[0]
        np.testing.assert_allclose(model.run({"x": x}, ["y"])[0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("graphs", [False, True], ids=["plain", "graphs"])
def test_cuda_answers_as_the_cpu_does(graphs: bool):
    model, plain = on_cuda(graphs), open_on(Device(threads=1), mlp())
    model.warm_up()
    # A graph is captured on the first run of a size, and replayed on the others.
    check_rows(model, plain, (1, 3, 6, 3, 1, 5))


@pytest.mark.gpu
@pytest.mark.parametrize("graphs", [False, True], ids=["plain", "graphs"])
def test_cuda_serves_two_models_while_others_come_and_go(graphs: bool):
    models, plain = [on_cuda(graphs), on_cuda(graphs)], open_on(Device(threads=1), mlp())
    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(check_rows, model, plain, (1, 3, 6) * 50) for model in models * 2]
        for _ in range(5):
            another = on_cuda(graphs)
            another.warm_up()
            another.close()
        for one in asked:
            one.result()
