"""Float32 that is exact on a GPU as on the CPU, and run after run the same bits."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from headstart.kernels.engine.precision import exact_products
from headstart.trainer.errors import RunError


@contextlib.contextmanager
def exact_on(device: torch.device, purpose: str) -> Iterator[None]:
    """Float32 without TF32, bfloat16 and autocast on `device`, whatever the process has set.

    Raises `RunError` where the GPU's memory is full, with `purpose` in it: "compute features".
    """
    if device.type == "cpu":
        backend: Any = torch.backends.mkldnn
        before = backend.conv.fp32_precision
        try:
            backend.conv.fp32_precision = "ieee"
            with exact_products(device):
                yield
        finally:
            backend.conv.fp32_precision = before
        return
    try:
        # From `allow_tf32` alone "none" follows, which is whatever the process has set for all of torch.
        exact = torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False, fp32_precision="ieee")
        with exact_products(device), exact:
            yield
    except torch.OutOfMemoryError as error:
        raise RunError(
            f"{torch.cuda.get_device_name(device)} has no memory left to {purpose}: "
            f"{str(error).splitlines()[0].rstrip('.')}. Free it, or set CUDA_VISIBLE_DEVICES to nothing for the CPU, "
            "and run the same command again: what is finished is kept"
        ) from error
