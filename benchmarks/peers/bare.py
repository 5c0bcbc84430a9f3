"""Bare `session.run`, on the servers' core: each line of stdin is `BATCH SECONDS`, the answer the calls' milliseconds.

python bare.py MODEL
"""

import json
import sys
import time

import numpy as np
from model import Model

model = Model(sys.argv[1])
row = np.random.default_rng(0).integers(0, 255, (1, *model.shape)).astype(model.dtype)
print("ready", flush=True)
for line in sys.stdin:
    size, seconds = int(line.split()[0]), float(line.split()[1])
    batch, taken = np.repeat(row, size, 0), []
    model.run(batch)
    end = time.perf_counter() + seconds
    while (started := time.perf_counter()) < end:
        model.run(batch)
        taken.append((time.perf_counter() - started) * 1e3)
    print(json.dumps(taken), flush=True)
