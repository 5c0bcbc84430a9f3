"""Which sources a recipe gets: the catalog, finished runs, and everything it can name."""

import hashlib
import re
from dataclasses import replace
from importlib.resources import files

import pytest
import torch
import torchvision
from safetensors.torch import save_file

from headstart.trainer.backbones import weights
from headstart.trainer.backbones.architectures import build_architecture, find_architecture
from headstart.trainer.errors import RunError, SourceError
from headstart.trainer.selection.registry import register, registered_name
from headstart.trainer.selection.sources import (
    catalog,
    find_source,
    image_id,
    registered,
    resolve,
    survey,
)

MINE, OTHERS = "ab" * 32, "cd" * 32


def test_catalog_is_sound():
    cards = catalog()
    assert {"mobilenet-v2-imagenet", "english-g2", "resnet50-imagenet", "vit-b-16-imagenet"} <= set(cards)
    for name, card in cards.items():
        assert (files("headstart.trainer.catalog") / f"{name}.yaml").is_file()
        assert card.data_fingerprint == ""
        if not card.architecture.startswith("onnx:"):
            find_architecture(card.architecture).check(card.preprocessing)
    assert {card.licence for card in cards.values()} == {"MIT", "Apache-2.0", "BSD-3-Clause", "not stated"}


def test_torchvision_cards_resize_as_torchvision_does():
    for card in catalog().values():
        if card.weights.startswith("torchvision:"):
            transforms = torchvision.models.get_weight(card.weights.removeprefix("torchvision:")).transforms()
            found = (
                card.preprocessing.resize,
                card.preprocessing.crop,
                card.preprocessing.mean,
                card.preprocessing.std,
            )
            assert found == (
                *transforms.resize_size,
                *transforms.crop_size,
                tuple(transforms.mean),
                tuple(transforms.std),
            )
    assert (catalog()["resnet50-imagenet"].preprocessing.resize, catalog()["resnet50-imagenet"].preprocessing.crop) == (
        256,
        224,
    )


def test_all_leaves_out_what_was_made_from_the_same_data(finished, tmp_path):
    cache = tmp_path / "cache"
    register(finished("mine", data=MINE) / "source", cache)
    register(finished("others", data=OTHERS) / "source", cache)
    names = [candidate.card.name for candidate in survey("all", cache, exclude_data=MINE)[0]]
    assert names == [*catalog(), "others"]
    assert [c.card.name for c in resolve("all", cache)] == [*catalog(), "mine", "others"]
    with pytest.raises(SourceError, match="source mine was made from this run's own data; take it out"):
        survey(("mine",), cache, exclude_data=MINE)


IMAGES = [hashlib.sha256(bytes([i])).hexdigest() for i in range(20)]


def test_what_learned_from_an_image_that_a_run_judges_by_is_left_out_with_the_reason(finished, tmp_path):
    cache = tmp_path / "cache"
    run = finished("flattered", seen=IMAGES[:10])
    register(run / "source", cache)
    register(finished("of-an-earlier-version") / "source", cache)
    candidates, passed_over = survey("all", cache, judged_on=IMAGES[8:])
    assert [c.card.name for c in candidates] == [*catalog(), "of-an-earlier-version"]
    assert "flattered" in survey("all", cache, judged_on=IMAGES[9:])[1]  # by a single image too
    told = "has learned from 2 of the 12 images that this run validates and tests on, which would flatter it"
    assert passed_over == {"flattered": f"it {told}"}
    for spec in ("flattered", f"source:{run}"):
        with pytest.raises(SourceError, match=f"source {spec} {told}; take it out of `sources`"):
            survey((spec,), cache, judged_on=IMAGES[8:])
    for judged_on in (IMAGES[10:], ()):
        candidates, passed_over = survey("all", cache, judged_on=judged_on)
        assert "flattered" in [c.card.name for c in candidates]
        assert passed_over == {}


def test_what_others_learned_from_is_not_known(finished, tmp_path):
    (catalogued, old, new) = (
        resolve((spec,), tmp_path)[0]
        for spec in ("mtcnn-onet", f"source:{finished('old')}", f"source:{finished('new', seen=IMAGES)}")
    )
    assert catalogued.seen() is None
    assert old.seen() is None
    assert new.seen() == frozenset(map(image_id, IMAGES))


def cut(path, share):
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])


DAMAGE = {
    "list of images cut": (lambda entry: cut(entry / "seen.bin", 0.5), "is not the file that its card names"),
    "list of images gone": (lambda entry: (entry / "seen.bin").unlink(), "seen.bin cannot be read"),
    "sketch cut": (lambda entry: cut(entry / "sketch.safetensors", 0.9), "is no sketch"),
    "sketch cut in its header": (lambda entry: cut(entry / "sketch.safetensors", 0.1), "is no sketch"),
    "sketch empty": (lambda entry: cut(entry / "sketch.safetensors", 0), "is no sketch"),
    "card cut": (lambda entry: cut(entry / "card.yaml", 0.5), "cannot be used"),
    "card empty": (lambda entry: cut(entry / "card.yaml", 0), "cannot be used"),
    "card no YAML": (lambda entry: (entry / "card.yaml").write_text("a: [b"), "cannot be used"),
    "card of another": (
        lambda entry: (entry / "card.yaml").write_bytes((entry.parent / "whole" / "card.yaml").read_bytes()),
        "broken has the card of whole; give it that name",
    ),
    "card not UTF-8": (lambda entry: (entry / "card.yaml").write_bytes(b"name: \xff"), "cannot be read: .*; remove"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_entry_is_passed_over_with_all_and_refused_by_name(damage, message, finished, tmp_path):
    cache = tmp_path / "cache"
    for name in ("broken", "whole"):
        register(finished(name, seen=IMAGES) / "source", cache)
    damage(cache / "sources" / "broken")
    candidates, passed_over = survey("all", cache)
    assert [c.card.name for c in candidates] == [*catalog(), "whole"] == [c.card.name for c in resolve("all", cache)]
    assert list(passed_over) == ["broken"]
    assert re.search(message, passed_over["broken"])
    assert find_source("whole", "all", cache).card.name == "whole"
    with pytest.raises(SourceError, match=message):
        resolve(("broken",), cache)
    with pytest.raises(SourceError, match="did you mean broken"):
        resolve(("brokenn",), cache)


@pytest.mark.parametrize("closed", [".aa", "aa/card.yaml", "aa/sketch.safetensors", "aa/seen.bin"])
@pytest.mark.usefixtures("unprivileged")
def test_an_entry_that_another_user_keeps_closed_is_passed_over_alone(closed, finished, tmp_path):
    cache = tmp_path / "cache"
    for name in ("aa", "bb"):
        register(finished(name, seen=IMAGES) / "source", cache)
    path = cache / "sources" / closed
    path.chmod(0)
    try:
        candidates, passed_over = survey("all", cache, judged_on=["12" * 32])
        assert [c.card.name for c in candidates] == [*catalog(), "bb"]
        assert re.search(f"{path.name.removeprefix('.')}.* cannot be read.*chmod", passed_over.pop("aa"))
        assert not passed_over
        assert closed != ".aa" or registered_name("aa", OTHERS, cache) == "aa-cdcdcdcd"
        with pytest.raises(SourceError, match=r"cannot be read.*chmod"):
            survey(("aa",), cache, judged_on=["12" * 32])
    finally:
        path.chmod(0o700)


@pytest.mark.usefixtures("unprivileged")
def test_weights_that_another_user_keeps_closed_make_a_source_unavailable(finished, tmp_path):
    entry = register(finished("aa") / "source", tmp_path)
    (entry / "weights.safetensors").chmod(0)
    (candidate,) = resolve(("aa",), tmp_path)
    with pytest.raises(SourceError, match=r"source aa cannot be used: .*weights\.safetensors.*chmod"):
        candidate.load(tmp_path)


@pytest.mark.usefixtures("unprivileged")
def test_a_closed_list_of_sources_is_told_and_not_taken_for_an_empty_one(tmp_path):
    (tmp_path / "sources").mkdir(mode=0o300)
    with pytest.raises(RunError, match=r"cannot list the sources in .*chmod"):
        registered(tmp_path)


def test_earlier_runs_by_path(finished, tmp_path):
    run = finished("mine")
    for spec in (f"source:{run}", f"source:{run}/source"):
        (candidate,) = resolve((spec,), tmp_path)
        assert candidate.card.name == "mine"
        assert candidate.load(tmp_path).fingerprint
    with pytest.raises(SourceError, match=r"has no card.yaml"):
        resolve((f"source:{tmp_path}",), tmp_path)


def test_candidates_fingerprint_follows_weights_and_sketch(finished, tmp_path):
    def found(run) -> str:
        return resolve((f"source:{run}",), tmp_path)[0].fingerprint

    run = finished("mine")
    assert found(run) == found(finished("mine"))  # written again, the same content
    assert found(run) != found(finished("mine", seed=1))
    before = found(run)
    (run / "source" / "sketch.safetensors").unlink()
    assert found(run) != before


def test_user_files(tmp_path):
    module, _ = build_architecture("torchvision:squeezenet1_1")
    save_file(module.state_dict(), tmp_path / "my weights.safetensors")
    spec = f"file:{tmp_path}/my weights.safetensors#squeezenet1_1"
    (candidate,) = resolve((spec, spec), tmp_path)
    card = candidate.card
    assert card.name == f"my-weights-{card.sha256[:8]}"
    assert (card.preprocessing.resize, card.preprocessing.crop, card.licence) == (256, 224, "not stated")
    assert candidate.load(tmp_path).num_features == 512
    assert find_source(card.name, (f"file:{tmp_path}/gone.onnx", spec), tmp_path).card == card
    with pytest.raises(SourceError, match="does not name its architecture; accepted: file:PATH#ARCH"):
        resolve((f"file:{tmp_path}/my weights.safetensors",), tmp_path)
    with pytest.raises(SourceError, match="no weights file"):
        resolve((f"file:{tmp_path}/none.pth#resnet18",), tmp_path)


def test_tensors_of_one_graph_are_sources_of_their_own(tmp_path):
    (tmp_path / "g.onnx").write_bytes(b"graph")
    found = resolve(tuple(f"onnx:{tmp_path}/g.onnx{tensor}" for tensor in ("", "#/a/Relu", "#/b/Relu")), tmp_path)
    assert [c.card.name for c in found] == [
        f"g-{found[0].card.sha256[:8]}{tensor}" for tensor in ("", "-a-Relu", "-b-Relu")
    ]


def test_two_sources_of_one_name_are_refused(tmp_path):
    (tmp_path / "w.pth").write_bytes(b"weights")
    specs = tuple(f"file:{tmp_path}/w.pth#{architecture}" for architecture in ("resnet18", "resnet34"))
    with pytest.raises(SourceError, match=r"resnet18 and .*resnet34 are both called w-.*; take one out of `sources`"):
        resolve(specs, tmp_path)


def test_packaged_architecture_brings_its_own_constants(tmp_path):
    (tmp_path / "w.pth").write_bytes(b"")
    (candidate,) = resolve((f"file:{tmp_path}/w.pth#headstart:english-g2",), tmp_path)
    assert candidate.card.preprocessing == catalog()["english-g2"].preprocessing


def test_torchvision_by_name(tmp_path):
    (candidate,) = resolve(("torchvision:resnet50",), tmp_path)
    assert candidate.card.weights == "torchvision:ResNet50_Weights.IMAGENET1K_V2"
    assert (candidate.card.preprocessing.resize, candidate.card.sha256) == (232, "11ad3fa6")
    assert candidate.card.name == "torchvision-resnet50"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("english-g3", "no source 'english-g3'; did you mean english-g2"),
        ("????", r"accepted: .*mtcnn-onet.*also accepted: torchvision:ARCH, file:PATH#ARCH"),
        ("torchvision:resnt50", "did you mean torchvision:resnet50"),
        ("onnx:/nowhere.onnx", "no weights file /nowhere.onnx"),
        ("../catalog", "no source '../catalog'"),
    ],
)
def test_unknown_sources(spec, message, tmp_path):
    with pytest.raises(SourceError, match=message):
        resolve((spec,), tmp_path)


def test_of_many_sources_the_first_are_named(tmp_path):
    for number in range(300):
        (tmp_path / "sources" / f"mine-{number}").mkdir(parents=True)
        (tmp_path / "sources" / f"mine-{number}" / "card.yaml").touch()
    with pytest.raises(SourceError, match=rf"accepted: .*mtcnn-onet.*\({300 + len(catalog())} in all\)") as told:
        resolve(("????",), tmp_path)
    assert len(str(told.value)) < 1000


def test_a_host_that_does_not_answer_is_asked_once(tmp_path, monkeypatch):
    asked = []

    def no_answer(url, timeout):
        asked.append(url)
        raise OSError("Name or service not known")

    monkeypatch.setattr(weights.urllib.request, "urlopen", no_answer)
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path / "hub"))
    reasons = []
    for candidate in resolve("all", tmp_path):
        if candidate.card.weights.startswith("torchvision:"):
            with pytest.raises(SourceError, match=f"source {candidate.card.name} cannot be used: https://") as caught:
                candidate.load(tmp_path)
            reasons.append(str(caught.value))
    assert len(reasons) >= 7
    assert len(asked) == 1
    assert all("does not answer" in reason and f"put the file at {tmp_path}" in reason for reason in reasons)


def test_weights_on_disk_are_used_without_a_network(tmp_path, monkeypatch):
    """Made here and put where the message says; the card's digits are changed to the file's."""
    monkeypatch.setattr(weights.urllib.request, "urlopen", None)
    (candidate,) = resolve(("torchvision:squeezenet1_1",), tmp_path)
    module = torchvision.models.squeezenet1_1()
    (tmp_path / "weights").mkdir()
    path = tmp_path / "weights" / f"squeezenet1_1-{candidate.card.sha256}.pth"
    torch.save(module.state_dict(), path)
    card = replace(candidate.card, sha256=weights.file_sha256(path)[:8])
    assert replace(candidate, card=card, unreachable={"download.pytorch.org"}).load(tmp_path).num_features == 512


def test_a_run_by_its_name_and_by_its_path_is_one_source_too_many(finished, tmp_path):
    run = finished("mine")
    register(run / "source", tmp_path)
    with pytest.raises(SourceError, match=rf"mine and source:{run} are both called mine"):
        resolve(("mine", f"source:{run}"), tmp_path)
    assert len(resolve(("mine", "mine"), tmp_path)) == 1
