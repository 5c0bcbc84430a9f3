"""What the server adds to a bare call of ONNX Runtime: `headstart serve` on one core, one client on another.

python -m benchmarks.serving [PACKAGE ...]      # default runs/demo/package; Linux with two cores
"""

import asyncio
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.distances import print_rows
from benchmarks.rows import append_rows
from headstart.serving.package import MODEL, load_manifest
from headstart.serving.runtime import INPUT, OUTPUTS, open_session

CLIENT, SERVER = {0}, "1"
"""Cores of the client, which also makes the bare calls, and of the server."""
SIZES = (28, 224)
"""Pixels a side of the images that are sent."""


def request(images: np.ndarray, *, binary: bool) -> bytes:
    """Return a whole HTTP request of the Open Inference Protocol for images uint8 [N, H, W, 3]."""
    tensor: dict[str, Any] = {"name": INPUT, "datatype": "UINT8", "shape": list(images.shape)}
    document: dict[str, Any] = {"inputs": [tensor], "outputs": [{"name": "probabilities"}]}
    if binary:
        tensor["parameters"] = {"binary_data_size": images.nbytes}
        document["outputs"][0]["parameters"] = {"binary_data": True}
    else:
        tensor["data"] = images.ravel().tolist()
    head = json.dumps(document).encode()
    body = head + images.tobytes() if binary else head
    extra = f"Inference-Header-Content-Length: {len(head)}\r\n" if binary else ""
    return (
        f"POST /v2/models/it/infer HTTP/1.1\r\nHost: localhost\r\n{extra}Content-Length: {len(body)}\r\n\r\n".encode()
        + body
    )


class Connection:
    """One keep-alive connection that waits for each answer."""

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def ask(self, message: bytes) -> bytes:
        """Send a request and return the whole answer."""
        self._socket.sendall(message)
        answer = self._socket.recv(1 << 16)
        while not (length := re.search(rb"(?i)\r\ncontent-length: (\d+)", answer)) or b"\r\n\r\n" not in answer:
            answer += self._socket.recv(1 << 16)
        whole = answer.index(b"\r\n\r\n") + 4 + int(length[1])
        while len(answer) < whole:
            answer += self._socket.recv(1 << 16)
        if not answer.startswith(b"HTTP/1.1 200"):
            raise RuntimeError(answer[:500].decode(errors="replace"))
        return answer


def echo(num_bytes: int) -> int:
    """Start a thread that answers every `num_bytes` with 300, and return its port: the cost of the transport alone."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        peer, _ = listener.accept()
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        os.sched_setaffinity(threading.get_native_id(), {int(SERVER)})
        held = 0
        while data := peer.recv(1 << 20):
            held += len(data)
            if held >= num_bytes:
                held -= num_bytes
                peer.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 250\r\n\r\n" + b"x" * 250)

    threading.Thread(target=serve, daemon=True).start()
    return int(listener.getsockname()[1])


def latencies(contenders: dict[str, Callable[[], object]], runs: int) -> dict[str, list[float]]:
    """Time each in turn; milliseconds, sorted."""
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    for position in range(-runs // 10, runs):
        for name, contender in contenders.items():
            started = time.perf_counter()
            contender()
            if position >= 0:
                taken[name].append((time.perf_counter() - started) * 1e3)
    return {name: sorted(times) for name, times in taken.items()}


async def throughput(port: int, message: bytes, concurrency: int, seconds: float = 4.0) -> float:
    """Answered requests a second of so many connections, each waiting for its answer."""
    done, end = 0, time.perf_counter() + seconds

    async def client() -> None:
        nonlocal done
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        while time.perf_counter() < end:
            writer.write(message)
            head = await reader.readuntil(b"\r\n\r\n")
            length = re.search(rb"(?i)\r\ncontent-length: (\d+)", head)
            assert length is not None
            await reader.readexactly(int(length[1]))
            assert head.startswith(b"HTTP/1.1 200"), head
            done += 1
        writer.close()

    await asyncio.gather(*(client() for _ in range(concurrency)))
    return done / seconds


def measure(package: Path, runs: int = 2000) -> list[dict[str, Any]]:
    """Return the rows of one package."""
    rows: list[dict[str, Any]] = []
    session = open_session(package / MODEL, threads=1)
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(package, Path(folder, "it", "1"))
        command = [shutil.which("headstart") or "headstart", "serve", folder, "--port", "0", "--threads", "1"]
        server = subprocess.Popen(["taskset", "-c", SERVER, *command], stdout=subprocess.PIPE, text=True)
        try:
            assert server.stdout is not None
            port = int(server.stdout.readline().split("127.0.0.1:")[1].split()[0])
            os.sched_setaffinity(0, CLIENT)
            for size in SIZES:
                images = np.random.default_rng(0).integers(0, 255, (1, size, size, 3), np.uint8)
                binary, text = request(images, binary=True), request(images, binary=False)
                ours, answering = Connection(port), Connection(echo(len(binary)))
                contenders: dict[str, Callable[[], object]] = {
                    "session.run": lambda images=images: session.run(OUTPUTS, {INPUT: images}),  # type: ignore[misc]
                    "loopback echo": lambda c=answering, m=binary: c.ask(m),  # type: ignore[misc]
                    "headstart, binary": lambda c=ours, m=binary: c.ask(m),  # type: ignore[misc]
                    "headstart, JSON": lambda c=ours, m=text: c.ask(m),  # type: ignore[misc]
                }
                common = {"model": load_manifest(package).name, "pixels": size}
                for name, times in latencies(contenders, runs if size < 100 else runs // 10).items():
                    quantiles = {f"p{q}_ms": round(times[int(q / 100 * len(times))], 4) for q in (20, 50, 90, 99)}
                    rows.append({**common, "contender": name, "concurrency": 1, **quantiles, "requests_per_s": ""})
                for concurrency in (8, 32):
                    rate = round(asyncio.run(throughput(port, binary, concurrency)), 1)
                    nothing = dict.fromkeys(("p20_ms", "p50_ms", "p90_ms", "p99_ms"), "")
                    rows.append({**common, "contender": "headstart, binary", "concurrency": concurrency, **nothing}
                                | {"requests_per_s": rate})  # fmt: skip
                best = max(_bare_rate(session, images, batch) for batch in (1, 4, 16))
                rows.append({**common, "contender": "session.run, best batch", "concurrency": 0, **nothing}
                            | {"requests_per_s": round(best, 1)})  # fmt: skip
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait(30)
    return rows


def _bare_rate(session: Any, images: np.ndarray, batch: int) -> float:
    """Images a second of bare calls on one core."""
    images = np.repeat(images, batch, 0)
    session.run(OUTPUTS, {INPUT: images})
    done, started = 0, time.perf_counter()
    while time.perf_counter() - started < 2:
        session.run(OUTPUTS, {INPUT: images})
        done += batch
    return done / (time.perf_counter() - started)


def main(packages: list[str]) -> None:
    """Measure, append the rows and print them."""
    rows = [row for package in packages for row in measure(Path(package))]
    append_rows("serving", rows)
    print_rows("serving", rows)


if __name__ == "__main__":
    main(sys.argv[1:] or ["runs/demo/package"])
