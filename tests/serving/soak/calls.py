"""The clients of gRPC: a few that call in a loop, each on a connection of its own, beside the load over HTTP."""

import asyncio
import os
import time

from tests.serving.soak.load import PATIENCE_S, Tally
from tests.serving.soak.versions import inputs
from tests.serving.soak.world import NAME

_PAUSE_S = 0.05  # after a refusal
_METHOD = "/inference.GRPCInferenceService/ModelInfer"


def calls() -> list[bytes]:
    """A request for each input."""
    from tritonclient.grpc import service_pb2

    found = []
    for image in inputs():
        tensor = service_pb2.ModelInferRequest.InferInputTensor(
            name="images", datatype="UINT8", shape=[1, *image.shape]
        )
        wanted = service_pb2.ModelInferRequest.InferRequestedOutputTensor(name="logits")
        request = service_pb2.ModelInferRequest(
            model_name=NAME, inputs=[tensor], outputs=[wanted], raw_input_contents=[image.tobytes()]
        )
        found.append(request.SerializeToString())
    return found


async def keep_calling(port: int, tally: Tally, seconds: float, concurrency: int = 4) -> None:
    """Call for so many seconds; every answer is judged."""
    os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"  # before the import: `cp` is started beside its threads, it remarks
    import grpc
    from tritonclient.grpc import service_pb2

    messages, end = calls(), time.monotonic() + seconds

    async def client(index: int) -> None:
        options = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_reconnect_backoff_ms", 500)]
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=options) as channel:
            infer = channel.unary_unary(_METHOD, response_deserializer=service_pb2.ModelInferResponse.FromString)
            number = index
            while (started := time.monotonic()) < end:
                number = (number + 1) % len(messages)
                try:
                    answer = await infer(messages[number], timeout=PATIENCE_S)
                except grpc.aio.AioRpcError as error:
                    tally.judge_refusal(started, error.code().name, error.details() or "")
                    await asyncio.sleep(_PAUSE_S)
                else:
                    tally.judge_call(number, answer.model_version, answer.raw_output_contents[0])

    await asyncio.gather(*(client(index) for index in range(concurrency)))
