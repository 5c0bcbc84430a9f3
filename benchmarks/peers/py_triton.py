"""NVIDIA's Triton with its Python front, PyTriton: the same request as ours, dynamic batching on.

python py_triton.py MODEL PORT    # gRPC at PORT + 1
"""

import os
import sys
import sysconfig
from typing import Any

import numpy as np
from model import Model
from pytriton.decorators import batch
from pytriton.model_config import DynamicBatcher, ModelConfig, Tensor
from pytriton.triton import Triton, TritonConfig

model = Model(sys.argv[1])
# Triton starts an interpreter of its own and must find this one's library, not the system's.
os.environ["LD_LIBRARY_PATH"] = f"{sysconfig.get_config_var('LIBDIR')}:{os.environ.get('LD_LIBRARY_PATH', '')}"


@batch
def infer(**inputs: Any) -> list[Any]:
    return [model.run(inputs[model.input])]


port = int(sys.argv[2])
config = TritonConfig(
    http_address="127.0.0.1", http_port=port, grpc_address="127.0.0.1", grpc_port=port + 1, allow_metrics=False
)
with Triton(config=config) as triton:
    triton.bind(
        model_name="it",
        infer_func=infer,
        inputs=[Tensor(name=model.input, dtype=model.dtype.type, shape=model.shape)],
        outputs=[Tensor(name=model.output, dtype=np.float32, shape=(model.num_classes,))],
        config=ModelConfig(max_batch_size=16, batcher=DynamicBatcher(max_queue_delay_microseconds=0)),
        strict=False,
    )
    triton.serve()
