"""Devices, and uninitialised memory made visible. This folder imports only torch, triton, numpy, pytest, hypothesis."""

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from headstart.kernels import dispatch
from headstart.kernels.engine import units

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """A device, on which everything takes the eager path: test_covering.py and path_cases.py take the others."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if request.param == "cpu":
        yield "cpu"
        return
    with dispatch.override("eager"):
        yield request.param


@pytest.fixture(autouse=True, scope="session")
def the_interpreter_does_only_what_tells() -> None:
    """Nearly half of its time goes into two things that no case here looks at.

    It patches the language at every call of one function of a program by another, for good: the first will do. And it
    makes sums and products of int32 again in int64, to see that none overflows, which rows as few as these cannot.
    """
    if units.INTERPRETED:
        import triton.language as tl
        from triton.runtime import interpreter

        interpreter._patch_lang(tl.sum.fn)  # what the standard library sees
        interpreter.InterpretedFunction.__call__ = lambda function, *arguments, **options: function.rewrite()(
            *arguments, **options
        )
        interpreter.interpreter_builder.options = replace(
            interpreter.interpreter_builder.options, sanitize_overflow=False
        )


@pytest.fixture(autouse=True)
def uninitialised_memory_is_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill what torch.empty and its kin return, so that a value that was never written shows."""
    for name in ("empty", "empty_like"):
        plain = getattr(torch, name)

        def filled(*arguments: object, _plain=plain, **options: object) -> torch.Tensor:
            tensor = _plain(*arguments, **options)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor.fill_(-(2**30))

        monkeypatch.setattr(torch, name, filled)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """On a machine with a GPU, the short table that `make gpu-check` ends with."""
    if not torch.cuda.is_available():
        return
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    seconds: Counter[str] = Counter()
    for outcome in ("passed", "failed", "error", "skipped"):
        for report in terminalreporter.stats.get(outcome, []):
            counts[Path(report.nodeid.split("::")[0]).stem][outcome] += 1
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport):
                seconds[Path(report.nodeid.split("::")[0]).stem] += report.duration
    terminalreporter.section(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    terminalreporter.line(f"{'':24}{'passed':>8}{'failed':>8}{'skipped':>8}{'seconds':>9}")
    for name in sorted(counts):
        some = counts[name]
        failed = some["failed"] + some["error"]
        line = f"{name:24}{some['passed']:8}{failed:8}{some['skipped']:8}{seconds[name]:9.1f}"
        terminalreporter.line(line, red=failed > 0)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """One thread of torch: for many small steps, LAPACK's or a transport's.

    On two threads that share their cores with others they take 6 to 20 times as long.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
