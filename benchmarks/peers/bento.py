"""BentoML, which takes JSON: one worker; `bentoml serve` is started by this program.

python bento.py MODEL PORT
"""

import os
import sys
from typing import Any

import bentoml
from model import Model


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


if __name__ == "__main__":
    os.chdir(os.path.dirname(os.path.abspath(__file__)))  # noqa: PTH100, PTH120 (short of a package)
    environment = {**os.environ, "BENCHMARK_MODEL": sys.argv[1], "BENTOML_DO_NOT_TRACK": "true"}
    words = [sys.executable, "-m", "bentoml", "serve", "bento:Served", "--port", sys.argv[2]]
    os.execve(sys.executable, words, environment)
