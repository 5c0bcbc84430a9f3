"""The GPU's figures in one command: `make bench-gpu`, or python3 -m benchmarks.gpu with PYTHONPATH=.typing:."""

import sys

import torch

from benchmarks import energy, euclidean
from benchmarks.rows import device_name


def main() -> None:
    """Measure on the CUDA device, append the rows and print them."""
    if not torch.cuda.is_available():
        print(
            "no CUDA device here: run this on a machine with a GPU; `make bench` has the CPU's figures", file=sys.stderr
        )
        sys.exit(2)
    print(device_name())
    euclidean.main()
    energy.main()


if __name__ == "__main__":
    main()
