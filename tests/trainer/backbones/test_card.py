"""A card and its YAML say the same; what is not a card is refused by key."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headstart.trainer.backbones.card import SourceCard, card_from_yaml, card_to_yaml
from headstart.trainer.errors import SourceError
from headstart.trainer.inputs.preprocessing import Preprocessing

GOOD = """
name: x
task: something
architecture: torchvision:resnet18
weights: file:/somewhere/x.pth
sha256: '{digest}'
preprocessing: {{resize: 256, crop: 224, mean: [0, 0.5, 1], std: [1, 1, 1]}}
""".format(digest="0e" * 32)

_line = st.text(st.characters(exclude_categories=("C", "Z")), min_size=1).map(lambda text: f"x {text}")
_number = st.floats(0.001, 10)


@given(
    name=st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,199}", fullmatch=True),
    task=_line,
    licence=_line,
    notes=st.text(st.characters(exclude_categories=("C",))),
    classes=st.lists(_line | st.sampled_from(["1", "no", "null", "1e3", "2020-01-01", "~"]), max_size=4),
    digest=st.text("0123456789abcdef", min_size=64, max_size=64) | st.just("1" * 64),
    mean=st.tuples(_number, _number, _number),
    grey=st.booleans(),
)
def test_round_trip(name, task, licence, notes, classes, digest, mean, grey):
    constants = mean[:1] if grey else mean
    card = SourceCard(
        name=name, task=task, licence=licence, notes=notes, classes=tuple(classes), sha256=digest,
        architecture="headstart:english-g2", weights="weights.safetensors", data_fingerprint=digest,
        preprocessing=Preprocessing(resize=9, crop=8, channels=1 if grey else 3, mean=constants, std=constants),
    )  # fmt: skip
    assert card_from_yaml(card_to_yaml(card), "test") == card


def test_defaults():
    card = card_from_yaml(GOOD, "x.yaml")
    assert (card.licence, card.classes, card.data_fingerprint) == ("not stated", (), "")
    assert card.preprocessing.mean == (0.0, 0.5, 1.0)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("name: x", "nam: x", "unknown key nam; did you mean name"),
        ("crop: 224", "corp: 224", "unknown key preprocessing.corp; did you mean preprocessing.crop"),
        ("name: x", "zzz: x", "unknown key zzz; accepted: name, task"),
        ("task: something\n", "", "task is missing"),
        ("crop: 224, ", "", "preprocessing.crop is missing"),
        ("crop: 224", "crop: 300", r"preprocessing.crop is 300; accepted: 1 up to resize \(256\)"),
        ("crop: 224", "crop: true", "preprocessing.crop is True; accepted: a whole number"),
        ("mean: [0, 0.5, 1]", "mean: 0.5", "preprocessing.mean is 0.5; accepted: a list of numbers"),
        ("mean: [0, 0.5, 1]", "mean: [0, a, 1]", "preprocessing.mean is .*; accepted: a list of numbers"),
        ("task: something", "task: 12", "task is 12; accepted: text"),
        ("task: something", "task: ' '", "task is ' '; accepted: one line of text"),
        ("sha256: '0e", "sha256: 'Xe", "sha256 is 'Xe.*64 hexadecimal digits"),
        ("sha256: '0e0e", "sha256: '", "sha256 is .*64 hexadecimal digits"),
        ("name: x", "classes: [1, 2]\nname: x", r"classes is \[1, 2\]; accepted: a list of text"),
        ("name: x", "name: [", "while parsing"),
        ("name: x", "name: ../../x", "name is '../../x'; accepted: up to 200 letters"),
        ("name: x", "name: ..", "name is '..'; accepted"),
        ("name: x", "name: team/model", "name is 'team/model'; accepted"),
    ],
)
def test_refusals_name_the_key(old, new, message):
    assert old in GOOD
    with pytest.raises(SourceError, match=f"source card x.yaml cannot be used: (?s:.*){message}"[: -0 or None]):
        card_from_yaml(GOOD.replace(old, new), "x.yaml")


@pytest.mark.parametrize("text", ["", "- a", "just text"])
def test_not_a_mapping(text):
    with pytest.raises(SourceError, match="accepted: a mapping"):
        card_from_yaml(text, "x.yaml")
