"""Energy distances of one target to T ragged tasks, beside what users would write.

python -m benchmarks.energy [--quick]
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from benchmarks.distances import Workload, cross_floor, is_quick, measure
from headstart.kernels import dispatch, naive
from headstart.kernels.energy import energy_distances, energy_self_terms
from headstart.kernels.engine.terms import SelfTerms
from headstart.kernels.ragged import RaggedTasks

GPU_PRECISIONS = ("bf16", "bf16x3", "fp32")


def cdist_loop(target: Tensor, tasks: RaggedTasks, own: Tensor) -> Tensor:
    """A loop over torch.cdist; the self terms of the tasks `own` [T] are given to it, as they are to ours."""
    inner = torch.cdist(target, target).mean()
    cross = [torch.cdist(target, tasks.task(t)).mean() for t in range(tasks.num_tasks)]
    return 2 * torch.stack(cross) - inner - own


def padded_cdist(target: Tensor, tasks: RaggedTasks, own: Tensor) -> Tensor:
    """torch.cdist on tasks padded to the largest, 32 tasks at a time, the padding left out of the sums."""
    inner, cross = torch.cdist(target, target).mean(), []
    for first in range(0, tasks.num_tasks, 32):
        chosen = [tasks.task(t) for t in range(first, min(first + 32, tasks.num_tasks))]
        batch = torch.nn.utils.rnn.pad_sequence(chosen, batch_first=True)
        sizes = torch.tensor([len(task) for task in chosen], device=target.device)
        inside = torch.arange(batch.shape[1], device=target.device) < sizes[:, None]
        distances = torch.cdist(target.expand(len(chosen), -1, -1), batch).sum(1)
        cross.append((distances * inside).sum(1) / (sizes * len(target)))
    return 2 * torch.cat(cross) - inner - own


def keops(target: Tensor, tasks: RaggedTasks, own: Tensor) -> Tensor:
    """KeOps: one reduction over the target for each row of all tasks, and a sum of these for each task.

    Cross terms have one target, so rows need no blocks, padding or loop: KeOps' best case. `norm2` is as fast as any
    way to write the distance (512 tasks, D = 256, two CPU cores: 1.15 s, 1.26 s by `sqdist`, 1.20 s by squares).
    """
    from pykeops.torch import LazyTensor

    def sums(rows: Tensor) -> Tensor:
        distances = (LazyTensor(rows[:, None]) - LazyTensor(target[None])).norm2()
        found: Tensor = distances.sum(1).flatten()
        return found

    sizes = tasks.sizes.to(target.device)
    owner = torch.repeat_interleave(torch.arange(tasks.num_tasks, device=target.device), sizes)
    cross = torch.zeros(tasks.num_tasks, device=target.device).index_add_(0, owner, sums(tasks.features))
    return 2 * cross / (sizes * len(target)) - sums(target).sum() / len(target) ** 2 - own


def geomloss_loop(target: Tensor, tasks: RaggedTasks) -> Tensor:
    """A loop over geomloss, whose energy loss is half of the distance and takes no terms that were kept."""
    import geomloss

    loss = geomloss.SamplesLoss("energy", backend="tensorized")
    return torch.stack([2 * loss(target, tasks.task(t)) for t in range(tasks.num_tasks)])


def _row_sums(product: Tensor, y_squares: Tensor, x_squares: Tensor) -> Tensor:
    return (y_squares[:, None] + x_squares - 2 * product).clamp(min=0).sqrt().sum(1)


class CompiledEpilogue:
    """The honest baseline: chunked products of the plain library, and one compiled pass from each to its row sums."""

    def __init__(self, target: Tensor, tasks: RaggedTasks, own: Tensor, dtype: torch.dtype) -> None:
        self._finish = torch.compile(_row_sums, dynamic=False)
        self._own, self._dtype = own, dtype
        self._sizes = tasks.sizes.to(target.device)
        self._owner = torch.repeat_interleave(torch.arange(tasks.num_tasks, device=target.device), self._sizes)
        self._target, self._tasks = target, tasks
        self._chunk = 2**14 if target.is_cuda else 2**11

    def __call__(self) -> Tensor:
        """Return the distances, [T]."""
        centre = self._target.mean(0)
        x = (self._target - centre).to(self._dtype)
        inner = self._sums(x, x, centre, centred=True).sum() / len(x) ** 2
        rows = self._sums(x, self._tasks.features, centre)
        cross = torch.zeros(len(self._sizes), device=x.device).index_add_(0, self._owner, rows)
        return 2 * cross / (self._sizes * len(x)) - inner - self._own

    def _sums(self, x: Tensor, y: Tensor, centre: Tensor, centred: bool = False) -> Tensor:
        x_squares, sums = x.float().square().sum(1), []
        for rows in y.split(self._chunk):
            if len(rows) < self._chunk:  # of one shape, so that it is compiled once
                rows = torch.nn.functional.pad(rows, (0, 0, 0, self._chunk - len(rows)))
            rows = rows if centred else (rows - centre).to(self._dtype)
            wide = self._dtype == torch.float32
            product = rows @ x.T if wide else torch.mm(rows, x.T, out_dtype=torch.float32)
            sums.append(self._finish(product, rows.float().square().sum(1), x_squares))
        return torch.cat(sums)[: len(y)]


def contenders(target: Tensor, tasks: RaggedTasks) -> dict[str, Callable[[], Tensor]]:
    """Return what is timed, ours first."""
    with dispatch.override("eager"):  # the peers' own terms rest on no program of ours that may fail
        own = energy_self_terms(tasks)
    own_means = (own.sums / (own.sizes.to(own.sums.device).double() ** 2)).to(target.dtype)
    library = "cuBLAS" if target.is_cuda else "product"
    found: dict[str, Callable[[], Tensor]] = {}
    if target.is_cuda:
        for precision in GPU_PRECISIONS:
            for path in (None, "fused", "streamed"):
                # Where D is large fp32 without tensor cores would tell nothing new, and take seconds.
                if path != "fused" or precision != "fp32" or target.shape[1] <= 256:
                    name = f"headstart {path or 'dispatch'} {precision}"
                    found[name] = _on_path(path, target, tasks, precision)
        found[f"{library} + compiled epilogue bf16"] = CompiledEpilogue(target, tasks, own_means, torch.bfloat16)
    else:
        found["headstart"] = _on_path(None, target, tasks, "fp32")
        found["headstart bf16"] = _on_path(None, target, tasks, "bf16")
    found[f"{library} + compiled epilogue"] = CompiledEpilogue(target, tasks, own_means, torch.float32)
    found["cdist loop"] = partial(cdist_loop, target, tasks, own_means)
    if tasks.num_tasks * int(tasks.sizes.max()) * len(target) < 2**33:
        found["padded cdist"] = partial(padded_cdist, target, tasks, own_means)
    work = len(target) * tasks.features.numel()
    if find_spec("pykeops") and work < (2**41 if target.is_cuda else 2**32):  # some seconds a run
        found["keops"] = partial(keops, target, tasks, own_means)
    if find_spec("geomloss"):
        found["headstart, nothing kept"] = partial(energy_distances, target, tasks)
        found["geomloss loop, nothing kept"] = partial(geomloss_loop, target, tasks)
    return found


def _on_path(path: str | None, target: Tensor, tasks: RaggedTasks, precision: str) -> Callable[[], Tensor]:
    def asked() -> AbstractContextManager[object]:
        return nullcontext() if path is None else dispatch.override(path)

    @cache
    def kept() -> SelfTerms:  # by the first call, so that a path that fails takes no other with it
        with asked():
            return energy_self_terms(tasks, precision=precision)

    def call() -> Tensor:
        with asked():
            return energy_distances(target, tasks, precision=precision, self_terms=kept())

    return call


def workloads(quick: bool) -> list[Workload]:
    """Return what is measured on this machine."""
    if torch.cuda.is_available():
        dims = (256,) if quick else (2048, 256, 512, 64)
        large = [Workload(num_tasks=512, rows=2048, dim=dim, num_target=4096) for dim in dims]
        small = [Workload(num_tasks=512, rows=110, dim=dim, num_target=220) for dim in (256, 2048)]
        return large if quick else [*large, *small, Workload(num_tasks=1, rows=4096, dim=512, num_target=4096)]
    first = Workload(num_tasks=512, rows=110, dim=256, num_target=220)
    if quick:
        return [first]
    return [
        first,
        Workload(num_tasks=1, rows=1024, dim=256, num_target=1024),
        Workload(num_tasks=64, rows=256, dim=64, num_target=256),
        Workload(num_tasks=64, rows=512, dim=512, num_target=512),
        Workload(num_tasks=16, rows=1024, dim=2048, num_target=1024),
        Workload(num_tasks=4, rows=4096, dim=256, num_target=4096),
    ]


def main(*, quick: bool = False) -> list[dict[str, Any]]:
    """Measure, append the rows, and return them."""
    return measure("energy", workloads(quick), contenders, naive.energy_distances, floor=cross_floor)


if __name__ == "__main__":
    main(quick=is_quick(__doc__))
