"""LitServe, which takes JSON: one worker on the CPU.

python lit.py MODEL PORT [MAX_BATCH]
"""

import sys
from typing import Any

import litserve
import numpy as np
from model import Model

MAX_BATCH = int(sys.argv[3]) if len(sys.argv) > 3 else 1


class Api(litserve.LitAPI):
    """The documented four methods."""

    def setup(self, device: str) -> None:
        """Load the model, in the worker."""
        self.model = Model(sys.argv[1])

    def decode_request(self, request: dict[str, Any]) -> Any:
        """A row from JSON."""
        return self.model.from_json(request)

    def batch(self, inputs: list[Any]) -> Any:
        """Rows together."""
        return np.concatenate(inputs)

    def predict(self, x: Any) -> Any:
        """Run them."""
        return self.model.run(x)

    def unbatch(self, output: Any) -> Any:
        """Each row its own."""
        return [output[index : index + 1] for index in range(len(output))]

    def encode_response(self, output: Any) -> dict[str, Any]:
        """JSON of a row."""
        return {"outputs": output.tolist()}


if __name__ == "__main__":
    api = Api(max_batch_size=MAX_BATCH, batch_timeout=0.001) if MAX_BATCH > 1 else Api()
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=1, fast_queue=True)
    server.run(port=int(sys.argv[2]), host="127.0.0.1", generate_client_file=False, log_level="warning")
