"""Tensors out of files: every format, nothing else, and only what fits."""

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from headstart.trainer.backbones.architectures import Architecture, build_architecture, find_architecture
from headstart.trainer.backbones.tensors import load_tensors, read_tensors, tensors_fingerprint
from headstart.trainer.backbones.weights import WeightsFile
from headstart.trainer.errors import SourceError

STATE = {"b.weight": torch.arange(6.0).reshape(2, 3), "a": torch.tensor(3), "h": torch.ones(2, dtype=torch.float16)}


def _file(path: Path) -> WeightsFile:
    return WeightsFile(path=path, sha256=hashlib.sha256(path.read_bytes()).hexdigest())


@pytest.mark.parametrize(
    "content",
    [
        STATE,
        {"state_dict": STATE, "epoch": 3},
        {"model": STATE, "optimizer": {}},
        {f"module.{name}": tensor for name, tensor in STATE.items()},
        {"state_dict": {f"module.{name}": tensor for name, tensor in STATE.items()}},
    ],
    ids=["plain", "state_dict", "model", "data-parallel", "both"],
)
def test_torch_files(content, tmp_path):
    (tmp_path / "weights").mkdir()
    torch.save(content, tmp_path / "w.pth")
    first = read_tensors(_file(tmp_path / "w.pth"), tmp_path)
    second = read_tensors(_file(tmp_path / "w.pth"), tmp_path)  # from the conversion
    for found in (first, second):
        assert found.keys() == STATE.keys()
        assert all(torch.equal(found[name], STATE[name]) and found[name].dtype == STATE[name].dtype for name in STATE)


def test_conversion_is_used_only_while_it_is_whole(tmp_path, monkeypatch):
    torch.save(STATE, tmp_path / "w.pth")
    weights = _file(tmp_path / "w.pth")
    (tmp_path / "weights").mkdir()
    read_tensors(weights, tmp_path)
    converted = tmp_path / "weights" / f"{weights.sha256[:16]}-w.safetensors"
    assert load_file(converted).keys() == STATE.keys()
    whole = converted.read_bytes()
    for spoilt in (whole[:-1] + bytes([whole[-1] ^ 1]), whole[:20], b""):
        converted.write_bytes(spoilt)
        assert torch.equal(read_tensors(weights, tmp_path)["b.weight"], STATE["b.weight"])
        assert torch.equal(load_file(converted)["b.weight"], STATE["b.weight"])
    monkeypatch.setattr(torch, "load", None)
    read_tensors(weights, tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (nn.Linear(2, 2), r"as weights alone \(Unsupported global: GLOBAL torch.nn.\S+ was not .* by default\); save"),
        ({"a": 1}, "holds no state dict"),
        ([], "holds no state dict"),
        ({}, "holds no state dict"),
        (STATE | {"rate": 0.1}, "holds no state dict"),
    ],
    ids=["pickled-module", "numbers", "list", "empty", "mixed"],
)
def test_other_contents_are_refused(content, message, tmp_path):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(SourceError, match=message):
        read_tensors(_file(tmp_path / "w.pth"), tmp_path)


def test_nothing_in_a_file_is_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return exec, (f"open({str(tmp_path / 'sprung')!r}, 'w')",)

    torch.save({"a": Trap()}, tmp_path / "w.pth")
    with pytest.raises(SourceError, match="cannot be read as weights alone"):
        read_tensors(_file(tmp_path / "w.pth"), tmp_path)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
def test_garbage_is_refused(name, tmp_path):
    (tmp_path / name).write_bytes(b"not weights at all")
    with pytest.raises(SourceError, match=str(tmp_path / name)):
        read_tensors(_file(tmp_path / name), tmp_path)


def test_safetensors_are_read_as_they_are(tmp_path):
    save_file(STATE, tmp_path / "w.safetensors")
    assert torch.equal(read_tensors(_file(tmp_path / "w.safetensors"), tmp_path)["b.weight"], STATE["b.weight"])
    assert not (tmp_path / "weights").exists()


def test_fingerprint_depends_on_every_part():
    base = tensors_fingerprint(STATE, "arch", "1")
    assert base == tensors_fingerprint(dict(reversed(STATE.items())), "arch", "1")
    changed = {**STATE, "b.weight": STATE["b.weight"].clone()}
    changed["b.weight"][0, 0] = -0.0  # equal in value, not in bytes
    others = [
        tensors_fingerprint(changed, "arch", "1"),
        tensors_fingerprint({**STATE, "b.weight": STATE["b.weight"].reshape(3, 2)}, "arch", "1"),
        tensors_fingerprint({**STATE, "h": STATE["h"].view(torch.int16)}, "arch", "1"),
        tensors_fingerprint({("c" if name == "a" else name): t for name, t in STATE.items()}, "arch", "1"),
        tensors_fingerprint(STATE, "arch", "2"),
        tensors_fingerprint(STATE, "arch"),
    ]
    assert len({base, *others}) == 7


RESNET = find_architecture("torchvision:resnet18")


@pytest.fixture(scope="module")
def resnet_state():
    """As torchvision would publish it: with a classifier."""
    module, _ = build_architecture("torchvision:resnet18")
    return {**module.state_dict(), "fc.weight": torch.zeros(7, 512), "fc.bias": torch.zeros(7)}


def _load(state, architecture: Architecture = RESNET) -> nn.Module:
    module = architecture.build()
    load_tensors(module, state, architecture, "file:w.pth")
    return module


def test_classifier_of_any_size_is_left_out(resnet_state):
    loaded = _load(resnet_state).state_dict()
    assert all(torch.equal(loaded[name], resnet_state[name]) for name in loaded)


def test_old_files_that_do_not_count_batches(resnet_state):
    old = {name: tensor for name, tensor in resnet_state.items() if "num_batches" not in name}
    assert torch.equal(_load(old).conv1.weight, resnet_state["conv1.weight"])


def test_old_densenet_names():
    architecture = find_architecture("torchvision:densenet121")
    published = "features.denseblock1.denselayer1.norm.1.running_mean"
    assert architecture.own_name(published) == "features.denseblock1.denselayer1.norm1.running_mean"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("conv1.weight"), "missing: conv1.weight"),
        (lambda s: s.update({"extra.weight": torch.zeros(1)}), "unexpected: extra.weight"),
        (
            lambda s: s.update({"conv1.weight": torch.zeros(64, 1, 7, 7)}),
            r"wrong shape: conv1.weight \[64, 1, 7, 7\] instead of \[64, 3, 7, 7\]",
        ),
        (lambda s: [s.pop(n) for n in list(s) if n.startswith("layer1")], r"missing: (layer1\S+ ){3}and \d+ more"),
        (lambda s: s["conv1.weight"][0, 0, 0].fill_(float("nan")), "NaN or infinite values in tensor conv1.weight"),
        (lambda s: s["bn1.running_var"].fill_(float("inf")), "NaN or infinite values in tensor bn1.running_var"),
    ],
    ids=["missing", "unexpected", "shape", "many", "nan", "inf"],
)
def test_mismatches_are_named(change, message, resnet_state):
    state = {name: tensor.clone() for name, tensor in resnet_state.items()}
    change(state)
    with pytest.raises(SourceError, match=f"file:w.pth (does not fit torchvision:resnet18: |has ){message}"):
        _load(state)


def test_another_architectures_weights(resnet_state):
    with pytest.raises(
        SourceError, match=r"does not fit torchvision:resnet50: missing: layer1.*and \d+ more; .*wrong shape"
    ):
        _load(resnet_state, find_architecture("torchvision:resnet50"))
