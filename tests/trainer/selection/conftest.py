"""What the tests of the sources are given: finished runs, as small as they can be."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from headstart.trainer.backbones.architectures import build_architecture
from headstart.trainer.selection.source_folder import Sketch, image_id, write_source
from headstart.trainer.selection.sources import catalog

MINE, OTHERS = "ab" * 32, "cd" * 32


@pytest.fixture
def finished(tmp_path):
    """Writes a run's source/ folder and returns the run's."""

    def make(name: str, data: str = OTHERS, seed: int = 0, seen: Sequence[str] = ()):
        torch.manual_seed(seed)
        module, _ = build_architecture("headstart:mtcnn-onet")
        card = replace(catalog()["mtcnn-onet"], name=name, data_fingerprint=data)
        sketch = Sketch(features=torch.randn(4, 2), labels=torch.arange(4), mean=torch.zeros(2), probe=MINE)
        write_source(
            tmp_path / f"run-{name}-{seed}" / "source", card, module.state_dict(), {"bias": torch.zeros(2)}, sketch,
            seen=frozenset(map(image_id, seen)),
        )  # fmt: skip
        return tmp_path / f"run-{name}-{seed}"

    return make
