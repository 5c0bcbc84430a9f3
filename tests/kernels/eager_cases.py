"""What every public function gives on the eager path of a device that computes as the CPU does: the same bits.

Run by test_programs.py. On a GPU the tests that take a `device` say more.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from headstart.kernels import dispatch
from headstart.kernels.energy import energy_distances, energy_self_terms
from headstart.kernels.euclidean import topk
from headstart.kernels.label_aware import label_aware_distances, label_aware_self_terms
from headstart.kernels.mmd import mmd_distances, mmd_self_terms
from headstart.kernels.prototype import prototype_distances
from headstart.kernels.ragged import RaggedTasks
from headstart.kernels.sinkhorn import sinkhorn_distances, sinkhorn_self_terms
from tests.kernels.cases import FUNCTIONS, thirds
from tests.kernels.other_device import DEVICE


@pytest.fixture(autouse=True)
def eager():
    with dispatch.override("eager"):
        yield


@pytest.fixture(autouse=True)
def plain_products():
    """The device has no units for bfloat16, with which a CPU that has them adds products in another order."""
    with torch.backends.mkldnn.flags(enabled=False):
        yield


def rows(n: int, seed: int) -> Tensor:
    return torch.randn(n, 24, generator=torch.Generator().manual_seed(seed)).relu()


X = rows(40, 1)
TASKS = RaggedTasks.from_list([rows(n, n) + 0.1 for n in (1, 70, 33)], [thirds(rows(n, n)) for n in (1, 70, 33)])
GRADIENTS = ("pair sums", "energy", "mmd", "Fréchet distances", "transports", "label-aware")


def on(device: str) -> RaggedTasks:
    return RaggedTasks(TASKS.features.to(device), TASKS.offsets, TASKS.labels.to(device))


def parts(found: Any, device: str) -> list[Tensor]:
    """A result's tensors, which are on the device, on the CPU; beside iterations or bandwidths the distances alone."""
    found = found.distances if hasattr(found, "errors") or hasattr(found, "bandwidths") else found
    found = [found] if isinstance(found, Tensor) else [part for part in found if isinstance(part, Tensor)]
    assert {part.device.type for part in found} == {device}
    return [part.detach().cpu() for part in found]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16x3", "fp64"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_values(name: str, precision: str):
    expected, found = (
        parts(FUNCTIONS[name](X.to(device), on(device), precision=precision), device) for device in ("cpu", DEVICE)
    )
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients(name: str):
    found = []
    for device in ("cpu", DEVICE):
        x = X.to(device).requires_grad_()
        value = FUNCTIONS[name](x, on(device))
        value = value if isinstance(value, Tensor) else value[0]
        (gradient,) = torch.autograd.grad(value.sum(), x)
        assert gradient.device == x.device
        found.append(gradient.cpu())
    assert torch.equal(*found)


def test_what_is_kept():
    x, tasks = X.to(DEVICE), on(DEVICE)
    labels = thirds(x)
    own = energy_self_terms(tasks)
    assert torch.equal(energy_distances(x, tasks, self_terms=own), energy_distances(x, tasks))
    plain = mmd_distances(x, tasks)
    own = mmd_self_terms(tasks, plain.bandwidths)
    assert torch.equal(mmd_distances(x, tasks, bandwidths=plain.bandwidths, self_terms=own).distances, plain.distances)
    own = sinkhorn_self_terms(tasks, epsilon=2.0)
    found = sinkhorn_distances(x, tasks, epsilon=2.0, self_terms=own).distances
    assert torch.equal(found, sinkhorn_distances(x, tasks, epsilon=2.0).distances)
    for label_distance in ("bures", "sinkhorn"):
        options: dict[str, Any] = {"label_distance": label_distance, "epsilon": 2.0}
        own = label_aware_self_terms(tasks, **options)
        found = label_aware_distances(x, tasks, labels=labels, **options, self_terms=own).distances
        assert torch.equal(found, label_aware_distances(x, tasks, labels=labels, **options).distances)
    nearest = prototype_distances(x, tasks, labels=labels, form="nearest")
    values, indices = topk(nearest, 2)
    assert torch.equal(values, nearest[indices])


def test_what_was_kept_on_the_cpu_serves_on_a_device():
    x, tasks = X.to(DEVICE), on(DEVICE)
    own = energy_self_terms(TASKS, precision="bf16")  # with their centre
    found = energy_distances(x, tasks, precision="bf16", self_terms=own)
    assert torch.equal(found.cpu(), energy_distances(X, TASKS, precision="bf16"))
    options: dict[str, Any] = {"epsilon": 2.0, "precision": "bf16"}
    kept = label_aware_self_terms(TASKS, **options)
    found = label_aware_distances(x, tasks, labels=thirds(x), **options, self_terms=kept).distances
    expected = label_aware_distances(X, TASKS, labels=thirds(X), **options).distances
    assert torch.equal(found.cpu(), expected)
