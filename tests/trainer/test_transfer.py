"""The modes: what each starts from, what it trains, and what becomes of BatchNorm's statistics."""

import copy

import pytest
import torch
from torch import nn

from headstart.trainer.backbones.backbone import Backbone, build_architecture
from headstart.trainer.backbones.tensors import tensors_fingerprint
from headstart.trainer.inputs.preprocessing import Preprocessing
from headstart.trainer.transfer import Classifier, build_classifier

GREY = Preprocessing(resize=48, crop=48, channels=1, mean=(0.5,), std=(0.5,))


def backbone() -> Backbone:
    torch.manual_seed(7)
    module, num_features = build_architecture("headstart:english-g2")
    return Backbone(
        name="source",
        architecture="headstart:english-g2",
        module=module.eval(),
        preprocessing=GREY,
        num_features=num_features,
        fingerprint=tensors_fingerprint(module.state_dict(), "test"),
    )


def equal(left: nn.Module, right: nn.Module) -> bool:
    a, b = left.state_dict(), right.state_dict()
    return all(torch.equal(a[name], b[name]) for name in a)


def head() -> nn.Linear:
    return nn.Linear(256, 3)


def test_finetune_starts_from_the_source_and_the_trained_head():
    source, trained = backbone(), head()
    model = build_classifier("finetune", source, 3, head=trained, seed=0)
    assert equal(model.backbone, backbone().module)
    assert equal(model.head, trained)


def test_full_starts_from_the_source_and_a_new_head():
    trained = head()
    model = build_classifier("full", backbone(), 3, head=trained, seed=0)
    assert equal(model.backbone, backbone().module)
    assert not equal(model.head, trained)
    assert (model.head.weight.shape, model.head.bias.shape) == ((3, 256), (3,))


def test_a_classifier_gives_the_heads_logits_of_the_backbones_features():
    source, trained = backbone(), head()
    pixels = torch.rand(2, 1, 48, 48)
    with torch.no_grad():
        found = build_classifier("finetune", source, 3, head=trained, seed=0).eval()(pixels)
        torch.testing.assert_close(found, source.features(pixels) @ trained.weight.T + trained.bias)


def test_frozen_statistics_are_those_of_any_batch_norm_and_leave_dropout_on():
    inside = nn.Sequential(nn.Conv1d(1, 4, 3), nn.BatchNorm1d(4), nn.Flatten(), nn.BatchNorm1d(24), nn.Dropout())
    for freeze in (True, False):
        model = Classifier(inside, nn.Linear(24, 3), freeze_statistics=freeze).train()
        assert [module.training for module in inside] == [True, not freeze, True, not freeze, True]
        assert not any(module.training for module in model.eval().modules())


def test_scratch_takes_nothing_over_and_is_the_architectures_own_start():
    source = backbone()
    model = build_classifier("scratch", source, 3, head=None, seed=11)
    weight = model.backbone.state_dict()["features.0.weight"]
    assert not torch.equal(weight, source.module.state_dict()["features.0.weight"])
    again = build_classifier("scratch", backbone(), 3, head=None, seed=11)
    assert equal(model, again)
    assert not equal(model, build_classifier("scratch", backbone(), 3, head=None, seed=12))
    # PyTorch's own initialisation of a convolution: uniform within 1 / sqrt(fan in).
    assert float(weight.abs().max()) <= 1 / 3
    assert float(weight.abs().max()) > 0.9 / 3


def test_building_a_model_leaves_the_global_random_state_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    build_classifier("scratch", backbone_without_seed(), 3, head=None, seed=1)
    assert torch.equal(torch.rand(3), expected)


def backbone_without_seed() -> Backbone:
    with torch.random.fork_rng():
        return backbone()


@pytest.mark.parametrize(("mode", "frozen"), [("finetune", True), ("full", False), ("scratch", False)])
def test_batch_norm_statistics(mode: str, frozen: bool):
    model = build_classifier(mode, backbone(), 3, head=head(), seed=0).train()
    before = {name: buffer.clone() for name, buffer in model.named_buffers() if "running" in name}
    assert before
    model(torch.rand(8, 1, 48, 48)).sum().backward()
    after = dict(model.named_buffers())
    assert all(torch.equal(before[name], after[name]) for name in before) == frozen
    assert all(parameter.grad is not None for parameter in model.parameters())
    model.eval()
    fixed = copy.deepcopy(model.state_dict())
    model(torch.rand(8, 1, 48, 48))
    assert all(torch.equal(fixed[name], tensor) for name, tensor in model.state_dict().items())


def test_what_cannot_be_trained_is_refused():
    with pytest.raises(ValueError, match="mode feature trains no backbone"):
        build_classifier("feature", backbone(), 3, head=None, seed=0)
    with pytest.raises(ValueError, match="starts from a trained head"):
        build_classifier("finetune", backbone(), 3, head=None, seed=0)
    graph = backbone()
    graph.module = None
    with pytest.raises(ValueError, match="frozen ONNX graph"):
        build_classifier("full", graph, 3, head=None, seed=0)
