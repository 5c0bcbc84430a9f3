"""FastAPI on uvicorn, by JSON and by raw bytes. The session runs on the event loop, which is fastest on one core.

python fastapi_app.py MODEL PORT
"""

import sys
from typing import Any

import uvicorn
from fastapi import FastAPI, Request, Response
from model import Model
from pydantic import BaseModel

model = Model(sys.argv[1])
app = FastAPI()


class Numbers(BaseModel):
    """What `inputs` holds."""

    inputs: list[list[float]] | None = None
    image: str | None = None


class Answer(BaseModel):
    """The model's output."""

    outputs: list[list[float]]


@app.post("/predict")
async def predict(numbers: Numbers) -> Answer:
    document: dict[str, Any] = {"inputs": numbers.inputs, "image": numbers.image}
    return Answer(outputs=model.run(model.from_json(document)).tolist())


@app.post("/bytes")
async def predict_bytes(request: Request) -> Response:
    found = model.run(model.from_bytes(await request.body()))
    return Response(found.tobytes(), media_type="application/octet-stream")


uvicorn.run(app, port=int(sys.argv[2]), loop="uvloop", http="httptools", access_log=False, log_level="warning")
