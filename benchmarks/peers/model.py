"""What every contender runs: one ONNX graph of one input, in a session that is opened the same way everywhere.

The programs beside this file are started by path in environments of their own: they import nothing of Headstart.
"""

import base64
import json
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # as headstart.serving.ort has it
import onnxruntime


class Model:
    """A graph in a session of one thread that does not spin, as `headstart serve --threads 1` opens it.

        model = Model("model.onnx")
        model.run(model.from_bytes(body))  # float32 [1, C]

    Its last output is the one that is asked for; it runs on the provider `BENCHMARK_PROVIDER`, or not at all.
    """

    def __init__(self, path: str) -> None:
        options = onnxruntime.SessionOptions()
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 3
        provider = os.environ.get("BENCHMARK_PROVIDER", "CPUExecutionProvider")
        chosen = [provider]
        if provider == "CUDAExecutionProvider":
            onnxruntime.preload_dlls()
            chosen = [(provider, {"cudnn_conv_algo_search": "HEURISTIC"})]  # as ours has it
        self.session = onnxruntime.InferenceSession(path, options, providers=chosen)
        if self.session.get_providers()[0] != provider:
            raise RuntimeError(f"{provider} does not load here")
        self.input = self.session.get_inputs()[0].name
        self.output = self.session.get_outputs()[-1].name
        self.is_image = self.session.get_inputs()[0].type == "tensor(uint8)"
        self.dtype = np.dtype(np.uint8 if self.is_image else np.float32)
        self.shape = (224, 224, 3) if self.is_image else (2048,)
        """Of one row."""
        self.num_classes = int(self.session.get_outputs()[-1].shape[-1])

    def run(self, batch: NDArray[Any]) -> NDArray[np.float32]:
        """The output of a batch, float32 [N, C]."""
        found: NDArray[np.float32] = self.session.run([self.output], {self.input: batch})[0]
        return found

    def from_bytes(self, data: "bytes | memoryview") -> NDArray[Any]:
        """One row from its bytes."""
        return np.frombuffer(data, self.dtype).reshape(1, *self.shape)

    def answer(self, data: "bytes | memoryview", json_length: int) -> tuple[bytes, bytes]:
        """JSON and tensor of the protocol's binary answer to a request of so many bytes of JSON and one tensor."""
        assert json.loads(bytes(data[:json_length]))["inputs"]
        found = self.run(self.from_bytes(data[json_length:]))
        tensor = {"name": self.output, "datatype": "FP32", "shape": found.shape}
        parameters = {"binary_data_size": found.nbytes}
        document = {"model_name": "it", "outputs": [{**tensor, "parameters": parameters}]}
        return json.dumps(document).encode(), found.tobytes()

    def from_json(self, document: Mapping[str, Any]) -> NDArray[Any]:
        """A row as JSON has it: numbers under `inputs`, or an image's bytes in base64 under `image`."""
        if self.is_image:
            return self.from_bytes(base64.b64decode(document["image"]))
        return np.array(document["inputs"], self.dtype)
