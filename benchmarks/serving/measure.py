"""One run: every server in turn, at every concurrency, beside bare calls of the same minute on the same core."""

import contextlib
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.serving.client import WARM_UP_S, Clock, GrpcChannel, ask, http_load
from benchmarks.serving.formats import FORMATS, Format
from benchmarks.serving.models import make_model, sample_inputs
from benchmarks.serving.servers import CLIENT_CORE, PROGRAMS, SERVER_CORE, Running, Server
from headstart.serving.device import Device, open_on
from headstart.serving.package import MODEL

BARE = "session.run"
TOLERANCE = 1e-4
"""Largest difference of an answer from the bare call's, relative to the largest number in it: a batch rounds otherwise
than a single row."""
_BLOCKS, _LEAST_BLOCKS = 200, 4
"""One client's requests and bare calls take turns in the former number of blocks, or in fewer, for `_CALLS` in each."""
_CALLS = 2
_BATCHES = (1, 4, 16)

Figures = dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is measured."""

    models: tuple[str, ...]
    servers: tuple[Server, ...]
    concurrencies: tuple[int, ...] = (1, 8, 32, 128)
    rounds: int = 3
    """Each starts every server afresh; a figure is the median of them."""
    seconds: float = 2.0
    """Of a server at one concurrency in one round, after the warm-up."""
    models_folder: Path
    environments: Path
    provider: str
    """ONNX Runtime's execution provider, of every server and of the bare calls."""


class Bare:
    """`session.run` in a process of its own on the servers' core, which sleeps unless it is asked; a context."""

    def __init__(self, package: Path, provider: str) -> None:
        command = ["taskset", "-c", str(SERVER_CORE), sys.executable, str(PROGRAMS / "bare.py"), str(package / MODEL)]
        environment = {**os.environ, "BENCHMARK_PROVIDER": provider}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self._line()

    def __enter__(self) -> "Bare":
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(10)

    def calls(self, batch: int, seconds: float) -> list[float]:
        """Milliseconds of each call."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{batch} {seconds}\n")
        self._process.stdin.flush()
        taken: list[float] = json.loads(self._line())
        return taken

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline()


def run(plan: Plan, say: Callable[[str], None]) -> Iterator[tuple[list[dict[str, Any]], dict[str, str]]]:
    """Measure; yields for each model its rows, and why a server has none."""
    os.sched_setaffinity(0, {CLIENT_CORE})
    for model in plan.models:
        package = make_model(plan.models_folder, model)
        rounds: dict[tuple[str, str, int], list[Figures]] = {}
        failures: dict[str, str] = {}
        with tempfile.TemporaryDirectory() as folder, Bare(package, plan.provider) as bare:
            for number in range(plan.rounds):
                best = _bare_round(bare, plan.seconds, rounds)
                for server in plan.servers:
                    if server.name in failures:
                        continue
                    say(f"{model}, round {number + 1} of {plan.rounds}: {server.name}")
                    try:
                        _round(plan, server, model, package, bare, best, Path(folder, "log"), rounds)
                    except (OSError, RuntimeError, ValueError) as error:
                        failures[server.name] = f"{type(error).__name__}: {error}"
        yield _rows(model, rounds), {f"{name} ({model})": reason for name, reason in failures.items()}


def _bare_round(bare: Bare, seconds: float, rounds: dict[tuple[str, str, int], list[Figures]]) -> int:
    """Calls of one row, and the best rate of any batch; returns that batch."""
    rates = {}
    for batch in _BATCHES:
        taken = bare.calls(batch, seconds)
        rates[batch] = batch * 1e3 / statistics.mean(taken)
        if batch == 1:
            rounds.setdefault((BARE, "", 1), []).append({**_quantiles(taken), "requests_per_s": rates[1]})
    best = max(rates, key=lambda batch: rates[batch])
    rounds.setdefault((f"{BARE}, best batch", "", 0), []).append({"requests_per_s": rates[best], "batch": best})
    return best


def _round(
    plan: Plan,
    server: Server,
    model: str,
    package: Path,
    bare: Bare,
    best: int,
    log: Path,
    rounds: dict[tuple[str, str, int], list[Figures]],
) -> None:
    """One server, started, asked in every way at every concurrency, and stopped."""
    session = open_on(Device(provider=plan.provider, threads=1), package / MODEL)
    name, output = session.get_inputs()[0].name, session.get_outputs()[-1].name
    inputs = sample_inputs(model)
    expected = [session.run([output], {name: row})[0][0] for row in inputs]
    with Running(server, package, plan.environments, log, plan.provider) as running:
        for kind in server.formats:
            way = FORMATS[kind]
            requests = [way.encode(row, name, output) for row in inputs]
            if kind == server.formats[0]:
                running.wait_until_ready(b"" if way.is_grpc else requests[0])
            with _clients(running, way) as load:
                for concurrency in plan.concurrencies:
                    answers = expected if server.answers else None
                    figures = _spell(load, running, way, requests, answers, concurrency, plan, bare, best)
                    rounds.setdefault((server.name, kind, concurrency), []).append(figures)
        peak = {"peak_mb": running.peak_mb(), "cold_start_s": running.cold_start_s}
    for kind in server.formats:
        for concurrency in plan.concurrencies:
            rounds[server.name, kind, concurrency][-1].update(peak)


@contextlib.contextmanager
def _clients(running: Running, way: Format) -> Iterator[Callable[..., Clock]]:
    """Those that ask a server in one way."""
    if not way.is_grpc:
        yield functools.partial(http_load, running.port)
        return
    with GrpcChannel(running.port + 1) as channel:
        yield channel.load


def _spell(
    load: Callable[..., Clock],
    running: Running,
    way: Format,
    requests: Sequence[bytes],
    expected: Sequence[NDArray[np.float32]] | None,
    concurrency: int,
    plan: Plan,
    bare: Bare,
    best: int,
) -> Figures:
    """One server at one concurrency, between spells of bare calls: of one row, or of `best` rows for many clients.

    The clock of a shared machine moves within a tenth of a second, so one client's spell is cut into blocks of a few
    calls, and each is held against the bare calls next to it. Many clients are asked in one piece: answers that come in
    batches make the rate of a short spell meaningless.
    """
    alone, seconds, blocks = concurrency == 1, plan.seconds, 1
    batch = 1 if alone else best
    around = [bare.calls(batch, seconds / (_BLOCKS if alone else 2))] if expected else []
    if around and alone:
        calls = seconds * 1e3 / statistics.median(around[0])
        blocks = int(min(_BLOCKS, max(_LEAST_BLOCKS, calls / _CALLS)))
    latencies: list[list[float]] = []
    rates, cpu_s, num_answers, worst = [], 0.0, 0, 0.0
    for number in range(blocks):
        before = running.cpu_s()
        clock = load(requests, concurrency, seconds / blocks, 0.0 if number else WARM_UP_S)
        cpu_s += running.cpu_s() - before
        latencies.append(clock.latencies_ms)
        rates.append(clock.rate)
        num_answers += clock.num_answers
        if expected:
            around.append(bare.calls(batch, seconds / (blocks if alone else 2)))
            worst = max([worst, *(_difference(way, one, expected) for one in clock.answers)])
    if not way.is_grpc and expected and alone:
        answers = [(number, ask(running.port, request)) for number, request in enumerate(requests)]
        worst = max([worst, *(_difference(way, one, expected) for one in answers)])
    if not worst <= TOLERANCE:
        raise ValueError(f"an answer differs from the bare call's by {worst:.2g} of its largest number")
    figures = _quantiles([one for block in latencies for one in block])
    figures |= {
        "requests_per_s": statistics.mean(rates),
        "cpu_ms_per_request": cpu_s * 1e3 / num_answers,
        "difference": worst,
    }
    if around:
        figures |= beside(latencies, rates, [[*a, *b] for a, b in pairwise(around)], batch, alone=alone)
    return figures


def beside(
    latencies: Sequence[Sequence[float]],
    rates: Sequence[float],
    calls: Sequence[Sequence[float]],
    batch: int,
    *,
    alone: bool,
) -> Figures:
    """Medians over blocks of what requests have over the bare calls of `batch` rows next to them."""
    figures = {
        "rate_ratio": statistics.median(
            rate * statistics.mean(taken) / (1e3 * batch) for rate, taken in zip(rates, calls, strict=True)
        )
    }
    if alone:
        p50s = [(statistics.median(a), statistics.median(b)) for a, b in zip(latencies, calls, strict=True)]
        figures["bare_p50_ms"] = statistics.median(bare for _, bare in p50s)
        figures["overhead_ms"] = statistics.median(request - bare for request, bare in p50s)
        figures["p50_ratio"] = statistics.median(request / bare for request, bare in p50s)
    return figures


def _difference(way: Format, answer: tuple[int, bytes], expected: Sequence[NDArray[np.float32]]) -> float:
    right = expected[answer[0]]
    found = way.decode(answer[1])
    if found.shape != right.shape:
        raise ValueError(f"an answer has the shape {found.shape} instead of {right.shape}")
    return float(np.abs(found - right).max() / np.abs(right).max())


def _quantiles(taken: Sequence[float]) -> Figures:
    values = np.quantile(taken, (0.5, 0.9, 0.99))
    return {f"p{q}_ms": float(value) for q, value in zip((50, 90, 99), values, strict=True)}


COLUMNS = (
    "p50_ms", "p90_ms", "p99_ms", "requests_per_s", "cpu_ms_per_request", "peak_mb", "cold_start_s", "bare_p50_ms",
    "overhead_ms", "p50_ratio", "rate_ratio", "difference", "batch",
)  # fmt: skip
"""Medians of the rounds. `bare_p50_ms`: bare calls in turn with these requests; `overhead_ms` and `p50_ratio`: the
difference and the ratio of the two, block by block; `rate_ratio`: requests/s over rows/s of bare calls in turn with
them, one by one for one client and at their best batch for more."""


def _rows(model: str, rounds: dict[tuple[str, str, int], list[Figures]]) -> list[dict[str, Any]]:
    rows = []
    for (server, way, concurrency), taken in rounds.items():
        row: dict[str, Any] = {"model": model, "server": server, "transport": way, "concurrency": concurrency}
        for column in COLUMNS:
            values = [one[column] for one in taken if column in one]
            row[column] = float(f"{statistics.median(values):.4g}") if values else ""
        rows.append({**row, "rounds": len(taken)})
    return rows
