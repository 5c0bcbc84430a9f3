"""One compiled graph for targets and tasks of any sizes."""

import pytest
import torch
from torch._dynamo.utils import counters

from headstart.kernels.energy import energy_distances
from headstart.kernels.euclidean import euclidean_distances
from headstart.kernels.frechet import frechet_distances
from headstart.kernels.label_aware import label_aware_distances
from headstart.kernels.neighbours import nearest_neighbours
from headstart.kernels.prototype import prototype_distances
from headstart.kernels.ragged import RaggedTasks
from headstart.kernels.sinkhorn import sinkhorn_distances

DIFFERENTIABLE = {
    "energy": lambda x, t, _: energy_distances(x, t),
    "frechet": lambda x, t, _: frechet_distances(x, t),
    "sinkhorn": lambda x, t, _: sinkhorn_distances(x, t, epsilon=3.0).distances,
    "label-aware": lambda x, t, labels: label_aware_distances(x, t, labels=labels, epsilon=6.0).distances,
}
OTHERS = {
    "mean": lambda x, t, _: euclidean_distances(x, t),
    "prototypes": lambda x, t, labels: prototype_distances(x, t, labels=labels),
    "neighbours": lambda x, t, _: nearest_neighbours(x, t, 2, per_task=True).distances,
}
SHAPES = [(30, (4, 40), 8), (17, (2, 3, 50), 20)]


def problem(n: int, sizes: tuple[int, ...], d: int) -> tuple[torch.Tensor, RaggedTasks, torch.Tensor]:
    generator = torch.Generator().manual_seed(n)
    rows = [torch.randn(m, d, generator=generator) for m in (n, *sizes)]
    labels = [torch.arange(m) % 3 for m in (n, *sizes)]
    return rows[0], RaggedTasks.from_list(rows[1:], labels[1:]), labels[0]


@pytest.mark.parametrize("name", [*DIFFERENTIABLE, *OTHERS])
def test_a_compiled_function_takes_other_sizes_without_another_graph(name: str):
    function = DIFFERENTIABLE.get(name) or OTHERS[name]
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    for shape in SHAPES:
        x, tasks, labels = problem(*shape)
        x.requires_grad_(name in DIFFERENTIABLE)
        found, plain = compiled(x, tasks, labels), function(x, tasks, labels)
        assert torch.equal(found, plain)
        if x.requires_grad:
            moved, expected = (torch.autograd.grad(each.sum(), x)[0] for each in (found, plain))
            torch.testing.assert_close(moved, expected)
    assert counters["stats"]["unique_graphs"] == 1
