"""How the Triton programs are laid out on a device, and below what share of the norms their products have no digit."""

from typing import NamedTuple


class Config(NamedTuple):
    """How a program is laid out."""

    bm: int
    """Rows of x in a tile."""
    bn: int
    """Rows of y in a tile."""
    bk: int
    """Features that are multiplied at a time; 64 is a multiple of it."""
    num_warps: int
    num_stages: int
    """Steps of bk features that are on their way to shared memory at once, the one in use counted."""


# By precision and by whether rows have more than 512 numbers. Hopper: 227 KB of shared memory. Long rows keep one large
# tile and four stages on a multiprocessor; short ones, and the three products of bf16x3 with their waits between them,
# two of 96 KB and at most 255 registers for 128 threads. Ampere: at most 96 KB, which the small cards (8.6, 8.9) have.
_HOPPER = {
    ("bf16", True): Config(128, 256, 64, 8, 4),
    ("bf16", False): Config(128, 128, 64, 4, 3),
    ("tf32", True): Config(128, 256, 32, 8, 4),
    ("tf32", False): Config(128, 128, 32, 4, 3),
    ("bf16x3", True): Config(128, 128, 32, 4, 3),
    ("bf16x3", False): Config(128, 128, 32, 4, 3),
    ("fp32", True): Config(128, 64, 16, 4, 3),
    ("fp32", False): Config(128, 64, 16, 4, 3),
}
_AMPERE = {
    ("bf16", True): Config(128, 256, 32, 8, 4),
    ("bf16", False): Config(128, 128, 32, 8, 3),
    ("tf32", True): Config(128, 128, 32, 8, 3),
    ("tf32", False): Config(128, 128, 32, 8, 3),
    ("bf16x3", True): Config(128, 128, 32, 8, 3),
    ("bf16x3", False): Config(128, 128, 32, 8, 3),
    ("fp32", True): Config(128, 64, 16, 4, 3),
    ("fp32", False): Config(128, 64, 16, 4, 3),
}
FINISH = Config(32, 256, 1, 4, 1)
"""Of `finish_kernel`, which only reads: rows of 1 KB, and enough programs for small products."""


def choose_config(precision: str, pitch: int, capability: tuple[int, int]) -> Config:
    """The layout of `tile_kernel` for rows of `pitch` numbers on a device: no size of a task has a part in it."""
    # 12.x, which are newer, have 99 KB of shared memory a block, as 8.6 and 8.9 have.
    return (_HOPPER if capability[0] in (9, 10) else _AMPERE)[precision, pitch > 512]


def cancellation(precision: str, pitch: int) -> float:
    """`tau` of the programs: the share of |x|^2 + |y|^2 at or below which a squared distance has no digit left.

    Tensor cores: about twice the loss that `programs` derives, K 2^-26 for the products and 2^-25 for each step, of
    which bf16x3 takes three times as many and TF32 on Ampere twice. fp32 is rounded, not cut: K 2^-26 is what a sum of
    K equal numbers loses on average where all its roundings go one way. The 8 is for the norms and short rows.
    """
    share = {"bf16": 0.25, "tf32": 0.375, "bf16x3": 0.375, "fp32": 0.125}[precision]
    return float((share * pitch + 8) * 2.0**-23)
