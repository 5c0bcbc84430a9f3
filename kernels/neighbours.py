"""The nearest rows of many ragged tasks to each row of a target."""

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from headstart.kernels import dispatch
from headstart.kernels.engine.precision import PRECISIONS, ROUNDED, resolve_precision, square_error, summed_alike
from headstart.kernels.engine.sweep import PANEL, Sweep
from headstart.kernels.engine.tile import Value
from headstart.kernels.ragged import RaggedTasks, check_alike, check_bytes, check_finite, check_whole, common_centre

_GROUP = 16
"""Columns of which one minimum is taken before any is looked at."""


class Neighbours(NamedTuple):
    """The k nearest rows of each target row, nearest first; equal distances by the number of the row."""

    distances: Tensor
    """||x_i - y||_2, [N, k], or [T, N, k] a task."""
    rows: Tensor
    """Row numbers in `tasks.features`, int64, of the same shape."""
    tasks: Tensor
    """The tasks that the rows belong to, int64, of the same shape."""


def nearest_neighbours(
    target: Tensor,
    tasks: RaggedTasks,
    k: int = 1,
    *,
    per_task: bool = False,
    precision: str | None = None,
    memory: int | None = None,
) -> Neighbours:
    """The k nearest of all tasks' rows to each row of a target [N, D]; with `per_task`, the k nearest of each task.

        nearest_neighbours(target, tasks)                        # argmin over sum n_t rows
        nearest_neighbours(target, tasks, 5, per_task=True)      # [T, N, 5]

    `naive.nearest_neighbours` is the definition. Products at `precision` (default: fp64 for float64 features, else
    fp32) choose candidates, more than k of them; their distances are computed again from the differences of the rows
    as given, in float32 at least, and decide. So a distance is that of its row, whatever the precision, and a row that
    is missed is nearer by less than the precision's error; where more rows than candidates are within that of the k-th,
    as with binary features, it may be an equally near one of a lower number. Rows nearer than 1e-19 (1e-154 for fp64),
    whose squares are no normal numbers, may count as equal. `memory` bounds, in bytes, what is held beside the inputs
    and results and k + 8 candidates for each of the N rows (4 k + 32 where products are rounded).

    ValueError: a target of another D, dtype or device, or without rows, or not finite; k below 1, or above the number
    of rows; a precision that is not accepted; a bound that cannot hold one tile.
    """
    check_alike(target, tasks)
    check_bytes(memory)
    precision = resolve_precision(precision, target.dtype)
    most = tasks.smallest if per_task else len(tasks.features)
    if type(k) is not int or not 1 <= k <= most:
        # Said only here: a number of rows that is said is one that a compiled graph is for.
        accepted = f"1 to {most}, the rows in {'the smallest task' if per_task else 'all tasks'}"
        check_whole("k", k, accepted)
        if not 1 <= k <= most:
            raise ValueError(f"k is {k}; accepted: {accepted}")
    distances, rows = _search(target, tasks.features, tasks.offsets, k, per_task, precision, memory)
    owner = torch.searchsorted(tasks.offsets.to(rows.device), rows, right=True) - 1
    return Neighbours(distances, rows, owner)


@torch.library.custom_op("headstart::nearest_neighbours", mutates_args=())
def _search(
    target: Tensor, features: Tensor, offsets: Tensor, k: int, per_task: bool, precision: str, memory: int | None
) -> tuple[Tensor, Tensor]:
    check_finite(target)
    path, reason = dispatch.choose(target.device, precision, target.shape[1])
    bounds = offsets.tolist() if per_task else [0, len(features)]
    with dispatch.Watch("neighbours", target.device, path, reason, precision) as watch:
        centre = common_centre(features) if precision in ROUNDED or path != "eager" else None
        wanted = _wanted(len(features), k, precision)
        per_row = _per_row(wanted, min(len(features), PANEL), PRECISIONS[precision].itemsize)
        engine = Sweep(
            target, len(features), Value("squared"), precision, memory, centre, per_row, num_kept=len(target)
        )
        watch.planned = engine.planned
        origin = engine.centre_of(features) if centre is None else centre
        norms = _norms(engine, target, origin)
        found = []
        for start, end in pairwise(bounds):
            task = features[start:end]
            # From the centre that the engine takes for the task: by way of one for all, so that it is a pass for all.
            reach = norms if centre is not None else norms + (engine.centre_of(task) - origin).norm().to(norms.dtype)
            found.append(_nearest(engine, target, task, k, path, memory, reach))
    distances = torch.stack([each[0] for each in found])
    rows = torch.stack([each[1] + start for each, start in zip(found, bounds[:-1], strict=True)])
    return (distances, rows) if per_task else (distances[0], rows[0])


@_search.register_fake
def _(
    target: Tensor, features: Tensor, offsets: Tensor, k: int, per_task: bool, precision: str, memory: int | None
) -> tuple[Tensor, Tensor]:
    num_rows = target.shape[0]
    shape = (offsets.shape[0] - 1, num_rows, k) if per_task else (num_rows, k)
    return target.new_empty(shape, dtype=PRECISIONS[precision]), target.new_empty(shape, dtype=torch.int64)


def _nearest(
    engine: Sweep, target: Tensor, features: Tensor, k: int, path: str, memory: int | None, reach: Tensor
) -> tuple[Tensor, Tensor]:
    """The k nearest rows of features to each target row: (distances [N, k], rows [N, k])."""
    wanted = _wanted(len(features), k, engine.precision)
    if path != "eager":
        return _among_blocks(engine, target, features, k, wanted, path, memory)
    values, candidates = _candidates(engine, target, features, k, wanted, reach)
    unsure = torch.zeros(len(target), dtype=torch.bool, device=target.device)
    if wanted > k:  # more than k rows may be among the k nearest
        unsure = values[:, k] <= values[:, k - 1] + _margin(engine, values[:, k - 1], reach)
    distances, rows = values.new_empty(len(target), k), candidates.new_empty(len(target), k)
    for which, width in ((~unsure, k), (unsure, wanted)):
        for some in which.nonzero().flatten().split(engine.stripe):
            distances[some], rows[some] = _ranked(target, features, some, candidates[some, :width], k, engine)
    return distances, rows


def _among_blocks(
    engine: Sweep, target: Tensor, features: Tensor, k: int, wanted: int, path: str, memory: int | None
) -> tuple[Tensor, Tensor]:
    """`_nearest` from what the Triton programs find: the nearest row of each block of rows.

    For k = 1 the nearest rows of the nearest blocks are candidates. For more, all rows of the k nearest blocks: a block
    that is not among them has no row nearer, by the products, than the nearest rows of these k.
    """
    from headstart.kernels.engine import gpu  # Triton, which other paths do not need

    assert engine.centre is not None
    num_blocks = wanted if k == 1 else k
    nearest, starts, height = gpu.nearest_rows(
        target, features, engine.centre, engine.precision, memory, num_blocks, path
    )
    if k == 1:
        return _ranked(target, features, torch.arange(len(target), device=target.device), nearest, k, engine)
    within = torch.arange(height, device=target.device)
    memory = gpu.MEMORY if memory is None else memory
    # Candidates and their order, then their rows and differences.
    step = max(1, memory // 4 // (starts.shape[1] * height * 32))
    found = []
    for some in torch.arange(len(target), device=target.device).split(step):
        rows = (starts[some][:, :, None] + within).flatten(1)
        rows = rows.masked_fill_(rows >= len(features), -1)
        found.append(_ranked(target, features, some, rows, k, engine, memory // 4))
    return torch.cat([each[0] for each in found]), torch.cat([each[1] for each in found])


def _wanted(num_rows: int, k: int, precision: str) -> int:
    """Candidates for each target row: enough beyond k that a row within the products' error of the k-th is one."""
    return min(num_rows, 4 * k + 32 if precision in ROUNDED else k + 8)


def _most(wanted: int) -> int:
    """Places of a row of a tile that are worth a list of their own."""
    return max(128, wanted)


def _per_row(wanted: int, width: int, itemsize: int) -> int:
    """Bytes that are held for each row of a tile of that width.

    Of a quarter of the columns at most the places (int64), the values and what of both is kept; or, later, the lists
    of values and of rows, old and new, before, while and after they are put in order.
    """
    return max(5 * width, 3 * (itemsize + 8) * (wanted + _most(wanted)))


def _norms(engine: Sweep, target: Tensor, centre: Tensor) -> Tensor:
    """|x - centre| of each row x of target, [N]."""
    parts = target.split(_step(engine))
    norms = [torch.linalg.vector_norm(part.to(engine.wide) - centre, dim=1) for part in parts]
    return torch.cat(norms).to(engine.dtype)


def _margin(engine: Sweep, kth: Tensor, reach: Tensor) -> Tensor:
    """How far above the k-th value [N] a value may be whose row is among the k nearest, for |x| <= reach [N].

    A value is off by e (|x| + |y|)^2, and |y| <= |x| + |x - y|: twice that, for the k-th is off as well, and a quarter
    more for |x - y|, which is the root of the value but for its error.
    """
    return (2 * reach + kth.sqrt()).square_().mul_(2.5 * square_error(engine.dim, engine.precision))


def _candidates(
    engine: Sweep, target: Tensor, features: Tensor, k: int, wanted: int, reach: Tensor
) -> tuple[Tensor, Tensor]:
    """Squares and rows of the `wanted` nearest to each target row by the engine's products, [N, wanted], ascending.

    Equal squares are in order of the rows. What is above the k-th by more than the margin may be missing: inf and -1.
    """
    best = torch.full((len(target), wanted), torch.inf, dtype=engine.dtype, device=target.device)
    rows = torch.zeros(len(target), wanted, dtype=torch.int64, device=target.device)
    # The target's rows are the tiles' rows, so that each is searched where it lies.
    for tile in engine.tiles_by_panel(target, features):
        mine = slice(tile.row, tile.row + len(tile.squares))
        minima, found = _minima(tile.squares), None
        if minima.shape[1] >= (1 if tile.column else 4 * k):
            kth = best[mine, k - 1] if tile.column else minima.kthvalue(k, 1).values
            limit = torch.minimum(kth + _margin(engine, kth, reach[mine]), best[mine, -1])
            found = _below(tile.squares, minima, limit, _most(wanted))
        values, inside = _smallest(tile.squares, min(wanted, tile.squares.shape[1])) if found is None else found
        # Those found before come first: a stable sort keeps the lower row where distances are equal.
        values = torch.cat([best[mine], values], 1)
        numbers = torch.cat([rows[mine], inside + tile.column], 1)
        values, order = values.sort(stable=True, dim=1)
        best[mine] = values[:, :wanted]
        rows[mine] = numbers.gather(1, order)[:, :wanted]
    for values, numbers in zip(best.split(engine.stripe), rows.split(engine.stripe), strict=True):
        numbers.masked_fill_(values == torch.inf, -1)
    return best, rows


def _minima(squares: Tensor) -> Tensor:
    """The minima [R, W // _GROUP] of groups of columns of squares [R, W].

    A group is every (W // _GROUP)-th column: those side by side, which a CPU's vectors hold, are in different groups.
    No column is in two groups, or the k-th of the minima could be below the k-th of the squares.
    """
    groups = squares.shape[1] // _GROUP
    if not groups:
        return squares[:, :0]
    whole, rest = divmod(squares.shape[1], groups)
    minima: Tensor = squares[:, : whole * groups].unflatten(1, (whole, groups)).amin(1)
    torch.minimum(minima[:, :rest], squares[:, whole * groups :], out=minima[:, :rest])
    return minima


def _below(squares: Tensor, minima: Tensor, limit: Tensor, most: int) -> tuple[Tensor, Tensor] | None:
    """What is up to limit [R] of each row of squares [R, W], padded with inf, and their places, ascending; [R, P] both.

    Only the groups with such a minimum are looked into. None where they are many, or P above `most`.
    """
    height, width = squares.shape
    row, group = (minima <= limit[:, None]).nonzero().unbind(1)
    if 4 * len(row) > minima.numel():
        return None
    starts = torch.arange(0, width, minima.shape[1], device=squares.device)
    index = (group[:, None] + starts).clamp_(max=width - 1).add_((row * width)[:, None])
    flat = squares.flatten()
    index = index[flat.take(index) <= limit[row, None]]
    if 2 * len(index) > most * height:
        return None
    index = index.unique()  # sorted, and the last column, which is padding too, once
    row = index // width
    counts = row.bincount(minlength=height)
    longest = int(counts.max())
    if longest > most:
        return None
    place = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row]
    values, places = squares.new_full((height, longest), torch.inf), counts.new_zeros(height, longest)
    values[row, place], places[row, place] = flat[index], index % width
    return values, places


def _smallest(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k smallest of each row of values [R, W], ascending, and their places, the lowest places where values tie."""
    width = values.shape[1]
    found, places = values.topk(min(k + 1, width), dim=1, largest=False)
    # topk takes any of equal values: in order of place where it took all, by a stable sort where it had to choose.
    places, order = places.sort(1)
    found, again = found.gather(1, order).sort(stable=True, dim=1)
    places = places.gather(1, again)
    if k < width:
        tied = (found[:, k - 1] == found[:, k]).nonzero().flatten()
        for some in tied.split(max(1, len(values) // 8)):  # each a copy, its places and the sort's own
            ordered, where = values[some].sort(stable=True, dim=1)
            found[some, :k], places[some, :k] = ordered[:, :k], where[:, :k]
    return found[:, :k], places[:, :k]


def _step(engine: Sweep) -> int:
    """Rows at once whose differences take a quarter of a tile."""
    return max(engine.pairs, engine.stripe * engine.panel // (4 * engine.dim))


def _ranked(
    target: Tensor, features: Tensor, some: Tensor, candidates: Tensor, k: int, engine: Sweep, memory: int = 0
) -> tuple[Tensor, Tensor]:
    """The nearest k of candidates [S, K] to rows `some` [S] of target by distances from differences; -1 is none.

    `memory`: bytes that differences may take, where that is more than a tile.
    """
    candidates = candidates.sort(1).values
    distances = torch.empty(candidates.shape, dtype=engine.dtype, device=target.device)
    at_once = max(_step(engine), memory // (3 * engine.wide.itemsize * engine.dim))
    step = max(1, at_once // candidates.shape[1])
    for start in range(0, len(some), step):
        chosen = candidates[start : start + step]
        # On the CPU a third of the time of features[chosen].
        difference = features.index_select(0, chosen.flatten().clamp(min=0)).to(engine.wide)
        difference.view(*chosen.shape, -1).sub_(target[some[start : start + step], None].to(engine.wide))
        norms = torch.linalg.vector_norm(summed_alike(difference), dim=1)[: len(difference)]
        distances[start : start + step] = norms.view(chosen.shape)
    distances, order = distances.masked_fill_(candidates < 0, torch.inf).sort(stable=True, dim=1)
    return distances[:, :k].contiguous(), candidates.gather(1, order)[:, :k].contiguous()
