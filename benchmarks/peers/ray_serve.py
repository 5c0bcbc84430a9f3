"""Ray Serve: one replica of a deployment that takes raw bytes.

python ray_serve.py MODEL PORT
"""

import sys
from typing import Any

import ray
from model import Model
from ray import serve
from starlette.responses import Response


@serve.deployment(max_ongoing_requests=256, ray_actor_options={"num_cpus": 0})
class Served:
    """The deployment."""

    def __init__(self, path: str) -> None:
        self.model = Model(path)

    async def __call__(self, request: Any) -> Response:
        """Run one request."""
        found = self.model.run(self.model.from_bytes(await request.body()))
        return Response(found.tobytes(), media_type="application/octet-stream")


if __name__ == "__main__":
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="warning")
    serve.start(
        http_options={"host": "127.0.0.1", "port": int(sys.argv[2])}, logging_config={"enable_access_log": False}
    )
    serve.run(Served.bind(sys.argv[1]), route_prefix="/bytes", blocking=True)
