"""Load with faults: a real server at twice its saturation rate while much goes wrong. Exit code 1 when a promise broke.

python -m tests.serving.soak --seconds 600 [--workers 2] [--json]

Every five seconds a new version is deployed; clients die within their requests, one package is corrupt, one worker
process is killed. Every answer is compared with a bare `session.run` of the version that it names.
"""

import argparse
import asyncio
import contextlib
import json
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from tests.serving.soak.calls import keep_calling
from tests.serving.soak.faults import RELOAD_S, Faults
from tests.serving.soak.load import Clients, Tally
from tests.serving.soak.versions import WEIGHTS_MB, Version, make_version
from tests.serving.soak.world import NAME, Server

SATURATE_S = 4.0
OVERLOAD = 2.0
MAX_QUEUE = 64
MEMORY_VERSIONS, SHORT_MEMORY_VERSIONS, SHORT_S = 1, 3, 300.0
"""Bound on the growth of memory over the second half, in versions' weights a process. A worker that was started again
takes minutes to reach its size, hence the wider bound of a short run; six reloads in half a minute that each left their
session behind would take twice as much, and at 1000 requests a second ten minutes would show 80 bytes of each."""
TAKE_OVER_S = 2 * RELOAD_S
"""Within which a new version must have answered, on a machine that is overloaded."""


async def soak(folder: Path, seconds: float, workers: int) -> dict[str, Any]:
    """Run for so many seconds; returns what happened, with `broken`, the promises that did not hold."""
    repository, staging = folder / "models", folder / "staging"
    (repository / NAME).mkdir(parents=True)
    versions: dict[int, Version] = {1: make_version(staging, 1)}
    versions[1].package.rename(repository / NAME / "1")
    memory: list[tuple[float, float]] = []
    log = folder / "server.log"
    with Server(repository, workers, MAX_QUEUE, log) as server:
        tally = Tally(versions)
        clients = Clients(server.port, tally)
        await clients.saturate(1.0)
        saturation = await clients.saturate(SATURATE_S)
        tally.latencies_ms["200"].clear()
        before = clients.num_sent, tally.outcomes["200"]
        faults = Faults(server, repository, staging, tally, versions)
        tasks = [
            asyncio.create_task(one)
            for one in (
                faults.reload(seconds), faults.kill_worker(0.25 * seconds), faults.kill_clients(),
                _watch(server, memory),
            )
        ]  # fmt: skip
        await asyncio.gather(
            clients.offer(OVERLOAD * saturation, seconds), keep_calling(server.grpc_port, tally, seconds)
        )
        await asyncio.gather(*tasks[:2])
        for task in tasks[2:]:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        files = server.num_files()
        clients.close()
        exit_code, stopped_s = await asyncio.to_thread(server.stop)
    waits = [tally.first_answers[number] - at for number, at in faults.deployed_at.items()
             if number in tally.first_answers]  # fmt: skip
    growth, slope = _growth(memory)
    report: dict[str, Any] = {
        "seconds": seconds,
        "workers": workers,
        "saturation_per_s": round(saturation, 1),
        "offered_per_s": round((clients.num_sent - before[0]) / seconds, 1),
        "answered_per_s": round((tally.outcomes["200"] - before[1]) / seconds, 1),
        "outcomes": dict(sorted(tally.outcomes.items())),
        "answer_ms": _quantiles(tally.latencies_ms["200"]),
        "refusal_ms": _quantiles(tally.latencies_ms["429"]),
        "versions_deployed": len(faults.deployed_at),
        "versions_seen": len(waits),
        "take_over_s": {"p50": round(float(np.median(waits)), 2), "max": round(max(waits), 2)} if waits else None,
        "clients_killed": faults.clients_killed,
        "corrupt_package": faults.corrupt_reason,
        "worker_back_s": round(faults.restarted_s, 2) if faults.restarted_s is not None else None,
        "memory_mb": [round(size) for _, size in memory[:: max(1, len(memory) // 20)]],
        "memory_growth_mb": round(growth, 1),
        "memory_growth_bound_mb": WEIGHTS_MB
        * workers
        * (MEMORY_VERSIONS if seconds >= SHORT_S else SHORT_MEMORY_VERSIONS),
        "memory_slope_mb_per_min": round(slope, 2),
        "open_files": files,
        "exit_code": exit_code,
        "stopped_s": round(stopped_s, 2),
        "problems": dict(tally.problems.most_common()),
    }
    report["broken"] = broken(report)
    if report["broken"]:
        report["log"] = log.read_text()[-4000:]
    return report


def broken(report: dict[str, Any]) -> list[str]:
    """The promises that a report does not keep."""
    found = [f"{count} times: {what}" for what, count in report["problems"].items()]
    if not report["answer_ms"] or not report["refusal_ms"]:
        found.append("nothing was answered, or nothing was refused: this was no overload")
    if report["versions_seen"] < report["versions_deployed"]:
        found.append(f"{report['versions_deployed'] - report['versions_seen']} deployed versions never answered")
    if not report["take_over_s"] or report["take_over_s"]["max"] > TAKE_OVER_S:
        found.append(f"a version took longer than {TAKE_OVER_S:g} s to take over")
    if not report["corrupt_package"]:
        found.append("the corrupt package was not refused with a reason")
    if report["workers"] > 1 and report["worker_back_s"] is None:
        found.append("the killed worker was not replaced")
    if not report["memory_growth_mb"] <= report["memory_growth_bound_mb"]:
        found.append(f"memory grew by {report['memory_growth_mb']} MB over the second half")
    if report["exit_code"] != 0:
        found.append(f"after SIGTERM the exit code was {report['exit_code']}")
    return found


async def _watch(server: Server, memory: list[tuple[float, float]]) -> None:
    loop = asyncio.get_running_loop()
    while True:
        memory.append((loop.time(), await asyncio.to_thread(server.memory_mb)))
        await asyncio.sleep(1)


def _growth(memory: list[tuple[float, float]]) -> tuple[float, float]:
    """MB by which the fitted line rises over the second half, and its slope in MB a minute."""
    times, sizes = np.array(memory[len(memory) // 2 :]).T
    slope = float(np.polyfit(times - times[0], sizes, 1)[0])
    return slope * float(times[-1] - times[0]), slope * 60


def _quantiles(taken: list[float]) -> dict[str, float]:
    names = {"p50": 0.5, "p99": 0.99, "max": 1.0}
    return {name: round(float(np.quantile(taken, q)), 1) for name, q in names.items()} if taken else {}


def main(arguments: list[str]) -> int:
    """Soak and print what happened."""
    import uvloop

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no server outlives a run that is cut short
    parser = argparse.ArgumentParser(prog="python -m tests.serving.soak", description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=600, help="at least 40")
    parser.add_argument("--workers", type=int, default=2, help="processes; the killed one is left out with 1")
    parser.add_argument("--json", action="store_true", help="print a JSON document")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        report = uvloop.run(soak(Path(folder), options.seconds, options.workers))
    if options.json:
        print(json.dumps(report, indent=2))
    else:
        for name, value in report.items():
            if name not in ("broken", "log"):
                print(f"{name:24} {value}")
        print("\n".join([*(f"BROKEN: {line}" for line in report["broken"])]) or "every promise held")
    return 1 if report["broken"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
