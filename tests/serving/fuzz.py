"""Coverage-guided fuzzing of all that reads what a client sent, by atheris (libFuzzer).

    python -m tests.serving.fuzz                        # every target, 60 s each
    python -m tests.serving.fuzz --seconds 600 grpc     # one of them
    python -m tests.serving.fuzz --replay FILE body     # what one input does

A target takes bytes and may refuse them in words alone. Any other exception is a finding, and so are an input that
takes longer than `HANG_S`, a process beyond `MOST_MB`, and one that grows by `GROWTH_MB` once it has settled.
"""

import argparse
import importlib
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

HANG_S = 5
MOST_MB = 512
GROWTH_MB = 32
MOST_BYTES = 4096
TARGETS = ("body", "chunks", "form", "grpc", "head", "http", "image", "inflated")
ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Outcome:
    """How a run of one target ended."""

    target: str
    code: int
    executions: int
    per_second: int
    features: int
    peak_mb: int
    finding: bytes | None
    log: str

    def __str__(self) -> str:
        found = f"FOUND (exit {self.code}): {self.finding!r}" if self.code else "nothing found"
        return (
            f"{self.target:<8} {self.executions:>9} executions, {self.per_second:>6}/s, {self.features:>5} features, "
            f"{self.peak_mb:>4} MB at most: {found}"
        )


def run(target: str, seconds: int, seed: int = 0) -> Outcome:
    """Fuzz a target in a process of its own; seed 0 takes another way each time."""
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, "-m", "tests.serving.fuzz", "--seconds", str(seconds), "--seed", str(seed)]
        words += ["--work", folder, target]
        done = subprocess.run(
            words, cwd=ROOT, capture_output=True, text=True, errors="replace", timeout=seconds + 120, check=False
        )
        log = done.stderr + done.stdout
        numbers = dict(re.findall(r"stat::(\w+):\s+(\d+)", log))
        findings = sorted(Path(folder, "findings").glob("*"))
        return Outcome(
            target=target,
            code=done.returncode,
            executions=int(numbers.get("number_of_executed_units", 0)),
            per_second=int(numbers.get("average_exec_per_sec", 0)),
            features=max(map(int, re.findall(r"ft: (\d+)", log)), default=0),
            peak_mb=int(peak.read_text()) if (peak := Path(folder, "peak")).exists() else 0,
            finding=findings[0].read_bytes() if findings else None,
            log=log,
        )


def fuzz(target: str, seconds: int, seed: int, work: Path) -> None:
    """Fuzz a target in this process, which ends with it."""
    import atheris

    with atheris.instrument_imports(include=["headstart", "tests", "PIL"]):
        call, seeds = made(target)
    corpus, findings = work / "corpus", work / "findings"
    for folder in (corpus, findings):
        folder.mkdir()
    for number, one in enumerate(seeds):
        (corpus / str(number)).write_bytes(one)
    options = {
        "artifact_prefix": f"{findings}/",
        "max_len": MOST_BYTES,
        "max_total_time": seconds,
        "print_final_stats": 1,
        "seed": seed,
        "rss_limit_mb": 0,  # it is held against what Linux calls this process's peak, which is the parent's too
        "timeout": HANG_S,
    }
    words = [sys.argv[0], str(corpus), *(f"-{name}={value}" for name, value in options.items())]
    resource.setrlimit(resource.RLIMIT_AS, (8 * MOST_MB << 20, 8 * MOST_MB << 20))
    atheris.Setup(words, watched(call, time.monotonic() + seconds / 3, work))
    atheris.Fuzz()


def made(target: str) -> tuple[Callable[[bytes], None], list[bytes]]:
    """A target and its inputs to begin with: one of `TARGETS`, or MODULE:FUNCTION."""
    module, _, name = target.rpartition(":")
    found: tuple[Callable[[bytes], None], list[bytes]] = getattr(
        importlib.import_module(module or "tests.serving.fuzz_targets"), name
    )()
    return found


def watched(call: Callable[[bytes], None], settled: float, work: Path) -> Callable[[bytes], None]:
    """A target whose process has bounded memory, and does not grow after `settled`, a time of `time.monotonic`.

    What raises is kept here: libFuzzer's own timer may end the process before libFuzzer has written it.
    """
    calls, most, before = 0, 0, 0

    def one(data: bytes) -> None:
        nonlocal calls, most, before
        try:
            call(data)
        except BaseException:
            (work / "findings" / "raised").write_bytes(data)
            raise
        calls += 1
        if calls % 256 == 0:
            peak, now = memory_mb()
            if peak > most:
                most = peak
                (work / "peak").write_text(str(peak))
            if peak > MOST_MB:
                raise MemoryError(f"the process had {peak} MB")
            if time.monotonic() > settled:
                before = before or now
                if now - before > GROWTH_MB:
                    raise MemoryError(f"the process grew from {before} to {now} MB")

    return one


def memory_mb() -> tuple[int, int]:
    """The most memory that this process has had, and what it has now, in MB."""
    status = Path("/proc/self/status").read_text()
    peak, now = (int(re.search(rf"{name}:\s+(\d+) kB", status)[1]) for name in ("VmHWM", "VmRSS"))  # type: ignore[index]
    return peak // 1000, now // 1000


def main() -> int:
    """Read the command line; returns the exit code, 1 where something was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=", ".join(TARGETS))
    parser.add_argument("--seconds", type=int, default=60, help="for each target")
    parser.add_argument("--seed", type=int, default=0, help="of what is tried; 0 takes another each time")
    parser.add_argument("--replay", type=Path, help="an input, given once to the target")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if unknown := sorted(one for one in given.targets if one not in TARGETS and ":" not in one):
        parser.error(f"there is no target {unknown[0]}; accepted: {', '.join(TARGETS)}")
    if given.work:
        fuzz(given.targets[0], given.seconds, given.seed, given.work)
    if given.replay:
        for target in given.targets:
            made(target)[0](given.replay.read_bytes())
        return 0
    found = False
    for target in given.targets or TARGETS:
        outcome = run(target, given.seconds, given.seed)
        found |= bool(outcome.code)
        print(outcome, flush=True)
        if outcome.code:
            print(outcome.log[-4000:], file=sys.stderr)
    return int(found)


if __name__ == "__main__":
    sys.exit(main())
