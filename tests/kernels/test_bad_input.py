"""What every function refuses, in the same words: who was wrong, how, and what would be accepted."""

import math

import pytest
import torch

from headstart.kernels.energy import energy_distances, energy_self_terms
from headstart.kernels.engine.precision import PRECISIONS
from headstart.kernels.ragged import RaggedTasks
from tests.kernels.cases import FUNCTIONS, thirds


def rows(n: int, d: int, seed: int) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def with_one(value: float) -> torch.Tensor:
    x = rows(6, 4, 1)
    x[3, 2] = value
    return x


BAD = {
    "another D": (rows(6, 5, 1), r"target is torch.float32 \[6, 5\] on cpu; accepted: \[N, 4\]"),
    "one dimension": (rows(6, 4, 1)[0], r"\[N, 4\]"),
    "no rows": (rows(0, 4, 1), "target has no rows"),
    "another dtype": (rows(6, 4, 1).double(), r"torch.float64 .*; accepted: .* torch.float32 on cpu"),
    "another device": (rows(6, 4, 1).to("meta"), r"on meta; accepted: .* torch.float32 on cpu"),
    "NaN": (with_one(math.nan), "NaN or infinite features in row 3; accepted: finite"),
    "infinity": (with_one(-math.inf), "NaN or infinite features in row 3; accepted: finite"),
}


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_bad_targets(name: str, bad: str):
    target, said = BAD[bad]
    y = rows(9, 4, 2)
    tasks = RaggedTasks(y, torch.tensor([0, 4, 9]), thirds(y))
    with pytest.raises(ValueError, match=said):
        FUNCTIONS[name](target, tasks)


@pytest.mark.parametrize("options", [{"precision": "fp8"}, {"memory": 1}], ids=str)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_bad_options(name: str, options: dict):
    y = rows(9, 4, 2)
    with pytest.raises(ValueError, match=r"accepted: (fp32|bf16|at least)"):
        FUNCTIONS[name](rows(6, 4, 1), RaggedTasks(y, torch.tensor([0, 4, 9]), thirds(y)), **options)


def test_self_terms_of_features_of_another_length_are_refused():
    x, y = rows(6, 4, 1), rows(9, 4, 2)
    kept = energy_self_terms(RaggedTasks.from_list([rows(9, 5, 2)]), precision="bf16")
    with pytest.raises(ValueError, match=r"centre \[5\]; accepted: \[4\]"):
        energy_distances(x, RaggedTasks.from_list([y]), precision="bf16", self_terms=kept)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_precision_is_taken_by_every_function(name: str, precision: str):
    y = rows(9, 4, 2)
    found = FUNCTIONS[name](rows(6, 4, 1), RaggedTasks(y, torch.tensor([0, 4, 9]), thirds(y)), precision=precision)
    found = found if isinstance(found, torch.Tensor) else found[0]
    assert found.dtype == PRECISIONS[precision]
    assert bool(found.isfinite().all())
