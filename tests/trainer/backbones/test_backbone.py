"""Real weights from packages, ready to use, and what happens when card, file and architecture disagree."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from sklearn.datasets import load_sample_images

from headstart.trainer.backbones.architectures import IMAGENET_MEAN, IMAGENET_STD, build_architecture
from headstart.trainer.backbones.backbone import load_backbone
from headstart.trainer.backbones.card import SourceCard
from headstart.trainer.backbones.tensors import read_tensors
from headstart.trainer.backbones.weights import fetch_weights, file_sha256
from headstart.trainer.errors import SourceError
from headstart.trainer.inputs.preprocessing import Preprocessing
from headstart.trainer.selection.sources import catalog

PACKAGED = {
    "mobilenet-v2-imagenet": 1280,
    "efficientnet-lite0-imagenet": 1280,
    "english-g2": 256,
    "craft-vgg16-bn": 512,
    "mtcnn-onet": 1152,
    "document-orientation": 512,
}


def test_every_packaged_source_is_tried():
    assert set(PACKAGED) == {name for name, card in catalog().items() if not card.weights.startswith("torchvision:")}


@pytest.fixture(scope="module")
def photographs() -> torch.Tensor:
    return torch.from_numpy(np.stack(load_sample_images().images)[:, ::2, ::2].copy())


@pytest.mark.parametrize("name", PACKAGED)
def test_packaged_source(name, cache, photographs):
    card = catalog()[name]
    backbone = load_backbone(card, cache)
    features = backbone.features(backbone.preprocess(photographs))
    assert features.shape == (2, PACKAGED[name]) == (2, backbone.num_features)
    assert features.dtype == torch.float32
    assert not features.requires_grad
    assert torch.isfinite(features).all()
    assert (features[0] - features[1]).abs().max() > 1e-3  # a temple and a flower
    assert backbone.tunable == (name != "document-orientation") == (backbone.graph is None)
    assert backbone.name == name
    assert len(backbone.fingerprint) == 64


@pytest.mark.parametrize("name", ["mobilenet-v2-imagenet", "efficientnet-lite0-imagenet"])
def test_imagenet_features_still_know_what_they_see(name, cache, photographs):
    """With the published classifier put back, the temple is a palace (698) and the flower a daisy or a bee
    (985, 309)."""
    card = catalog()[name]
    card = replace(card, preprocessing=replace(card.preprocessing, resize=224, crop=224))
    backbone = load_backbone(card, cache)
    tensors = read_tensors(fetch_weights(card.weights, card.sha256, cache), cache)
    weight, bias = (next(t for n, t in tensors.items() if n.endswith(end) and t.shape[0] == 1000 and t.ndim == axes)
                    for end, axes in ((".weight", 2), (".bias", 1)))  # fmt: skip
    logits = backbone.features(backbone.preprocess(photographs)) @ weight.T + bias
    assert int(logits[0].argmax()) == 698
    # The flower's crop is all petals: botanical and hive classes come first, buildings nowhere.
    assert {985, 309, 599, 947, 996} & set(logits[1].topk(5).indices.tolist())


@pytest.mark.parametrize("name", ["mtcnn-onet", "document-orientation"])
def test_the_default_dtype_changes_neither_fingerprint_nor_features(name, cache, photographs):
    expected = load_backbone(catalog()[name], cache)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        found = load_backbone(catalog()[name], cache)
        features = found.features(found.preprocess(photographs))
    finally:
        torch.set_default_dtype(before)
    assert found.fingerprint == expected.fingerprint
    assert torch.equal(features, expected.features(expected.preprocess(photographs)))


def test_loading_leaves_the_runs_own_draws_alone(cache):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    load_backbone(catalog()["mtcnn-onet"], cache)
    assert torch.equal(torch.rand(3), expected)


def test_fingerprint_is_of_content_and_not_of_format(tmp_path):
    torch.manual_seed(0)
    module, _ = build_architecture("torchvision:squeezenet1_1")
    torch.save({"state_dict": {f"module.{k}": v for k, v in module.state_dict().items()}}, tmp_path / "a.pth")
    save_file(module.state_dict(), tmp_path / "b.safetensors")
    save_file({f"backbone.{k}": v for k, v in module.state_dict().items()} | {"head.weight": torch.zeros(2, 512)},
              tmp_path / "c.safetensors")  # fmt: skip
    found = {
        load_backbone(_card(tmp_path / name), tmp_path).fingerprint
        for name in ("a.pth", "b.safetensors", "c.safetensors")
    }
    assert len(found) == 1
    next(iter(module.parameters())).data[0, 0, 0, 0] += 1e-6
    save_file(module.state_dict(), tmp_path / "d.safetensors")
    assert load_backbone(_card(tmp_path / "d.safetensors"), tmp_path).fingerprint not in found


def _card(path, **changes) -> SourceCard:
    crop = changes.pop("crop", 64)
    preprocessing = Preprocessing(resize=crop, crop=crop, mean=IMAGENET_MEAN, std=IMAGENET_STD)
    card = SourceCard(
        name="x", task="x", architecture="torchvision:squeezenet1_1", weights=f"file:{path}", sha256=file_sha256(path),
        preprocessing=preprocessing,
    )  # fmt: skip
    return replace(card, **changes)


def test_weights_of_another_architecture(cache):
    card = replace(catalog()["mobilenet-v2-imagenet"], architecture="torchvision:resnet18")
    message = r"mobilenet_v2-b0353104.pth does not fit torchvision:resnet18: missing: conv1.weight, .*unexpected"
    with pytest.raises(SourceError, match=message):
        load_backbone(card, cache)
    card = replace(catalog()["mtcnn-onet"], weights=catalog()["mtcnn-onet"].weights.replace("onet", "rnet"))
    with pytest.raises(SourceError, match="SHA-256"):
        load_backbone(card, cache)


def test_changed_file_is_refused(tmp_path):
    module, _ = build_architecture("torchvision:squeezenet1_1")
    path = tmp_path / "a.safetensors"
    save_file(module.state_dict(), path)
    card = _card(path)
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    with pytest.raises(SourceError, match=f"has SHA-256 {file_sha256(path)}, the card says {card.sha256}; restore"):
        load_backbone(card, tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"crop": 8}, "squeezenet1_1 cannot take crops of 8 pixels .*set the card's preprocessing.crop to 224"),
        ({"architecture": "torchvision:vit_b_16"}, "takes 224x224 pixels alone"),
        ({"architecture": "headstart:english-g2"}, "takes 1 channel"),
        ({"architecture": "torchvision:squeezenet"}, "did you mean torchvision:squeezenet1_1"),
    ],
)
def test_cards_that_do_not_fit(changes, message, tmp_path):
    module, _ = build_architecture("torchvision:squeezenet1_1")
    save_file(module.state_dict(), tmp_path / "a.safetensors")
    with pytest.raises(SourceError, match=message):
        load_backbone(_card(tmp_path / "a.safetensors", **changes), tmp_path)


def test_orientation_graph_also_at_its_published_tensor(cache, photographs):
    card = replace(catalog()["document-orientation"], architecture="onnx:p2o.pd_op.flatten.0.0")
    backbone = load_backbone(card, cache)
    assert backbone.num_features == 1280
    assert (backbone.input_name, backbone.output_name) == ("x", "features")
    assert backbone.fingerprint != load_backbone(catalog()["document-orientation"], cache).fingerprint
    found = load_backbone(replace(card, architecture="onnx:"), cache)
    assert found.architecture == "onnx:p2o.pd_op.flatten.0.0"
    assert found.fingerprint == backbone.fingerprint
