"""A bare ASGI application on uvicorn (uvloop, httptools): the same request as ours, answered on the event loop.

python uvicorn_binary.py MODEL PORT
"""

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
    document, tensor = model.answer(body, length)
    data = document + tensor
    headers = [(b"content-length", b"%d" % len(data)), (b"inference-header-content-length", b"%d" % len(document))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": data})


uvicorn.run(
    app, port=int(sys.argv[2]), loop="uvloop", http="httptools", access_log=False, log_level="warning", lifespan="off"
)
