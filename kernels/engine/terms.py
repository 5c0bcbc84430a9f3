"""Self terms: the part of a distance that each task brings by itself, worth keeping beside the tasks."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from headstart.kernels import dispatch
from headstart.kernels.engine.pairs import own_sums, pair_sums
from headstart.kernels.engine.precision import PRECISIONS, ROUNDED, resolve_precision
from headstart.kernels.ragged import RaggedTasks, check_alike, check_bytes, check_tensor, check_two_rows, common_centre

NONE = torch.empty(0, dtype=torch.float64)
"""No coefficients."""


@dataclass(frozen=True, kw_only=True, eq=False)
class SelfTerms:
    """sum_ij v(y_i, y_j) of T tasks, and what it was computed with.

    Another precision, path, centre or bandwidth is refused, because its errors would not cancel those of the cross
    terms: bfloat16 cross terms with float32 self terms are wrong by some per cent near zero.
    """

    kind: Literal["distance", "rbf"]
    """What v is: the distance of an energy, or the kernel of an MMD."""
    sums: Tensor
    """[T] float64."""
    sizes: Tensor
    """Rows of each task, [T] int64 on the CPU."""
    precision: str
    """The precision of the products."""
    path: str
    """The path of `dispatch` that computed them."""
    centre: Tensor | None = None
    """[D], subtracted from all rows before they were rounded; None where each task had its own, which needs no
    agreement because nothing was rounded."""
    bandwidths: Tensor | None = None
    """sigma [B] float64 of an MMD's kernel."""

    @classmethod
    def join(cls, terms: Sequence["SelfTerms"]) -> "SelfTerms":
        """The self terms of several sets of tasks as those of one set; ValueError where they do not agree."""
        if not terms:
            raise ValueError("no self terms were given; accepted: at least one")
        first = terms[0]
        for number, other in enumerate(terms):
            for name in ("kind", "precision", "path", "centre", "bandwidths"):
                mine, its = getattr(first, name), getattr(other, name)
                if not _same(mine, its):
                    raise ValueError(f"self terms {number} have {name} {its}; accepted: as the first, {mine}")
        return cls(
            kind=first.kind,
            sums=torch.cat([other.sums for other in terms]),
            sizes=torch.cat([other.sizes for other in terms]),
            precision=first.precision,
            path=first.path,
            centre=first.centre,
            bandwidths=first.bandwidths,
        )


class Means(NamedTuple):
    """The means of v over pairs that a distance is made of, float64."""

    cross: Tensor
    """Of rows of the target and of each task, [T]."""
    target: Tensor
    """Of the target's own rows, [1]."""
    tasks: Tensor
    """Of each task's own rows, [T]."""
    dtype: torch.dtype
    """Of the result."""


def means_of_pairs(
    kind: Literal["distance", "rbf"],
    target: Tensor,
    tasks: RaggedTasks,
    unbiased: bool,
    precision: str | None,
    memory: int | None,
    self_terms: SelfTerms | None,
    bandwidths: Tensor | None = None,
) -> Means:
    """The three means for a target x [N, D], checked; `unbiased` leaves the pairs of a row with itself out.

    ValueError: as `energy_distances` says.
    """
    check_alike(target, tasks)
    check_bytes(memory)
    precision = resolve_precision(precision, target.dtype)
    if unbiased:
        check_two_rows(target, tasks)
    path = dispatch.choose(target.device, precision, tasks.num_features)[0]
    if self_terms is None:
        centre = needed_centre(tasks, precision, path)
    else:
        check_self_terms(self_terms, kind, tasks, precision, path, bandwidths)
        centre = None if self_terms.centre is None else self_terms.centre.to(target.device)
    how = (centre, coefficients_of(bandwidths, precision), kind, precision, memory)
    # First, because it refuses a bound that is too small for the tasks' own terms as well.
    cross, own = pair_sums(target, tasks.features, tasks.offsets, *how, True)
    theirs: Tensor
    if self_terms is None:
        theirs = own_sums(tasks.features.detach(), tasks.offsets, *how)
    else:
        theirs = terms_of_tasks(self_terms.sums.to(target.device), self_terms.sizes, tasks.offsets)
    num_target, sizes = float(len(target)), tasks.sizes.to(target.device, torch.float64)
    less, itself = float(unbiased), float(kind == "rbf")  # v of a row and itself: distance 0, kernel 1
    return Means(
        cross / (num_target * sizes),
        (own - less * itself * num_target) / (num_target * (num_target - less)),
        (theirs - less * itself * sizes) / (sizes * (sizes - less)),
        PRECISIONS[precision],
    )


def not_negative(distances: Tensor) -> Tensor:
    """Distances with 0 in the place of what rounding leaves below it, where they cannot be negative.

    Their gradient stays as it is: that of clamp is 0 there, for clouds so near that only their gradient is left.
    """
    return distances - distances.detach().clamp(max=0)


def make_self_terms(
    kind: Literal["distance", "rbf"],
    tasks: RaggedTasks,
    *,
    precision: str | None,
    memory: int | None,
    centre: Tensor | None = None,
    bandwidths: Tensor | None = None,
) -> SelfTerms:
    """The self terms of tasks. `centre`: as those that they are to be joined with; None: amid these tasks."""
    check_bytes(memory)
    precision = resolve_precision(precision, tasks.features.dtype)
    path = dispatch.choose(tasks.features.device, precision, tasks.num_features)[0]
    if centre is None:
        centre = needed_centre(tasks, precision, path)
    else:
        check_tensor("centre", centre)
        same = centre.shape == tasks.features.shape[1:] and centre.device == tasks.features.device
        if not same or not centre.is_floating_point() or not bool(centre.isfinite().all()):
            raise ValueError(
                f"centre is {centre.dtype} {list(centre.shape)} on {centre.device}; accepted: finite, "
                f"[{tasks.num_features}], of a floating-point dtype, on {tasks.features.device}"
            )
    how = (centre, coefficients_of(bandwidths, precision), kind, precision, memory)
    return SelfTerms(
        kind=kind,
        sums=own_sums(tasks.features.detach(), tasks.offsets, *how),
        sizes=tasks.sizes,
        precision=precision,
        path=path,
        centre=centre,
        bandwidths=bandwidths,
    )


def needed_centre(tasks: RaggedTasks, precision: str, path: str) -> Tensor | None:
    """The centre that all terms must share, [D], or None where each may have its own."""
    return common_centre(tasks.features) if precision in ROUNDED or path != "eager" else None


def check_self_terms(
    terms: SelfTerms, kind: str, tasks: RaggedTasks, precision: str, path: str, bandwidths: Tensor | None = None
) -> None:
    """Refuse, with a ValueError, self terms that were computed otherwise; with a TypeError, what is none."""
    if not isinstance(terms, SelfTerms):
        raise TypeError(f"self_terms is a {type(terms).__name__}; accepted: SelfTerms, as energy and MMD make them")
    if terms.centre is not None and terms.centre.shape != tasks.features.shape[1:]:
        raise ValueError(f"self terms have a centre {list(terms.centre.shape)}; accepted: [{tasks.num_features}]")
    for name, given, accepted in (
        ("kind", terms.kind, kind),
        ("precision", terms.precision, precision),
        ("path", terms.path, path),
        ("bandwidths", terms.bandwidths, bandwidths),
    ):
        if not _same(given, accepted):
            raise ValueError(f"self terms have {name} {given}; accepted: {accepted}")


def terms_of_tasks(terms: Tensor, sizes: Tensor, offsets: Tensor) -> Tensor:
    """Terms [T] that were kept for tasks of these sizes [T], or a ValueError where the tasks of offsets have others."""
    if torch.compiler.is_compiling():
        of_tasks: Tensor = _terms_of_tasks(terms, sizes, offsets)
        return of_tasks
    _check_sizes(sizes, offsets)  # without the operator, which takes a hundred microseconds
    return terms


@torch.library.custom_op("headstart::terms_of_tasks", mutates_args=())
def _terms_of_tasks(terms: Tensor, sizes: Tensor, offsets: Tensor) -> Tensor:
    """An operator, because what follows from values would break a compiled graph."""
    _check_sizes(sizes, offsets)
    return terms.clone()


@_terms_of_tasks.register_fake
def _(terms: Tensor, sizes: Tensor, offsets: Tensor) -> Tensor:
    return torch.empty_like(terms)


def _check_sizes(sizes: Tensor, offsets: Tensor) -> None:
    now = offsets.diff()
    if len(sizes) != len(now):
        raise ValueError(f"self terms are of {len(sizes)} tasks; accepted: those of these {len(now)}")
    if not torch.equal(sizes, now):
        t = int((sizes != now).nonzero()[0])
        raise ValueError(f"the self term of task {t} is that of {int(sizes[t])} rows; accepted: of its {int(now[t])}")


def coefficients_of(bandwidths: Tensor | None, precision: str) -> Tensor:
    """1 / (2 sigma^2) of bandwidths sigma [B], [B] float64 on the CPU, within what the dtype of a precision has."""
    if bandwidths is None:
        return NONE
    limits = torch.finfo(PRECISIONS[precision])
    # Beyond it a kernel would be exp(-0 inf), NaN: of equal rows, or of what is masked by an infinite distance. A
    # quarter is left for what multiplies a coefficient, 2 and log2(e).
    return (0.5 / bandwidths.double().square()).clamp(limits.tiny, limits.max / 4).cpu()


def _same(one: object, other: object) -> bool:
    if one is other:  # a comparison of values would break a compiled graph
        return True
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and torch.equal(one.cpu(), other.cpu())
    return not isinstance(one, Tensor) and not isinstance(other, Tensor) and one == other
