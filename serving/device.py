"""Where models run: the execution provider that was asked for, or nothing.

What is here for CUDA and TensorRT was written where there was no GPU: the refusals are tested, a run is not.
"""

import traceback
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from headstart.serving.errors import PackageError, first_line
from headstart.serving.one_thread import OneThread
from headstart.serving.ort import onnxruntime
from headstart.serving.runtime import CPU, check_threads, open_session

CUDA = "CUDAExecutionProvider"
TENSORRT = "TensorrtExecutionProvider"
ENGINES = "trt_engine_cache_path"
# HEURISTIC: the default search for convolution algorithms tries all of them for each new shape. The arena grows by what
# is asked for, since it does not shrink. TF32, which ONNX Runtime allows by itself, has 10 bits: answers would not be
# those that were proven.
_CUDA_OPTIONS = {
    "cudnn_conv_algo_search": "HEURISTIC",
    "arena_extend_strategy": "kSameAsRequested",
    "use_tf32": "0",
}
_GRAPHS = {CUDA: "enable_cuda_graph", TENSORRT: "trt_cuda_graph_enable"}
GRAPH_THREAD = OneThread("headstart-graphs")
"""Where all is done on a device whose options ask for CUDA graphs: while one thread captures, what most calls of others
do makes both fail, and a graph belongs to the thread that captured it."""
_IDENTITY = bytes.fromhex(  # a graph of one Identity, float32 [1]; the server has no onnx to build it with
    "080812003a3b0a100a017812017922084964656e74697479120570726f62655a0f0a0178120a0a08080112040a020801"
    "620f0a0179120a0a08080112040a02080142040a001011"
)


@dataclass(frozen=True, kw_only=True)
class Device:
    """Where sessions run."""

    provider: str = CPU
    """Execution provider that must run them."""
    threads: int | None = None
    """Threads within an operator; None is one per core."""
    options: Mapping[str, str] = field(default_factory=dict)
    """ONNX Runtime's options of the CUDA or TensorRT provider, over ours: `enable_cuda_graph=1` captures a CUDA graph
    for each batch size, `use_tf32=1` allows CUDA TF32, `gpu_mem_limit` is in bytes, `trt_engine_cache_path` keeps
    TensorRT's engines from one start to the next. TensorRT's switches are True and False."""

    def __post_init__(self) -> None:
        available = onnxruntime.get_available_providers()
        if self.provider not in available:
            accepted = ", ".join(available)
            raise PackageError(f"the provider {self.provider!r} is not in this ONNX Runtime; accepted: {accepted}")
        check_threads(self.threads)
        if self.options and self.provider not in (CUDA, TENSORRT):
            given = ", ".join(self.options)
            raise PackageError(f"{self.provider} takes no options, found {given}; accepted: with {CUDA} or {TENSORRT}")

    @property
    def thread(self) -> OneThread | None:
        """The one thread that may use the device, where CUDA graphs are asked for; None is any."""
        asked = self.options.get(_GRAPHS.get(self.provider, ""), "0")
        return GRAPH_THREAD if asked.lower() in ("1", "true") else None

    @contextmanager
    def ending(self) -> Iterator[None]:
        """End the sessions of calls that raised where alone they may be used: an error keeps what its frames hold."""
        try:
            yield
        except BaseException as error:
            if self.thread:
                self.thread.submit(traceback.clear_frames, error.__traceback__).result()
            raise

    @property
    def memory(self) -> str:
        """Where its sessions' inputs and outputs lie, as ONNX Runtime calls it."""
        return "cuda" if self.provider in (CUDA, TENSORRT) else "cpu"


def read_options(texts: Iterable[str]) -> dict[str, str]:
    """`KEY=VALUE` each, as the command line has them.

    Raises:
        PackageError: one is not of that form, or a key is there twice.
    """
    options: dict[str, str] = {}
    for text in texts:
        key, _, value = text.partition("=")
        if not (key and value) or key in options:
            raise PackageError(f"the provider option {text[:80]!r} is not KEY=VALUE, or is there twice; give each once")
        options[key] = value
    return options


def open_on(device: Device, model: Path | bytes, *, key: str = "") -> onnxruntime.InferenceSession:
    """A session on the device's provider. Threads do not spin while they wait.

    Args:
        device: where.
        model: the graph's file, or its bytes.
        key: tells the weights of this model from others', for engines that are kept: TensorRT's own name of an engine
            is that of the graph alone.

    Raises:
        PackageError: the provider does not load on this machine, or ONNX Runtime refuses the graph.
    """
    if device.memory == "cpu":
        return open_session(model, device.provider, device.threads)
    chosen = providers(device, key)
    if ENGINES in chosen[0][1]:
        try:
            Path(chosen[0][1][ENGINES]).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise PackageError(f"{ENGINES} cannot be made: {first_line(error)}; give a folder to write in") from error
    opened = (model, device.provider, device.threads, chosen)
    return device.thread.submit(open_session, *opened).result() if device.thread else open_session(*opened)


def check(device: Device) -> None:
    """Load the provider, so that a server on a machine that lacks it says so before it serves.

    Raises:
        PackageError: it does not load.
    """
    if device.provider != CPU:
        open_on(device, _IDENTITY)


def providers(device: Device, key: str = "") -> list[Any]:
    """ONNX Runtime's list: TensorRT has CUDA behind it for what it lacks, and CUDA the CPU."""
    if device.provider == CUDA:
        return [(CUDA, {**_CUDA_OPTIONS, **device.options}), CPU]
    options = dict(device.options)
    folder = options.get(ENGINES)
    if folder is not None:
        if key:
            options[ENGINES] = str(Path(folder) / key)
            options |= {
                "trt_engine_cache_enable": "True",
                "trt_timing_cache_enable": "True",
                "trt_timing_cache_path": folder,
            }
        else:
            del options[ENGINES]
    return [(TENSORRT, options), (CUDA, dict(_CUDA_OPTIONS)), CPU]
