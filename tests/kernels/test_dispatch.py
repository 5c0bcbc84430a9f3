"""The choice of a path: what it follows from, how it is overridden, and what is told of it."""

import pytest
import torch

from headstart.kernels import dispatch
from headstart.kernels.energy import energy_distances
from headstart.kernels.neighbours import nearest_neighbours
from headstart.kernels.ragged import RaggedTasks

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


def test_a_report_tells_path_reason_and_memory(device: str):
    x = torch.randn(300, 40, device=device)
    tasks = RaggedTasks.from_list([x[:5], x[5:]])
    with dispatch.report() as report:
        energy_distances(x, tasks, memory=64 * 2**20)
        nearest_neighbours(x, tasks)
    # Energy distances are cross terms and two sets of self terms, in whichever order.
    assert sorted(each.function for each in report) == ["neighbours", "own sums", "own sums", "pair sums"]
    for each in report:
        assert each.precision == "fp32"
        assert each.reason
        assert 0 < each.peak_bytes <= 64 * 2**20
    with dispatch.report() as report:
        pass
    energy_distances(x, tasks)
    assert report == []
