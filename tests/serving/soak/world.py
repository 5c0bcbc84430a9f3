"""The server under test: a real `headstart serve` process, what it holds, and its workers."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

NAME = "demo"
WORKER = b"headstart.serving.server.processes.worker"


class Server:
    """`headstart serve` over a repository, as a context.

    Args:
        repository: the folder NAME/VERSION/.
        workers: processes; with one, the server is that process itself.
        log: where its log goes.
    """

    def __init__(self, repository: Path, workers: int, max_queue: int, log: Path) -> None:
        command = [
            str(Path(sys.executable).with_name("headstart")),
            "serve",
            str(repository),
            "--port",
            "0",
            "--grpc-port",
            "0",
        ]
        command += ["--threads", "1", "--workers", str(workers), "--max-queue", str(max_queue)]
        environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
        with log.open("w") as output:
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=output, text=True, env=environment)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        found = re.search(r"http://127\.0\.0\.1:(\d+) \(gRPC at 127\.0\.0\.1:(\d+)\)", line)
        if not found:
            self.process.kill()
            raise RuntimeError(f"the server did not start: {line or log.read_text()}")
        self.port, self.grpc_port = int(found[1]), int(found[2])

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    def stop(self) -> tuple[int | None, float]:
        """SIGTERM; the exit code, None where it did not end within a minute, and the seconds it took."""
        started = time.monotonic()
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(60), time.monotonic() - started
        except subprocess.TimeoutExpired:
            return None, time.monotonic() - started

    def index(self) -> list[dict[str, Any]]:
        """The repository index."""
        url = f"http://127.0.0.1:{self.port}/v2/repository/index"
        with urllib.request.urlopen(urllib.request.Request(url, method="POST"), timeout=30) as answer:
            rows: list[dict[str, Any]] = json.load(answer)
        return rows

    def workers(self) -> list[int]:
        """The processes that serve beside the first; none where there is one process."""
        return [pid for pid in self._tree() if WORKER in _read(pid, "cmdline")]

    def memory_mb(self) -> float:
        """Resident memory of all processes, what they share divided among them."""
        lines = b"\n".join(_read(pid, "smaps_rollup") for pid in self._tree())
        return sum(map(int, re.findall(rb"^Pss: +(\d+)", lines, re.MULTILINE))) / 1024

    def num_files(self) -> int:
        """Open files of all processes."""
        total = 0
        for pid in self._tree():
            try:
                total += len(os.listdir(f"/proc/{pid}/fd"))  # noqa: PTH208 (names alone)
            except OSError:
                continue
        return total

    def _tree(self) -> list[int]:
        found, left = [], [self.process.pid]
        while left:
            pid = left.pop()
            found.append(pid)
            left += map(int, _read(pid, f"task/{pid}/children").split())
        return found


def _read(pid: int, name: str) -> bytes:
    """A file of /proc/PID; empty once the process has gone."""
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except OSError:
        return b""
