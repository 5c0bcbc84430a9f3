"""The choice of a path: what it follows from, how it is overridden, and what is told of it."""

import pytest
import torch

from headstart.kernels import dispatch
from headstart.kernels.energy import energy_distances
from headstart.kernels.engine.memory import DEFAULT_MEMORY
from headstart.kernels.ragged import RaggedTasks
from headstart.kernels.sinkhorn import sinkhorn_distances
from tests.kernels.cases import FUNCTIONS, held, thirds

CUDA = torch.device("cuda")


@pytest.mark.parametrize(
    ("device", "precision", "dim", "path"),
    [
        (torch.device("cpu"), "bf16", 64, "eager"),
        (CUDA, "fp64", 64, "eager"),
        (CUDA, "fp32", 64, "streamed"),
        (CUDA, "bf16", dispatch.FUSED_BELOW - 1, "fused"),
        (CUDA, "bf16x3", dispatch.FUSED_BELOW, "streamed"),
        (CUDA, "tf32", 2048, "streamed"),
    ],
)
def test_the_rule(device: torch.device, precision: str, dim: int, path: str):
    assert dispatch.choose(device, precision, dim)[0] == path


def test_what_is_asked_for_is_taken_or_refused():
    with dispatch.override("eager"):
        assert dispatch.choose(torch.device("cpu"), "fp64", 64) == ("eager", "asked for")
    with dispatch.override("fused"):
        assert dispatch.choose(CUDA, "bf16", 4096) == ("fused", "asked for")
        with pytest.raises(ValueError, match="accepted there: eager"):
            dispatch.choose(CUDA, "fp64", 64)
    assert dispatch.choose(CUDA, "bf16", 4096)[0] == "streamed"
    with pytest.raises(ValueError, match="accepted: eager, streamed, fused"), dispatch.override("fast"):
        pass


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about a machine without CUDA")
def test_a_gpu_path_on_the_cpu_is_refused():
    x = torch.randn(5, 4)
    with dispatch.override("fused"), pytest.raises(ValueError, match="need a CUDA device, not cpu"):
        energy_distances(x, RaggedTasks.from_list([x]))


def problem(device: str) -> tuple[torch.Tensor, RaggedTasks]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(700, 40, generator=generator).to(device)
    sizes = torch.tensor([1, 5, 900, 64, 64, 300, 9])
    features = torch.randn(int(sizes.sum()), 40, generator=generator).to(device)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)])
    return x, RaggedTasks(features, offsets, thirds(features))


@pytest.mark.parametrize("memory", [None, 3 * 2**22, 2**25], ids=str)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_function_reports_its_path_and_keeps_to_the_memory(name: str, memory: int | None, device: str):
    x, tasks = problem(device)
    if memory is not None and device == "cuda":
        memory *= 8  # as a tile is larger there
    with dispatch.report() as reports:
        _, most = held(lambda: FUNCTIONS[name](x, tasks, memory=memory))
    assert reports
    names = {each.function for each in reports}
    # Terms of a distance over pairs come in whichever order; label distances are Fréchet distances.
    expected = {
        "energy": {"pair sums", "own sums"},
        "mmd": {"pair sums", "own sums"},
        "label-aware": {"Fréchet distances", "transports"},
    }
    assert names == expected.get(name, {name})
    bound = DEFAULT_MEMORY if memory is None else memory
    for each in reports:
        assert each.path == "eager"
        assert each.reason
        assert each.precision in ("fp32", "fp64")
        assert 0 < each.peak_bytes <= bound
    if device == "cpu" and name not in ("mmd", "label-aware"):
        # Of a default bandwidth and of label distances more is held between the parts that report.
        # What is as long as T, N or the sum of n_t comes on top: up to ten numbers of 8 bytes at a time, here.
        assert most <= max(each.peak_bytes for each in reports) + 80 * (len(x) + len(tasks.features))


@pytest.mark.parametrize(
    ("name", "num_target", "sizes"),
    [
        ("pair sums", 4000, [1000]),  # the target's rows are kept from tile to tile
        ("neighbours", 4000, [1000]),
        ("prototype distances", 9, [3] * 300),  # and sums of many small classes
    ],
)
def test_what_grows_with_the_sets_is_planned_for(name: str, num_target: int, sizes: list[int]):
    generator = torch.Generator().manual_seed(0)
    x, *sets = (torch.randn(n, 300, generator=generator) for n in (num_target, *sizes))
    tasks = RaggedTasks.from_list(sets, [thirds(y) for y in sets])
    with dispatch.report() as reports:
        _, most = held(lambda: FUNCTIONS[name](x, tasks))
    assert most <= reports[0].peak_bytes + 80 * (len(x) + len(tasks.features))


@pytest.mark.parametrize("label_distance", ["bures", "sinkhorn"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_nothing_is_too_large_for_a_bound_that_was_not_given(
    name: str, label_distance: str, monkeypatch: pytest.MonkeyPatch, device: str
):
    if label_distance == "sinkhorn" and name != "label-aware":
        pytest.skip("has no label distance")
    x, tasks = problem(device)
    x, tasks = x[:40], RaggedTasks(tasks.features[:70], torch.tensor([0, 6, 70]), thirds(tasks.features[:70]))
    x.requires_grad_(name not in ("mean distances", "neighbours", "prototype distances"))
    how = {"label_distance": label_distance} if name == "label-aware" else {}
    plain = FUNCTIONS[name](x, tasks, **how)
    # A default that no input fits: of wider rows, as of 25,088 numbers, 256 MiB are as few.
    monkeypatch.setattr("headstart.kernels.engine.memory.DEFAULT_MEMORY", 2)
    found = FUNCTIONS[name](x, tasks, **how)
    plain, found = (each if isinstance(each, torch.Tensor) else each[0] for each in (plain, found))
    # Transports recompute their costs then, which moves them by what the iteration leaves: 1e-3 of costs of 100.
    torch.testing.assert_close(found, plain, rtol=1e-5, atol=0.1 if name in ("transports", "label-aware") else 1e-5)
    if x.requires_grad:
        found.sum().backward()
        assert bool(x.grad.isfinite().all())
    with pytest.raises(ValueError, match="memory is 2 bytes; accepted: at least"):
        FUNCTIONS[name](x, tasks, memory=2, **how)


def test_sinkhorn_tells_which_costs_it_holds(device: str):
    x, tasks = problem(device)
    fit, not_fit = "costs fit in the memory", "costs do not fit in the memory"
    for memory, reasons in ((None, {fit}), (2**23, {fit, not_fit})):
        with dispatch.report() as reports:
            _, most = held(lambda memory=memory: sinkhorn_distances(x, tasks, epsilon=9.0, memory=memory))
        assert {each.reason.split(";")[0] for each in reports} == reasons
        if device == "cpu":
            assert most <= max(each.peak_bytes for each in reports) + 80 * (len(x) + len(tasks.features))


def test_nothing_is_reported_outside(device: str):
    x, tasks = problem(device)
    with dispatch.report() as reports:
        pass
    energy_distances(x, tasks)
    assert reports == []


def test_what_fails_is_not_reported(device: str):
    x, tasks = problem(device)
    with dispatch.report() as reports, pytest.raises(ValueError, match="overflow"):
        energy_distances(1e30 * x, tasks)
    assert reports == []


def test_what_fails_leaves_nothing_asked_for_and_nothing_collected(device: str):
    x, tasks = problem(device)
    with pytest.raises(RuntimeError, match="inside"), dispatch.override("fused"):
        raise RuntimeError("inside")
    assert dispatch.choose(torch.device("cpu"), "bf16", 64)[0] == "eager"
    with pytest.raises(RuntimeError, match="inside"), dispatch.report() as reports:
        raise RuntimeError("inside")
    energy_distances(x, tasks)
    assert reports == []


def test_an_inner_context_leaves_the_outer_one_as_it_was(device: str):
    x, tasks = problem(device)
    with dispatch.override("streamed"):
        with dispatch.override("fused"):
            pass
        assert dispatch.choose(CUDA, "bf16", 64) == ("streamed", "asked for")
    with dispatch.report() as outer:
        with dispatch.report() as inner:
            energy_distances(x, tasks)
        assert (len(outer), len(inner)) == (0, 2)
        energy_distances(x, tasks)
    assert (len(outer), len(inner)) == (2, 2)
