"""Where models run: the execution provider that was asked for, or nothing."""

import contextlib
import sys
from dataclasses import dataclass
from pathlib import Path

import onnxruntime

from headstart.serving.errors import PackageError, first_line
from headstart.serving.runtime import CPU, open_session

CUDA = "CUDAExecutionProvider"
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

    def __post_init__(self) -> None:
        available = onnxruntime.get_available_providers()
        if self.provider not in available:
            accepted = ", ".join(available)
            raise PackageError(f"the provider {self.provider!r} is not in this ONNX Runtime; accepted: {accepted}")
        if self.threads is not None and self.threads < 1:
            raise PackageError(f"threads is {self.threads}; accepted: at least 1, or none for one per core")


def open_on(device: Device, model: Path | bytes) -> onnxruntime.InferenceSession:
    """A session on the device's provider. Threads do not spin while they wait.

    Raises:
        PackageError: the provider does not load on this machine, or ONNX Runtime refuses the graph.
    """
    if device.provider == CUDA:
        return _open_cuda(model, device)
    return open_session(model, device.provider, device.threads)


def check(device: Device) -> None:
    """Load the provider, so that a server on a machine that lacks it says so before it serves.

    Raises:
        PackageError: it does not load.
    """
    if device.provider != CPU:
        open_on(device, _IDENTITY)


def _open_cuda(model: Path | bytes, device: Device) -> onnxruntime.InferenceSession:
    """A session on the CUDA provider. Written where there was no GPU: the refusals are tested, a run is not.

    HEURISTIC: the default search for convolution algorithms tries all of them for each new shape. The arena grows by
    what is asked for, since it does not shrink.
    """
    with contextlib.redirect_stdout(sys.stderr):  # it prints what it misses
        onnxruntime.preload_dlls()  # cuDNN and cuBLAS from their wheels, where the system has none
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.intra_op_num_threads = device.threads or 0
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    settings = {"cudnn_conv_algo_search": "HEURISTIC", "arena_extend_strategy": "kSameAsRequested"}
    try:
        session = onnxruntime.InferenceSession(
            model if isinstance(model, bytes) else str(model),
            options,
            providers=[(CUDA, settings), CPU],
            enable_fallback=0,  # the fallback prints to stdout
        )
    # ONNX Runtime's exceptions have no common base below Exception.
    except Exception as error:
        raise PackageError(f"ONNX Runtime cannot load the graph on {CUDA}: {first_line(error)}") from error
    if session.get_providers()[0] != CUDA:
        raise PackageError(
            f"the provider {CUDA!r} does not load on this machine (ONNX Runtime's log says why); "
            f"install what it needs, or ask for {CPU}"
        )
    return session
