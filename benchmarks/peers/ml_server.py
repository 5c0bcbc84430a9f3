"""MLServer with a runtime of our own, over HTTP as JSON and over gRPC; in one process, without its worker pool.

python ml_server.py MODEL PORT    # gRPC at PORT + 1
"""

import asyncio
import os
import sys

from mlserver import MLModel, MLServer, ModelSettings, Settings
from mlserver.codecs import NumpyCodec
from mlserver.settings import ModelParameters
from mlserver.types import InferenceRequest, InferenceResponse
from model import Model


class Runtime(MLModel):
    """One model."""

    async def load(self) -> bool:
        """Load the model."""
        self.model = Model(sys.argv[1])
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        """Run one request."""
        batch = NumpyCodec.decode_input(payload.inputs[0])
        output = NumpyCodec.encode_output(self.model.output, self.model.run(batch))
        return InferenceResponse(model_name=self.name, id=payload.id, outputs=[output])


async def main() -> None:
    port = int(sys.argv[2])
    settings = Settings(
        host="127.0.0.1", http_port=port, grpc_port=port + 1, metrics_endpoint=None, parallel_workers=0, debug=False,
        grpc_max_message_length=64 << 20, load_models_at_startup=False, 
        environments_dir=os.environ.get("TMPDIR", "/tmp"),
    )  # fmt: skip
    server = MLServer(settings)
    model = ModelSettings(name="it", implementation=Runtime, parameters=ModelParameters(version="1"))
    await server.start([model])


asyncio.run(main())
