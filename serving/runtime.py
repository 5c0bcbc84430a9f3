"""Predictions from a package by ONNX Runtime, with hardly anything around `session.run`."""

import contextlib
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headstart.serving import cores
from headstart.serving.errors import PackageError
from headstart.serving.images import read_image
from headstart.serving.manifest import Latency, Manifest, Tensor
from headstart.serving.ort import onnxruntime
from headstart.serving.package import MODEL, verify

INPUT = "images"
OUTPUTS = ["logits", "probabilities"]
CPU = "CPUExecutionProvider"

MOST = max(64, 4 * (os.cpu_count() or 1))
"""Threads, and processes of a server: ten thousand start, take all memory and do nothing."""
WINDOW = 64  # files decoded before they are predicted: bounds the memory of `predict_files`
MAX_BATCH = 16  # images in one call of `predict_files`; the largest batch whose parity is proven

_DTYPES = {"tensor(float)": "float32", "tensor(uint8)": "uint8"}


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What a package says about one file; `dataclasses.asdict` is its JSON."""

    file: str
    """The path as it was given."""
    label: str
    """The most probable class."""
    probability: float
    """Its probability, 0 to 1."""
    probabilities: dict[str, float]
    """Probability of every class, in the order of the package's labels."""


def check_threads(threads: int | None) -> None:
    """Refuse a number of threads that is none, or would take the machine down.

    Raises:
        PackageError: it is below 1 or above `MOST`.
    """
    if threads is not None and not 1 <= threads <= MOST:
        raise PackageError(f"threads is {threads}; accepted: 1 to {MOST}, or none for one per core")


def open_session(
    model: Path | bytes, provider: str = CPU, threads: int | None = None, chosen: Sequence[Any] = ()
) -> onnxruntime.InferenceSession:
    """An ONNX Runtime session that runs on `provider` or not at all.

    ONNX Runtime itself drops a provider that does not load, prints, and goes on with the CPU. Idle threads do
    not spin: on a shared host they take the time of others.

    Args:
        model: the graph's file, its external data beside it, or its bytes.
        provider: name of an execution provider; the CPU takes only what this one lacks.
        threads: threads within an operator; None is one per core, or as many as a container's limit allows.
        chosen: ONNX Runtime's list of providers with their options, `provider` first; by default that alone.

    Raises:
        PackageError: the provider is unknown or does not load, or ONNX Runtime refuses the graph.
    """
    available = onnxruntime.get_available_providers()
    if provider not in available:
        raise PackageError(f"the provider {provider!r} is not in this ONNX Runtime; accepted: {', '.join(available)}")
    check_threads(threads)
    if provider != CPU:  # CUDA's libraries from their wheels: ONNX Runtime by itself looks for the system's alone
        with contextlib.redirect_stdout(sys.stderr):  # it prints what it misses
            onnxruntime.preload_dlls()
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.intra_op_num_threads = threads or cores.limit() or 0
    options.inter_op_num_threads = 1
    options.log_severity_level = 4  # its errors come as exceptions as well, and its own lines would tear a log of JSON
    try:
        session = onnxruntime.InferenceSession(
            model if isinstance(model, bytes) else str(model),
            options,
            providers=list(chosen) or [provider],
            enable_fallback=0,  # the fallback prints to stdout
        )
    # ONNX Runtime's exceptions have no common base below Exception.
    except Exception as error:
        name = "the graph" if isinstance(model, bytes) else str(model)
        raise PackageError(
            f"ONNX Runtime {onnxruntime.__version__} cannot load {name} on {provider}: "
            f"{' '.join(str(error).split())[:1000]}; install what the provider needs and the ONNX Runtime that the "
            f"package was made with, or ask for {CPU}"
        ) from error
    if session.get_providers()[0] != provider:
        raise PackageError(
            f"the provider {provider!r} does not load on this machine (ONNX Runtime's log says why); "
            f"install what it needs, or ask for {', '.join(session.get_providers())}"
        )
    return session


def describe(nodes: Sequence[Any]) -> tuple[Tensor, ...]:
    """The inputs or outputs of a session as a manifest writes them."""
    return tuple(
        Tensor(name=node.name, dtype=_DTYPES.get(node.type, node.type), shape=tuple(node.shape)) for node in nodes
    )


class Predictor:
    """A verified package in an ONNX Runtime session.

        predictor = Predictor(Path("runs/demo/package"))
        logits, probabilities = predictor.predict(images)  # uint8 [N, H, W, 3]

    Calls from several threads are safe. Do not fork once it exists.

    Args:
        directory: the package.
        provider: execution provider that must run it.
        threads: threads within an operator; None is one per core.

    Raises:
        PackageError: the package does not verify, its graph is not what its manifest says, or the provider
            does not load.
    """

    def __init__(self, directory: Path, provider: str = CPU, threads: int | None = None) -> None:
        self.directory = Path(directory)
        self.manifest = verify(self.directory)
        self.labels = self.manifest.labels
        self.provider = provider
        self.threads = threads
        self.session = open_session(self.directory / MODEL, provider, threads)
        found = describe(self.session.get_inputs()), describe(self.session.get_outputs())
        expected = _signature(self.manifest)
        for what, tensors in (
            ("graph has", found),
            ("manifest says", (self.manifest.inputs, self.manifest.outputs)),
        ):
            if tensors != expected:
                raise PackageError(
                    f"{self.directory}: the {what} {_words(tensors)}; accepted: {_words(expected)}, a column "
                    f"for each of its {len(self.labels)} labels; export the run again: headstart export RUN"
                )
        self._run = self.session.run

    def predict(self, images: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Classify images of one size.

        Args:
            images: uint8 [N, H, W, 3], RGB as `read_image` gives it; N, H and W at least 1.

        Returns:
            logits float32 [N, C] and probabilities float32 [N, C] = softmax(logits / temperature).

        Raises:
            PackageError: another type or shape, or ONNX Runtime cannot run them.
        """
        try:
            logits, probabilities = self._run(OUTPUTS, {INPUT: images})
        # ONNX Runtime compares type and shape itself; a good call does not pay for it twice.
        except Exception as error:
            raise PackageError(_refusal(images, error)) from error
        return logits, probabilities

    def predict_files(self, paths: Sequence[Path | str]) -> list[Prediction]:
        """Classify image files, in their order; files of one size share a call.

        Raises:
            PackageError: a file cannot be read as an image.
        """
        predictions: list[Prediction] = []
        for start in range(0, len(paths), WINDOW):
            predictions.extend(self._predict_window(paths[start : start + WINDOW]))
        return predictions

    def warm_up(self) -> None:
        """Run once on a grey image, so that the first request does not pay for allocation and planning."""
        sizes = zip(self.manifest.inputs[0].shape, (1, 224, 224, 3), strict=True)
        self.predict(np.full([size if isinstance(size, int) else free for size, free in sizes], 127, np.uint8))

    def _predict_window(self, paths: Sequence[Path | str]) -> list[Prediction]:
        images = [read_image(Path(path)) for path in paths]
        by_size: dict[tuple[int, ...], list[int]] = {}
        for index, image in enumerate(images):
            by_size.setdefault(image.shape, []).append(index)
        rows: dict[int, NDArray[np.float32]] = {}
        for indices in by_size.values():
            for start in range(0, len(indices), MAX_BATCH):
                batch = indices[start : start + MAX_BATCH]
                _, probabilities = self.predict(np.stack([images[index] for index in batch]))
                rows.update(zip(batch, probabilities, strict=True))
        return [self._prediction(path, rows[index]) for index, path in enumerate(paths)]

    def _prediction(self, path: Path | str, row: NDArray[np.float32]) -> Prediction:
        best = int(row.argmax())
        probabilities = dict(zip(self.labels, row.tolist(), strict=True))
        return Prediction(
            file=str(path), label=self.labels[best], probability=float(row[best]), probabilities=probabilities
        )


def measure_latency(predictor: Predictor, image: NDArray[np.uint8], runs: int = 200) -> Latency:
    """Time `predict` beside a bare `session.run` on one image, in turns, so that both see the same noise.

    Args:
        predictor: the package.
        image: uint8 [H, W, 3], or a batch uint8 [N, H, W, 3].
        runs: timed calls of each, after a tenth as many untimed ones.

    Returns:
        the medians in milliseconds and their ratio.
    """
    images = np.ascontiguousarray(image if image.ndim == 4 else image[None])
    feed, session = {INPUT: images}, predictor.session
    ours, theirs = medians_ms([lambda: predictor.predict(images), lambda: session.run(OUTPUTS, feed)], runs)
    return Latency(
        batch=images.shape[0],
        shape=images.shape,
        runs=runs,
        provider=predictor.provider,
        threads=predictor.threads or 0,
        predict_p50_ms=ours,
        session_run_p50_ms=theirs,
        ratio=ours / theirs,
    )


def medians_ms(calls: Sequence[Callable[[], object]], runs: int) -> list[float]:
    """Median milliseconds of each call, timed in turns `runs` times after a tenth as many untimed ones."""
    if runs < 1:
        raise ValueError(f"runs is {runs}; accepted: at least 1")
    seconds: list[list[float]] = [[] for _ in calls]
    for turn in range(-(runs // 10 + 1), runs):
        order = range(len(calls)) if turn % 2 else reversed(range(len(calls)))
        for index in order:  # none always profits from another's cache
            started = time.perf_counter()
            calls[index]()
            if turn >= 0:
                seconds[index].append(time.perf_counter() - started)
    return [float(np.median(times)) * 1000 for times in seconds]


def _refusal(images: Any, error: Exception) -> str:
    """Say what was wrong with a batch that ONNX Runtime did not run."""
    shape, dtype = getattr(images, "shape", None), getattr(images, "dtype", None)
    if shape is None or dtype != np.uint8 or len(shape) != 4 or shape[-1] != 3 or 0 in shape:
        found = f"{dtype} {list(shape)}" if shape is not None else type(images).__name__
        return f"images are {found}; accepted: a uint8 array [N, H, W, 3] with N, H and W at least 1"
    return f"ONNX Runtime could not run images of shape {list(shape)}: {error}"


def _signature(manifest: Manifest) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The inputs and outputs that a package must have: features exactly where drift is recorded."""
    images = Tensor(name=INPUT, dtype="uint8", shape=("batch", "height", "width", 3))
    columns = dict.fromkeys(OUTPUTS, len(manifest.labels))
    if manifest.drift:
        columns[manifest.drift.output] = len(manifest.drift.mean)
    outputs = (Tensor(name=name, dtype="float32", shape=("batch", number)) for name, number in columns.items())
    return (images,), tuple(outputs)


def _words(tensors: tuple[tuple[Tensor, ...], tuple[Tensor, ...]]) -> str:
    sides = [", ".join(f"{one.name} {one.dtype} {list(one.shape)}" for one in side) for side in tensors]
    return " -> ".join(sides)
