"""The device that cases run on, and one for machines without a GPU that is not the CPU: see other_device.cpp.

There, what a GPU would refuse is refused: an operator of tensors on two devices. It has neither a GPU's speed, nor its
arithmetic, nor its order of things.
"""

import os
import shutil
import subprocess
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from headstart.kernels.engine import units

LIBRARY = os.environ.get("HEADSTART_OTHER_DEVICE", "")
DEVICE = "other" if LIBRARY else "cpu" if units.INTERPRETED else "cuda"


def can_be_built() -> bool:
    """Whether there is a g++ that knows C++20, which PyTorch's headers are in."""
    if shutil.which("g++") is None:
        return False
    version = subprocess.run(["g++", "-dumpversion"], capture_output=True, text=True, check=True).stdout
    return int(version.split(".")[0]) >= 11


def build(folder: Path) -> Path:
    """Compile the device with g++."""
    library, source = folder / "other_device.so", Path(__file__).with_name("other_device.cpp")
    home = Path(torch.__file__).parent
    include = [f"-I{home / 'include' / part}" for part in ("", "torch/csrc/api/include")]
    options = ["-std=c++20", "-O1", "-shared", "-fPIC", *include, f"-L{home / 'lib'}"]
    subprocess.run(["g++", *options, source, "-o", library, "-ltorch", "-ltorch_cpu", "-lc10"], check=True)
    return library


def load(library: str) -> None:
    """Make it known to PyTorch as `other`, and to Triton's interpreter, which is given the same memory as the CPU's."""
    torch.ops.load_library(library)
    torch.utils.rename_privateuse1_backend("other")
    module = ModuleType("torch.other")
    for name, value in {"is_available": True, "device_count": 1, "current_device": 0, "_is_in_bad_fork": False}.items():
        setattr(module, name, lambda value=value: value)
    torch._register_device_module("other", module)
    from triton.runtime.interpreter import GridExecutor

    def host(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        assert value.device.type == "other", "a program was given a tensor of the CPU"
        return torch.ops.headstart_tests.as_cpu(value)

    def hosts(
        executor: GridExecutor, given: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[list[Any], dict[str, Any]]:
        return [host(value) for value in given], {name: host(value) for name, value in named.items()}

    GridExecutor._init_args_hst = hosts
    GridExecutor._restore_args_dev = lambda executor, *parts: None


if LIBRARY:
    load(LIBRARY)
