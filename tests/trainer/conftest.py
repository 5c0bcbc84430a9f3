"""What the tests of heads are given."""

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Two threads on a busy machine make small products ten times slower."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture
def blobs() -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """Makes normal clusters, away from the origin, each dimension on a scale of its own."""

    def make(
        num_samples: int, num_features: int, num_classes: int, seed: int = 0, spread: float = 1.5
    ) -> tuple[torch.Tensor, torch.Tensor]:
        rng = np.random.default_rng(seed)
        labels = np.arange(num_samples) % num_classes
        centres = rng.normal(size=(num_classes, num_features))
        x = centres[labels] + spread * rng.normal(size=(num_samples, num_features))
        scales = 10.0 ** rng.uniform(-2, 2, num_features)
        return torch.tensor((x + 3) * scales, dtype=torch.float32), torch.tensor(labels)

    return make
