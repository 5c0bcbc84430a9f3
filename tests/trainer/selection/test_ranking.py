"""A candidate is scored on the training images and auditioned on the validation images; sketches stand for tasks."""

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from headstart.trainer.audition import audition
from headstart.trainer.backbones.backbone import Backbone
from headstart.trainer.backbones.tensors import tensors_fingerprint
from headstart.trainer.inputs.batches import to_pixels
from headstart.trainer.inputs.dataset import ImageArrays, LabelledImages
from headstart.trainer.inputs.preprocessing import Preprocessing
from headstart.trainer.recipe import Data, Recipe, Search, Train
from headstart.trainer.selection import ranking
from headstart.trainer.selection.ranking import Target, assess, make_sketch, sketch_distances, sketched
from headstart.trainer.selection.scores import score_features
from headstart.trainer.selection.source_folder import Sketch


def digits(num: int) -> LabelledImages:
    x, y = load_digits(return_X_y=True)
    storage = ImageArrays((x[:num].reshape(-1, 8, 8) * 15).astype(np.uint8))
    return LabelledImages(tuple("0123456789"), y[:num].astype(np.int64), storage.digests(), storage, storage.grey())


def target(num: int = 300, train: int = 150, validation: int = 90) -> Target:
    """Parts that lie among each other, as those of a division do."""
    order = np.random.default_rng(0).permutation(num)
    parts = np.split(order, [train, train + validation])
    return Target(
        images=digits(num), parts=dict(zip(("train", "validation", "test"), map(np.sort, parts), strict=True))
    )


@pytest.fixture
def backbone() -> Backbone:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.ReLU())
    return Backbone(
        name="toy", architecture="test:toy", module=module, num_features=12,
        preprocessing=Preprocessing(resize=8, crop=8, channels=1, mean=(0.5,), std=(0.25,)),
        fingerprint=tensors_fingerprint(module.state_dict(), "test:toy"),
    )  # fmt: skip


def features(backbone: Backbone, images: LabelledImages) -> torch.Tensor:
    return backbone.features(to_pixels([images.image(i) for i in range(len(images))], backbone.preprocess))


def test_a_candidate_is_scored_on_training_images_and_auditioned_on_validation_images(
    backbone: Backbone, tmp_path: Path
):
    task, search = target(), Search(learning_rates=(1e-3, 1e-1), weight_decays=(0.1,), epochs=5)
    recipe = Recipe(name="r", data=Data(path="d"), seed=3, search=search, train=Train(optimizer="sgd"))
    seen: list[tuple[int, int]] = []
    found = assess(backbone, task, recipe, tmp_path, tag="", progress=lambda *done: seen.append(done))
    assert seen[-6:] == [(240, 240), *((epoch, 5) for epoch in range(1, 6))]
    train, validation = task.part("train"), task.part("validation")
    x, y = features(backbone, train), torch.from_numpy(train.labels)
    asked, truth = features(backbone, validation), torch.from_numpy(validation.labels)
    scores = score_features(x, y)
    assert {"knn": found.knn, "ridge": found.ridge, "score": found.score} == scores
    assert scores["knn"] != scores["ridge"]
    # Features in batches there and all at once here are rounded otherwise, which training carries on.
    heads = audition(x, y, asked, truth, num_classes=10, search=search, optimizer="sgd", seed=3)
    assert found.audition_accuracy == pytest.approx(heads.accuracy, abs=1e-9)
    assert found.audition_loss == pytest.approx(heads.loss, rel=1e-4)
    torch.testing.assert_close(found.head.weight, heads.head.weight, rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(found.correct, (heads.head(asked).argmax(1) == truth).numpy())
    assert found.correct.mean() == pytest.approx(found.audition_accuracy)
    assert len(found.features.tensor()) == 240


def test_the_images_that_are_scored_are_drawn_by_the_recipes_seed(
    backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def of_fifty(x: torch.Tensor, y: torch.Tensor, seed: int = 0) -> dict[str, float]:
        return score_features(x, y, cap=50, seed=seed)

    monkeypatch.setattr(ranking, "score_features", of_fifty)
    recipe = Recipe(name="r", data=Data(path="d"), seed=3, search=Search(epochs=1))
    train = target().part("train")
    drawn = score_features(features(backbone, train), torch.from_numpy(train.labels), cap=50, seed=3)
    assert assess(backbone, target(), recipe, tmp_path, tag="").score == drawn["score"]


def test_a_candidate_sees_what_is_known_and_is_judged_on_the_rest():
    task = target()
    digest = task.images.digests
    assert task.known().digests == tuple(digest[i] for name in ("train", "validation") for i in task.parts[name])
    assert task.judged_on == tuple(digest[i] for name in ("validation", "test") for i in task.parts[name])


def test_a_sketch_is_of_all_known_images_or_of_a_thousand_drawn_by_the_seed():
    exactly = target(num=1100, train=900, validation=100)
    assert sketched(exactly, 0).digests == exactly.known().digests
    more = target(num=1400, train=1000, validation=300)
    drawn, known = sketched(more, 0).digests, more.known().digests
    assert len(set(drawn)) == 1000
    places = [known.index(digest) for digest in drawn]
    assert places == sorted(places)
    # Drawn from all of the 1,300: 231 of the 300 for validation are expected, with a deviation of 6.4.
    assert 200 < sum(place >= 1000 for place in places) < 262
    assert drawn == sketched(more, 0).digests != sketched(more, 1).digests


def test_a_sketch_holds_the_features_their_labels_and_their_mean(backbone: Backbone, tmp_path: Path):
    images = digits(70)
    sketch, cached = make_sketch(backbone, images, tmp_path, tag="")
    torch.testing.assert_close(sketch.features, features(backbone, images), rtol=1e-5, atol=1e-5)
    assert torch.equal(sketch.features, cached.tensor())
    assert torch.equal(sketch.labels, torch.from_numpy(images.labels))
    torch.testing.assert_close(sketch.mean, sketch.features.mean(0))
    assert (sketch.probe, sketch.precision, sketch.centre) == (backbone.fingerprint, "float32", "origin")


def test_distances_are_those_of_each_source_in_their_order():
    rng = torch.Generator().manual_seed(0)

    def sketch(num: int, moved: float) -> Sketch:
        x = torch.randn(num, 5, generator=rng) + moved
        return Sketch(features=x, labels=torch.zeros(num, dtype=torch.int64), mean=x.mean(0), probe="p")

    mine, sources = sketch(20, 0.0), [sketch(15, 2.0), sketch(31, 0.5)]
    found = sketch_distances(mine, sources)
    for one, distances in zip(sources, found, strict=True):
        pairs = ((mine, one), (one, one), (mine, mine))
        cross, own, other = (torch.cdist(a.features.double(), b.features.double()).mean() for a, b in pairs)
        own, other = own * len(one.labels) / (len(one.labels) - 1), other * 20 / 19
        assert distances["energy"] == pytest.approx(float(2 * cross - own - other), rel=1e-4)
        noise = sum(a.features.var(0).sum() / len(a.labels) for a in (mine, one))
        assert distances["euclidean"] == pytest.approx(
            float((torch.dist(mine.mean, one.mean) ** 2 - noise) ** 0.5), 1e-4
        )
    assert sketch_distances(mine, []) == []
    alone = sketch(1, 0.0)
    assert sketch_distances(mine, [alone])[0]["euclidean"] == pytest.approx(float(torch.dist(mine.mean, alone.mean)))


def test_a_task_of_few_images_is_no_farther_than_one_of_many():
    rng = torch.Generator().manual_seed(0)

    def sketch(num: int, moved: float = 0.0) -> Sketch:
        x = torch.randn(num, 200, generator=rng).add_(moved)
        return Sketch(features=x, labels=torch.zeros(num, dtype=torch.int64), mean=x.mean(0), probe="p")

    same, far = (sketch_distances(sketch(300), [sketch(n, moved) for n in (5, 50, 500)]) for moved in (0.0, 0.5))
    for name, least in (("energy", 1.5), ("euclidean", 6.0)):
        assert max(one[name] for one in same) < least / 2
        assert min(one[name] for one in far) > least
