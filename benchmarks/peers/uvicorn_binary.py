"""A bare ASGI application on uvicorn (uvloop, httptools): the same request as ours, answered on the event loop.

python uvicorn_binary.py MODEL PORT
"""

import json
import sys
from typing import Any

import uvicorn
from model import Model

model = Model(sys.argv[1])


async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
    if scope["type"] != "http":
        return
    body, more = b"", True
    while more:
        message = await receive()
        body += message["body"]
        more = message.get("more_body", False)
    length = next(int(value) for name, value in scope["headers"] if name == b"inference-header-content-length")
    document = json.loads(body[:length])
    found = model.run(model.from_bytes(body[length:]))
    tensor = {"name": model.output, "datatype": "FP32", "shape": found.shape}
    parameters = {"binary_data_size": found.nbytes}
    head = json.dumps({"model_name": "it", "outputs": [{**tensor, "parameters": parameters}]}).encode()
    assert document["inputs"]
    data = head + found.tobytes()
    headers = [(b"content-length", b"%d" % len(data)), (b"inference-header-content-length", b"%d" % len(head))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": data})


uvicorn.run(
    app, port=int(sys.argv[2]), loop="uvloop", http="httptools", access_log=False, log_level="warning", lifespan="off"
)
