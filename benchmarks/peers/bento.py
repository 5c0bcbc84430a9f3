"""BentoML, which takes JSON: one worker; `bentoml serve` is started by this program.

python bento.py MODEL PORT
"""

import os
import sys
from typing import Any

import bentoml
import numpy as np
from model import Model

MAX_BATCH = 16


@bentoml.service(
    workers=1,
    http={"host": "127.0.0.1"},
    metrics={"enabled": False},
    traffic={"timeout": 120},
    logging={"access": {"enabled": False}},
)
class Served:
    """The service."""

    def __init__(self) -> None:
        self.model = Model(os.environ["BENCHMARK_MODEL"])

    @bentoml.api(route="/predict")
    async def predict(self, inputs: list[list[float]] | None = None, image: str | None = None) -> dict[str, Any]:
        """Run one request."""
        return {"outputs": self.model.run(self.model.from_json({"inputs": inputs, "image": image})).tolist()}

    @bentoml.api(route="/predict-rows", batchable=True, max_batch_size=MAX_BATCH)
    def predict_rows(self, rows: list[Any]) -> list[Any]:
        """Run the rows of several requests: what can be batched has one parameter, whose items are the rows."""
        field = "image" if self.model.is_image else "inputs"
        wrapped = rows if self.model.is_image else [[row] for row in rows]
        batch = np.concatenate([self.model.from_json({field: row}) for row in wrapped])
        return list(self.model.run(batch).tolist())


if __name__ == "__main__":
    os.chdir(os.path.dirname(os.path.abspath(__file__)))  # noqa: PTH100, PTH120 (short of a package)
    environment = {**os.environ, "BENCHMARK_MODEL": sys.argv[1], "BENTOML_DO_NOT_TRACK": "true"}
    words = [sys.executable, "-m", "bentoml", "serve", "bento:Served", "--port", sys.argv[2]]
    os.execve(sys.executable, words, environment)
