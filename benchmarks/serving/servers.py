"""The contenders: how each is started, and what its process tree costs.

Every server is started afresh for each round, on a core of its own, so that none is disturbed by the idle work of
another and every round measures a cold start.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.serving.client import ask
from headstart.serving.package import MODEL
from headstart.serving.runtime import CPU

SERVER_CORE, CLIENT_CORE = 0, 1
PROGRAMS = Path(__file__).parents[1] / "peers"
START_S = 120.0
"""How long a server may take to answer its first request."""
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",  # what Ray's documentation advises for load
}
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, kw_only=True)
class Server:
    """A process that answers, and the ways to ask it."""

    name: str
    """In the rows."""
    group: str
    """What `--peers` calls it; peers of one group share an environment."""
    program: str = ""
    """File in `benchmarks/peers`; empty for ours."""
    options: tuple[str, ...] = ()
    """After the model and the port."""
    formats: tuple[str, ...]
    """Of `formats.FORMATS`; gRPC is at the next port."""
    answers: bool = True
    """Whether its answers are the model's; an echo's are not."""


SERVERS = (
    Server(name="echo", group="transport", program="echo.py", formats=("binary",), answers=False),
    Server(name="echo", group="transport", program="echo_grpc.py", formats=("gRPC",), answers=False),
    Server(name="sockets", group="transport", program="sockets.py", formats=("binary",)),
    Server(name="headstart, inline", group="headstart", options=("--max-batch", "1"), formats=("binary",)),
    Server(name="headstart", group="headstart", formats=("binary", "JSON", "gRPC")),
    Server(name="uvicorn", group="fastapi", program="uvicorn_binary.py", formats=("binary",)),
    Server(name="FastAPI", group="fastapi", program="fastapi_app.py", formats=("own JSON", "bytes")),
    Server(name="LitServe", group="lit", program="lit.py", formats=("own JSON",)),
    Server(name="LitServe, batched", group="lit", program="lit.py", options=("16",), formats=("own JSON",)),
    Server(name="BentoML", group="bento", program="bento.py", formats=("own JSON",)),
    Server(name="BentoML, batched", group="bento", program="bento.py", formats=("own JSON of rows",)),
    Server(name="Ray Serve", group="ray", program="ray_serve.py", formats=("bytes",)),
    Server(name="MLServer", group="mlserver", program="ml_server.py", formats=("JSON", "gRPC")),
    Server(name="PyTriton", group="pytriton", program="py_triton.py", formats=("binary", "gRPC")),
)
PEERS = tuple(dict.fromkeys(server.group for server in SERVERS if server.group not in ("transport", "headstart")))


def python_of(group: str, environments: Path) -> Path:
    """The interpreter of a group: Ray is in ours, and so is what is no peer."""
    own = (PROGRAMS / f"{group}.txt").exists()
    return environments / group / "bin" / "python" if own else Path(sys.executable)


def install(groups: Sequence[str], environments: Path, provider: str) -> dict[str, str]:
    """Make the virtual environments that are not there, and return why a group has none.

    For another provider than the CPU's they have `onnxruntime-gpu` and its libraries in the place of `onnxruntime`.
    """
    failed = {}
    for group in groups:
        python, requirements = python_of(group, environments), PROGRAMS / f"{group}.txt"
        if python.exists() or not requirements.exists():
            continue
        print(f"installing {group} into {python.parents[1]}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(python.parents[1])], check=True)
        wanted = requirements.read_text().split()
        if provider != CPU:
            wanted = [line.replace("onnxruntime==", "onnxruntime-gpu[cuda,cudnn]==") for line in wanted]
        command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        done = subprocess.run([*command, *wanted], capture_output=True, text=True, check=False)
        if done.returncode:
            failed[group] = done.stderr.strip().splitlines()[-1]
            shutil.rmtree(python.parents[1])
    return failed


class Running:
    """A server that runs, as a context.

    Args:
        server: which.
        package: the model that it serves.
        environments: folder of the peers' virtual environments.
        log: where its output goes.
        provider: execution provider that runs the model.
    """

    def __init__(self, server: Server, package: Path, environments: Path, log: Path, provider: str) -> None:
        self.port = _free_port()
        self.cold_start_s = 0.0
        self._log = log
        self._environment = {**os.environ, **_ENVIRONMENT, "BENCHMARK_PROVIDER": provider}
        if server.program:
            python = str(python_of(server.group, environments))
            command = [python, str(PROGRAMS / server.program), str(package / MODEL)]
            if server.formats == ("gRPC",):
                command.append(str(self.port + 1))
            else:
                command += [str(self.port), *server.options]
        else:
            repository = str(package.parents[1])
            command = [str(Path(sys.executable).with_name("headstart")), "serve", repository, "--port", str(self.port)]
            command += ["--grpc-port", str(self.port + 1), "--threads", "1", "--provider", provider]
            command += server.options
        self._command = ["taskset", "-c", str(SERVER_CORE), *command]

    def __enter__(self) -> "Running":
        self._started = time.perf_counter()
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                self._command, stdout=log, stderr=subprocess.STDOUT, env=self._environment, start_new_session=True
            )
        return self

    def __exit__(self, *_: object) -> None:
        tree = self._tree()
        self._process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(5)
        for pid, born in tree.items():  # some ignore the signal, some leave children behind
            fields = _stat(pid)
            if fields and fields[19] == born:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        self._process.wait()

    def wait_until_ready(self, request: bytes) -> None:
        """Ask until there is an answer to a request of HTTP, or, with an empty one, until the port of gRPC is open.

        Raises:
            RuntimeError: the server ended, or took too long; its last words are in the message.
        """
        while True:
            try:
                if request:
                    ask(self.port, request)
                else:
                    socket.create_connection(("127.0.0.1", self.port + 1), 1).close()
                break
            except (OSError, RuntimeError) as error:
                if self._process.poll() is not None or time.perf_counter() - self._started > START_S:
                    words = self._log.read_text(errors="replace").strip()[-300:]
                    raise RuntimeError(f"it did not start ({error}): {words}") from error
                time.sleep(0.01)
        self.cold_start_s = time.perf_counter() - self._started

    def cpu_s(self) -> float:
        """CPU seconds that the tree has taken, those of its ended and reaped children as well."""
        spent = [fields for pid in self._tree() if (fields := _stat(pid)) is not None]
        return sum(int(ticks) for fields in spent for ticks in fields[11:15]) / _TICKS

    def peak_mb(self) -> float:
        """Sum of the processes' largest resident sizes; what they share counts in each."""
        total = 0
        for pid in self._tree():
            try:
                lines = Path(f"/proc/{pid}/status").read_text().splitlines()
            except OSError:
                continue
            total += sum(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
        return total / 1024

    def _tree(self) -> dict[int, str]:
        """The process and all its descendants, each with the time of its birth, since numbers are used again."""
        children: dict[int, list[tuple[int, str]]] = {}
        for folder in Path("/proc").glob("[0-9]*"):
            if (fields := _stat(int(folder.name))) is not None:
                children.setdefault(int(fields[1]), []).append((int(folder.name), fields[19]))
        own = _stat(self._process.pid)
        found, left = {}, [(self._process.pid, own[19])] if own else []
        while left:
            pid, born = left.pop()
            found[pid] = born
            left += children.get(pid, [])
        return found


def _stat(pid: int) -> list[str] | None:
    """Fields of /proc/PID/stat from the state on; None once it has gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None


def _free_port() -> int:
    """A port that is free, and the next one too."""
    while True:
        with socket.socket() as one, socket.socket() as other:
            one.bind(("127.0.0.1", 0))
            port = int(one.getsockname()[1])
            try:
                other.bind(("127.0.0.1", port + 1))
            except (OSError, OverflowError):
                continue
            return port
