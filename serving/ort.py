"""ONNX Runtime without its telemetry; whatever uses it takes it from here.

    from headstart.serving.ort import onnxruntime

From 1.29 on its official builds for Linux and macOS tell Microsoft by themselves of sessions, models and the machine.
They keep that and a number of the machine in `~/.cache/Microsoft`, and where they cannot write there they say so on
stderr, between the lines of the log. The variable is read once, as the library is loaded; what it says already holds.
"""

import os

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
import onnxruntime as onnxruntime
