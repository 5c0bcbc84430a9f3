"""A service of NumPy functions, a server on a thread, and a raw client: what the tests of the wire side use."""

import asyncio
import json
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import uvloop

from headstart.serving.server.errors import ServeError, not_found, too_many, unavailable
from headstart.serving.server.settings import HttpSettings
from headstart.serving.server.transport.http import HttpServer, serve_http
from headstart.serving.server.wire.encoded import ENCODED, ImageDecoder
from headstart.serving.server.wire.protocol import DATATYPES, InferRequest, InferResponse, Limits

LABELS = ["dark", "grey", "light"]


class TinyService:
    """`echo` gives every input back, `slow` waits, `photo` tells how bright an image is, `broken` breaks."""

    def __init__(self) -> None:
        self.requests: list[InferRequest] = []
        self.clients = 0
        self.calls: list[tuple[Any, ...]] = []
        self.gate = asyncio.Event()
        self.is_ready = True
        self.images = ImageDecoder(Limits())

    def refused(self, error: ServeError) -> None: ...

    async def start(self) -> None: ...

    async def stop(self) -> None: ...

    def infer(self, request: InferRequest) -> Any:
        self.requests.append(request)
        self._known(request.model, request.version)
        if request.model == "full":
            raise too_many("the queue is full", retry_after=2.5)
        if request.model == "broken":
            raise RuntimeError("secret of /etc/passwd")
        if request.model == "slow":
            return asyncio.ensure_future(self._slow(request))
        if request.model == "photo" and ENCODED in request.inputs:
            return self.images.infer(request, "images", 4, lambda parts: [self._answer(part) for part in parts])
        return self._answer(request)

    async def _slow(self, request: InferRequest) -> InferResponse:
        await self.gate.wait()
        return self._answer(request)

    def _answer(self, request: InferRequest) -> InferResponse:
        outputs = dict(request.inputs)
        if request.model == "photo":
            mean = float(request.inputs["images"].mean()) / 255
            scores = np.exp(-10 * (np.array([[0, 0.5, 1]], np.float32) - mean) ** 2)
            outputs = {"logits": np.log(scores), "probabilities": scores / scores.sum()}
        timings = {"queue": 0, "compute": 1000}
        return InferResponse(
            model=request.model,
            version=request.version or "1",
            id=request.id,
            outputs=outputs,
            timings_ns=timings,
            labels=self._labels(request.model),
        )

    def _labels(self, name: str) -> list[str] | None:
        return LABELS if name in ("photo", "echo") else None

    def _known(self, name: str, version: str | None = None) -> None:
        if name not in ("echo", "slow", "photo", "broken", "full"):
            raise not_found(f"there is no model {name!r}")
        if version not in (None, "1"):
            raise not_found(f"model {name!r} has no version {version!r}")

    def live(self) -> bool:
        return True

    def ready(self) -> bool:
        return self.is_ready

    def model_ready(self, name: str, version: str | None) -> bool:
        self._known(name, version)
        return name != "full"

    def server_metadata(self) -> dict[str, Any]:
        return {"name": "headstart", "version": "0", "extensions": ["binary_tensor_data"]}

    def model_metadata(self, name: str, version: str | None) -> dict[str, Any]:
        self._known(name, version)
        images = {"name": "images", "datatype": "UINT8", "shape": [-1, -1, -1, 3]}
        outputs = [{"name": n, "datatype": "FP32", "shape": [-1, 3]} for n in ("logits", "probabilities")]
        files = {"name": ENCODED, "datatype": "BYTES", "shape": [-1]}
        inputs = [images, files] if name == "photo" else [{"name": "x", "datatype": "FP32", "shape": [-1, 4]}]
        return {"name": name, "versions": ["1"], "platform": "onnx", "inputs": inputs, "outputs": outputs}

    def model_config(self, name: str, version: str | None) -> dict[str, Any]:
        self._known(name, version)
        return {"name": name, "max_batch_size": 8}

    def statistics(self, name: str | None, version: str | None) -> dict[str, Any]:
        return {"model_stats": [{"name": name or "echo", "version": version or "1"}]}

    def repository_index(self, ready: bool) -> list[dict[str, Any]]:
        names = ["photo"] if ready else ["echo", "photo"]
        return [{"name": name, "version": "1", "state": "READY", "reason": ""} for name in names]

    async def load(self, name: str, parameters: dict[str, Any]) -> None:
        self._known(name)
        self.calls.append(("load", name, parameters))

    async def unload(self, name: str) -> None:
        if name == "broken":
            raise unavailable("it is still busy")
        self.calls.append(("unload", name))

    def card(self, name: str) -> dict[str, Any]:
        self._known(name)
        return {"name": name, "labels": self._labels(name)}

    def metrics_text(self) -> bytes:
        return b"# TYPE up gauge\nup 1.0\n"


class Running:
    """A server on a thread of its own."""

    def __init__(self, settings: HttpSettings) -> None:
        self.settings = settings
        self.service: TinyService
        self.server: HttpServer
        self.loop: asyncio.AbstractEventLoop
        self._stop: asyncio.Event
        self._ready = threading.Event()
        self._error: BaseException | None = None
        self.thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        try:
            uvloop.run(self._serve())
        except BaseException as error:  # shown by the test's thread
            self._error = error
            self._ready.set()

    async def _serve(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.service, self._stop = TinyService(), asyncio.Event()
        self.server = await serve_http(self.service, self.settings)
        self._ready.set()
        await self._stop.wait()
        await self.server.drain(timeout=0)

    def __enter__(self) -> "Running":
        self.thread.start()
        assert self._ready.wait(10)
        if self._error:
            raise self._error
        return self

    def __exit__(self, *error: object) -> None:
        self.loop.call_soon_threadsafe(self._stop.set)
        self.thread.join(10)
        assert not self.thread.is_alive()

    @property
    def url(self) -> str:
        return f"127.0.0.1:{self.server.port}"

    def call(self, function: Any, *arguments: Any) -> None:
        """Run something on the server's loop."""
        done = threading.Event()
        self.loop.call_soon_threadsafe(lambda: (function(*arguments), done.set()))
        assert done.wait(5)

    @contextmanager
    def connect(self, tls: ssl.SSLContext | None = None) -> Iterator["RawClient"]:
        client = RawClient(self.server.port, tls)
        try:
            yield client
        finally:
            client.socket.close()


class Answer:
    """A response as it was read from the wire."""

    def __init__(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.status, self.headers, self.body = status, headers, body

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> str:
        return str(self.json()["error"])


class RawClient:
    """A socket that sends what a test says, and reads responses."""

    def __init__(self, port: int, tls: ssl.SSLContext | None = None) -> None:
        self.socket: socket.socket = socket.create_connection(("127.0.0.1", port), timeout=10)
        if tls is not None:
            self.socket = tls.wrap_socket(self.socket, server_hostname="localhost")
        self.left = b""

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def ask(self, method: str, path: str, body: bytes = b"", **headers: object) -> Answer:
        lines = [f"{method} {path} HTTP/1.1"]
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in {"Host": "x", **headers}.items()]
        if body:
            lines.append(f"Content-Length: {len(body)}")
        self.send("\r\n".join([*lines, "", ""]).encode() + body)
        return self.read(head_only=method == "HEAD")

    def read(self, head_only: bool = False) -> Answer:
        while b"\r\n\r\n" not in self.left:
            self._more()
        head, _, self.left = self.left.partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
        length = 0 if head_only else int(headers.get("content-length", "0"))
        while len(self.left) < length:
            self._more()
        body, self.left = self.left[:length], self.left[length:]
        return Answer(int(first.split()[1]), headers, body)

    def _more(self) -> None:
        data = self.socket.recv(65536)
        if not data:
            raise ConnectionError("the server closed the connection")
        self.left += data

    def closed(self, within: float = 5) -> bool:
        """Whether the server closes the connection and sends no more."""
        self.socket.settimeout(within)
        try:
            return not self.left and self.socket.recv(1) == b""
        except TimeoutError:
            return False
        except OSError:
            return True


def infer_body(*arrays: np.ndarray, names: str = "xyzuvw", **document: Any) -> tuple[bytes, int]:
    """A body of the binary extension, and the length of its JSON."""
    kinds = {dtype: name for name, dtype in DATATYPES.items() if name != "BF16"}
    inputs = [
        {
            "name": name,
            "datatype": kinds[array.dtype],
            "shape": list(array.shape),
            "parameters": {"binary_data_size": array.nbytes},
        }
        for name, array in zip(names, arrays, strict=False)
    ]
    text = json.dumps({"inputs": inputs, **document}).encode()
    return text + b"".join(array.tobytes() for array in arrays), len(text)


def wait_until(condition: Any, seconds: float = 5) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.01)
