"""gRPC alone: the library's asyncio server, which answers bytes with bytes and parses neither.

python echo_grpc.py MODEL PORT
"""

import asyncio
import sys

import grpc
import uvloop
from model import Model

ANSWER = b"x" * 4 * Model(sys.argv[1]).num_classes


async def answer(request: bytes, context: object) -> bytes:
    return ANSWER


async def main() -> None:
    server = grpc.aio.server()
    handler = grpc.unary_unary_rpc_method_handler(answer)
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler("inference.GRPCInferenceService", {"ModelInfer": handler}),)
    )
    server.add_insecure_port(f"127.0.0.1:{sys.argv[2]}")
    await server.start()
    await server.wait_for_termination()


asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
asyncio.run(main())
