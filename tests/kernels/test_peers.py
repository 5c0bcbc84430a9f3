"""The same inputs to other people's code."""

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist
from scipy.stats import energy_distance
from sklearn.metrics.pairwise import rbf_kernel

from headstart.kernels.energy import energy_distances
from headstart.kernels.euclidean import euclidean_distances, topk
from headstart.kernels.mmd import mmd_distances
from headstart.kernels.ragged import RaggedTasks


def rows(n: int, d: int, seed: int, device: str) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(device)


def problem(d: int, device: str) -> tuple[torch.Tensor, RaggedTasks]:
    return rows(123, d, 1, device), RaggedTasks.from_list([rows(n, d, n, device) + 0.2 for n in (1, 63, 257)])


def sources(tasks: RaggedTasks) -> list[np.ndarray]:
    return [tasks.task(t).cpu().numpy() for t in range(tasks.num_tasks)]


def test_scipy_cdist(device: str):
    x, tasks = problem(20, device)
    found = euclidean_distances(x, tasks, form="pairs").cpu().numpy()
    np.testing.assert_allclose(found, [cdist(x.cpu().numpy(), y).mean() for y in sources(tasks)], rtol=1e-13)


def test_scipy_energy_distance_is_the_root_in_one_dimension(device: str):
    x, tasks = problem(1, device)
    expected = [energy_distance(x.cpu().numpy()[:, 0], y[:, 0]) for y in sources(tasks)]
    np.testing.assert_allclose(energy_distances(x, tasks).sqrt().cpu().numpy(), expected, rtol=1e-11)


def test_geomloss_energy_is_half_of_ours(device: str):
    geomloss = pytest.importorskip("geomloss")
    x, tasks = problem(20, device)
    loss = geomloss.SamplesLoss("energy", backend="tensorized")
    expected = torch.stack([loss(x, tasks.task(t)) for t in range(tasks.num_tasks)])
    # Its root is that of d^2 + 1e-8: a row is at 1e-4 from itself.
    torch.testing.assert_close(energy_distances(x, tasks) / 2, expected, rtol=1e-7, atol=1e-4)


def test_geomloss_gaussian_is_half_of_our_mmd(device: str):
    geomloss = pytest.importorskip("geomloss")
    x, tasks = problem(5, device)
    loss = geomloss.SamplesLoss("gaussian", blur=1.3, backend="tensorized")
    expected = torch.stack([loss(x, tasks.task(t)) for t in range(tasks.num_tasks)])
    found = mmd_distances(x, tasks, bandwidths=torch.tensor([1.3], dtype=torch.float64)).distances
    torch.testing.assert_close(found / 2, expected, rtol=1e-10, atol=0)


def test_scikit_learn_rbf_kernel(device: str):
    x, tasks = problem(20, device)
    given = torch.tensor([2.0, 5.0], dtype=torch.float64)
    z = x.cpu().numpy()

    def kernel(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.mean([rbf_kernel(a, b, gamma=1 / (2 * s * s)).mean() for s in given.tolist()]))

    expected = [kernel(z, z) + kernel(y, y) - 2 * kernel(z, y) for y in sources(tasks)]
    np.testing.assert_allclose(mmd_distances(x, tasks, bandwidths=given).distances.cpu().numpy(), expected, rtol=1e-11)


def test_faiss_ranks_task_means_as_topk_does(device: str):
    faiss = pytest.importorskip("faiss")
    tasks = RaggedTasks.from_list([rows(5, 16, t, device).float() for t in range(500)])
    x = rows(40, 16, 999, device).float()
    _, nearest = topk(euclidean_distances(x, tasks), 20)
    index = faiss.IndexFlatL2(16)
    index.add(tasks.means().cpu().numpy())
    assert nearest.cpu().tolist() == index.search(x.mean(0, keepdim=True).cpu().numpy(), 20)[1][0].tolist()
