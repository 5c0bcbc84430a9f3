"""What every function refuses, in the same words: who was wrong, how, and what would be accepted."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

from headstart.kernels.energy import energy_distances, energy_self_terms
from headstart.kernels.engine.precision import PRECISIONS
from headstart.kernels.euclidean import topk
from headstart.kernels.mmd import mmd_distances
from headstart.kernels.neighbours import nearest_neighbours
from headstart.kernels.ragged import RaggedTasks
from headstart.kernels.sinkhorn import default_epsilon, sinkhorn_distances, sinkhorn_self_terms
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
    "sparse": (rows(6, 4, 1).to_sparse(), r"torch\.sparse_coo; accepted: the dtype and device of the tasks"),
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


@pytest.mark.parametrize("options", [{"precision": "fp8"}, {"precision": ["fp32"]}, {"memory": 1}], ids=str)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_bad_options(name: str, options: dict):
    y = rows(9, 4, 2)
    with pytest.raises(ValueError, match=r"accepted: (fp32|bf16|at least)"):
        FUNCTIONS[name](rows(6, 4, 1), RaggedTasks(y, torch.tensor([0, 4, 9]), thirds(y)), **options)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"memory": 1e9}, r"memory is 1000000000\.0; accepted: a whole number of bytes, or None"),
        ({"memory": "1GB"}, "memory is '1GB'"),
        ({"memory": True}, "memory is True"),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_memory_that_is_no_number_of_bytes(name: str, options: dict, said: str):
    y = rows(9, 4, 2)
    with pytest.raises(TypeError, match=said):
        FUNCTIONS[name](rows(6, 4, 1), RaggedTasks(y, torch.tensor([0, 4, 9]), thirds(y)), **options)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda x, tasks: sinkhorn_distances(x, tasks, p=2.0), r"p is 2\.0; accepted: 1, 2"),
        (lambda x, tasks: sinkhorn_distances(x, tasks, p=True), "p is True; accepted: 1, 2"),
        (
            lambda x, tasks: sinkhorn_distances(x, tasks, max_iterations=10.5),
            r"max_iterations is 10\.5; accepted: a ",
        ),
        (lambda x, tasks: sinkhorn_self_terms(tasks, epsilon=1.0, memory=1e9), "memory is"),
        (lambda x, tasks: default_epsilon(x, memory=1e9), "memory is"),
        (lambda x, tasks: default_epsilon(x, 2.0), r"p is 2\.0; accepted: 1, 2"),
        (lambda x, tasks: mmd_distances(x, tasks, bandwidths=torch.tensor([1j])), "bandwidths are torch.complex"),
        (lambda x, tasks: energy_self_terms(tasks, memory="1GB"), "memory is '1GB'"),
        (lambda x, tasks: nearest_neighbours(x, tasks, 2.5), r"k is 2\.5; accepted: 1 to 9, the rows in all tasks"),
        (
            lambda x, tasks: nearest_neighbours(x, tasks, True, per_task=True),
            "k is True; accepted: 1 to 4, ",
        ),
        (lambda x, tasks: topk(x[0], 2.5), r"k is 2\.5; accepted: 1 to T"),
    ],
)
def test_numbers_that_are_not_whole(call: Callable[..., object], said: str):
    with pytest.raises(TypeError, match=said):
        call(rows(6, 4, 1), RaggedTasks(rows(9, 4, 2), torch.tensor([0, 4, 9])))


@pytest.mark.parametrize("call", [sinkhorn_distances, lambda x, tasks, p: default_epsilon(x, p)])
def test_powers_that_are_not_there(call: Callable[..., object]):
    with pytest.raises(ValueError, match="p is 3; accepted: 1, 2"):
        call(rows(6, 4, 1), RaggedTasks(rows(9, 4, 2), torch.tensor([0, 4, 9])), p=3)


def test_whole_numbers_of_numpy_are_taken():
    x, tasks = rows(6, 4, 1), RaggedTasks(rows(9, 4, 2), torch.tensor([0, 4, 9]))
    found = nearest_neighbours(x, tasks, np.int64(2), memory=np.int32(2**30))
    assert torch.equal(found.rows, nearest_neighbours(x, tasks, 2).rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_distances_that_overflow_float32_are_refused_there_and_taken_by_fp64(name: str, dtype: torch.dtype):
    if name == "mmd":
        pytest.skip("at most 2 at any scale")
    # The largest float32 is below 2^128. Where nothing is squared in it, four differences of 2^127 and more are beyond.
    unsquared = name in ("mean distances", "prototype distances")
    scale = 1e60 if dtype == torch.float64 else 2.0**126 if unsquared else 1e20
    y = rows(9, 4, 2).abs().clamp(1, 1.9).to(dtype) * scale
    x, tasks = -y[:6], RaggedTasks(y, torch.tensor([0, 4, 9]), thirds(y))
    with pytest.raises(ValueError, match=r"so far .* in torch.float32; accepted: nearer rows, or precision='fp64'"):
        FUNCTIONS[name](x, tasks, precision="fp32")
    found = FUNCTIONS[name](x, tasks, precision="fp64")
    found = found if isinstance(found, torch.Tensor) else found[0]
    assert bool((found.isfinite() & (found > 0)).all())


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


SELF_TERMS = "self_terms is a (Tensor|SinkhornSelfTerms); accepted: SelfTerms"
OTHERS = "self_terms is a SelfTerms; accepted: SinkhornSelfTerms"


@pytest.mark.parametrize(
    ("call", "error", "said"),
    [
        (lambda x, t: energy_distances(x, t, self_terms=torch.ones(2)), TypeError, SELF_TERMS),
        (lambda x, t: energy_distances(x, t, self_terms=sinkhorn_self_terms(t, epsilon=1.0)), TypeError, SELF_TERMS),
        (lambda x, t: sinkhorn_distances(x, t, self_terms=energy_self_terms(t)), TypeError, OTHERS),
        (lambda x, t: FUNCTIONS["label-aware"](x, t, self_terms=energy_self_terms(t)), TypeError, OTHERS),
        (lambda _, t: energy_self_terms(t, centre=[0.0] * 4), TypeError, "centre is a list; accepted: a torch.Tensor"),
        (lambda x, t: energy_self_terms(t, centre=x[0] > 0), ValueError, "centre is torch.bool .* floating-point"),
        (lambda x, t: energy_self_terms(t, centre=x[0] + 0j), ValueError, "torch.complex64 .* floating-point"),
        (lambda x, t: energy_self_terms(t, centre=x[0].to("meta")), ValueError, "on meta; accepted: .* on cpu"),
        (lambda x, t: mmd_distances(x, t, bandwidths=x[0, :2].to("meta")), NotImplementedError, "meta tensor; no data"),
        (
            lambda x, t: sinkhorn_distances(x, t, tolerance=None),
            TypeError,
            "tolerance is None; accepted: a number of more",
        ),
        (
            lambda x, t: FUNCTIONS["label-aware"](x, t, tolerance="1e-3"),
            TypeError,
            "tolerance is '1e-3'; accepted: a numb",
        ),
        (lambda x, t: sinkhorn_distances(x, t, max_iterations=2**63), ValueError, r"at least 1, below 2\^63"),
        (lambda x, _: RaggedTasks.from_list([x], thirds(x)), TypeError, "labels are one tensor, .*; accepted: a list"),
        (
            lambda x, _: RaggedTasks.from_list(y for y in [x]),
            TypeError,
            "tasks are a generator; accepted: a list of tens",
        ),
        (
            lambda x, _: RaggedTasks.from_list([x], {0: x}),
            TypeError,
            r"labels are a dict; accepted: .* tensors \[n_t\]",
        ),
        (lambda x, _: RaggedTasks.from_list([x], [3]), TypeError, "labels of task 0 is a int; accepted: a torch"),
        (lambda x, _: RaggedTasks.from_list([x], [x[0, 0]]), ValueError, r"labels of task 0 are .*; accepted: \[n_t\]"),
        (lambda x, _: RaggedTasks.from_list([x.sign() * 3e38]).means(), ValueError, "sums overflow in torch.float32"),
        (lambda *_: topk([1.0, 2.0], 1), TypeError, "distances is a list; accepted: a torch.Tensor"),
    ],
)
def test_what_is_of_another_kind_is_refused_by_name(call: Callable[..., object], error: type[Exception], said: str):
    y = rows(9, 4, 2)
    with pytest.raises(error, match=said):
        call(rows(6, 4, 1), RaggedTasks(y, torch.tensor([0, 4, 9]), thirds(y)))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")  # PyTorch's own, on its first tangent
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_target_with_a_tangent_is_refused(name: str):
    x, y = rows(6, 4, 1), rows(9, 4, 2)
    tasks = RaggedTasks(y, torch.tensor([0, 4, 9]), thirds(y))
    with pytest.raises(ValueError, match=r"forward-mode tangent; accepted: none, and torch\.autograd\.grad"):
        torch.func.jvp(lambda z: FUNCTIONS[name](z, tasks), (x,), (x,))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_memory_beyond_63_bits_is_refused(name: str):
    y = rows(9, 4, 2)
    with pytest.raises(ValueError, match=r"memory is 9223372036854775808; accepted: a whole .*, below 2\^63"):
        FUNCTIONS[name](rows(6, 4, 1), RaggedTasks(y, torch.tensor([0, 4, 9]), thirds(y)), memory=2**63)


def test_fp64_is_not_offered_where_it_overflows_itself():
    y = rows(9, 4, 2).double() * 1e200
    with pytest.raises(ValueError, match=r"overflow in torch.float64; accepted: nearer rows$"):
        energy_distances(y[:6], RaggedTasks.from_list([y]))
