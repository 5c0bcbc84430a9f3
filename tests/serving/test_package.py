"""A package is whole, unchanged and proven, or it is refused; and it is written whole or not at all."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headstart.serving import package as package_module
from headstart.serving.errors import PackageError
from headstart.serving.manifest import MANIFEST, MOST_TOLERANCE, Drift, Manifest, Variant, load_manifest
from headstart.serving.package import MODEL, SIGNATURE, digest, new_package, verify
from headstart.serving.runtime import Predictor
from headstart.serving.variants import PARITY_TOLERANCES


def edit(package: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    document = json.loads((package / MANIFEST).read_text())
    change(document)
    (package / MANIFEST).write_text(json.dumps(document))


def test_a_sound_package_is_read_as_it_was_written(pristine: Path):
    manifest = verify(pristine)
    assert isinstance(manifest, Manifest)
    assert manifest == load_manifest(pristine)
    assert manifest.to_json() == (pristine / MANIFEST).read_text()
    assert manifest.files == {MODEL: digest(pristine / MODEL)}


@pytest.mark.parametrize("position", [0, 0.5, 0.999], ids=["first", "middle", "last"])
def test_one_changed_bit_is_refused(package: Path, position: float):
    content = bytearray((package / MODEL).read_bytes())
    content[int(position * len(content))] ^= 1
    (package / MODEL).write_bytes(content)
    with pytest.raises(PackageError, match=r"model\.onnx was changed.*headstart export"):
        verify(package)


def set_row(row: int, **values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda document: document["parity"]["rows"][row].update(values)


WRONG: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "newer schema": (lambda d: d.update(schema=3), "schema 3.*newer headstart"),
    "no schema": (lambda d: d.pop("schema"), "manifest.schema is missing"),
    "schema 0": (lambda d: d.update(schema=0), "schema is 0"),
    "unknown key": (lambda d: d.update(extra=1), "manifest.extra is not known"),
    "key of two lines": (lambda d: d.update({"a\nb\x1b": 1}), r"manifest\.a\\nb\\x1b is not known"),
    "missing key": (lambda d: d.pop("labels"), "manifest.labels is missing"),
    "wrong type": (lambda d: d.update(temperature="warm"), "manifest.temperature is 'warm'; accepted: float"),
    "boolean number": (lambda d: d.update(temperature=True), "manifest.temperature is True; accepted: float"),
    "beyond any float": (lambda d: d.update(temperature=10**400), "is damaged: .*too large"),
    "beyond 64 bits": (lambda d: d["provenance"].update(seed=1 << 64), "number 18446744073709551616 is too large"),
    "deep": (lambda d: d["provenance"].update(x=json.loads("[" * 700 + "]" * 700)), "nested more than 32 deep"),
    "no text": (lambda d: d["labels"].append("\ud800"), "is damaged: .*surrogates not allowed"),
    "no text as a key": (lambda d: d["provenance"].update({"\ud800": 1}), "is damaged: .*surrogates not allowed"),
    "timed with a huge image": (
        lambda d: d["latency"].update(shape=[1, 40_000, 40_000, 3]),
        r"latency record does not hold: its shape is \(1, 40000, 40000, 3\); accepted: images",
    ),
    "timed with no image": (lambda d: d["latency"].update(shape=[1, -2, -2, 3]), "latency record does not hold"),
    "timed with a row": (lambda d: d["latency"].update(shape=[3]), "latency record does not hold"),
    "boolean": (set_row(0, num_disagreements=False), "num_disagreements is False; accepted: int"),
    "nested type": (lambda d: d["inputs"][0].update(shape=[None]), r"inputs\[0\].shape\[0\] is None"),
    "not an object": (lambda d: d.update(latency=[]), "manifest.latency"),
    "temperature": (lambda d: d.update(temperature=0), "temperature is 0"),
    "labels": (lambda d: d["labels"].append(d["labels"][0]), "not distinct"),
    "no model": (lambda d: d["files"].clear(), "does not list model.onnx"),
    "last digit": (lambda d: d["files"].update({MODEL: d["files"][MODEL][:-1] + "x"}), "was changed"),
    "lost file": (lambda d: d["files"].update({"model.onnx.data": "0" * 64}), "lacks model.onnx.data"),
    "parent": (lambda d: d["files"].update({"../model.onnx": "0" * 64}), "leads out"),
    "absolute": (lambda d: d["files"].update({"/etc/hostname": "0" * 64}), "leads out"),
    "backslash": (lambda d: d["files"].update({"..\\model.onnx": "0" * 64}), "leads out"),
    "dots": (lambda d: d["files"].update({"a/../model.onnx": "0" * 64}), "leads out"),
    "difference": (set_row(1, relative_difference=2e-3), "does not hold: at batch 2"),
    "difference below zero": (set_row(0, relative_difference=-1), "at batch 1 the logits differ by -1"),
    "absolute difference below zero": (set_row(0, difference=-5), "at batch 1 its difference is -5"),
    "agreement below zero": (set_row(0, top1_agreement=-3), "share of agreement -3"),
    "agreement above one": (set_row(0, top1_agreement=1.5), "share of agreement 1.5"),
    "wide tolerance": (
        lambda d: d["parity"].update(tolerance=1e300),
        "tolerance is 1e.300; accepted: above 0, up to 0.5",
    ),
    "batch without images": (
        lambda d: d["parity"]["rows"].append({**d["parity"]["rows"][0], "batch": 4096, "num_images": 0}),
        "batch 4096 was compared on 0 images",
    ),
    "batch of none": (
        lambda d: d["parity"]["rows"].append({**d["parity"]["rows"][0], "batch": 0}),
        "batch 0 was compared on 8 images",
    ),
    "class": (set_row(2, num_disagreements=1), "batch 16 1 of 16 images"),
    "no batch 16": (lambda d: d["parity"]["rows"].pop(), "batch 16 was not compared"),
    "too few images": (set_row(2, num_images=3), "batch 16 was not compared"),
    "no tolerance": (lambda d: d["parity"].update(tolerance=0), "tolerance is 0"),
    "on another provider": (
        lambda d: d["provider_parity"].append({**d["parity"], "provider": "CUDA", "tolerance": 0}),
        "parity on CUDA does not hold",
    ),
    "drift": (
        lambda d: d.update(drift={"output": "features", "mean": [0.5], "spread": 0, "num_images": 9}),
        "drift record does not hold: its spread is 0",
    ),
    "drift of nothing": (
        lambda d: d.update(drift={"output": "features", "mean": [], "spread": 1, "num_images": 9}),
        "drift record does not hold",
    ),
    "drift without images": (
        lambda d: d.update(drift={"output": "features", "mean": [0.5], "spread": 1, "num_images": 0}),
        "drift record does not hold: .* 1 means of 0 images",
    ),
    "drift of the logits": (
        lambda d: d.update(drift={"output": "logits", "mean": [0.5], "spread": 1, "num_images": 9}),
        "drift record does not hold: its output is 'logits'",
    ),
    "schema 1 with more": (lambda d: d.update(schema=1), "manifest.drift is not known to schema 1"),
    "nan": (set_row(0, relative_difference=float("nan")), "NaN"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_manifest_that_cannot_be_is_refused(package: Path, name: str):
    change, reason = WRONG[name]
    edit(package, change)
    with pytest.raises(PackageError, match=reason):
        verify(package)


LONG = "x" * 1_000_000
LENGTHY: dict[str, Callable[[dict[str, Any]], Any]] = {
    "unknown key": lambda d: d.update({LONG: 1}),
    "text": lambda d: d.update(temperature=LONG),
    "list": lambda d: d.update(provenance=[LONG]),
    "key of a list": lambda d: d["files"].update({LONG: 1}),
    "labels": lambda d: d.update(labels=[LONG, LONG]),
    "file": lambda d: d["files"].update({f"../{LONG}": "0"}),
    "absent file": lambda d: d["files"].update({LONG: "0"}),
    "digest": lambda d: d["files"].update({MODEL: LONG}),
    "variant": lambda d: d["variant"].update(name=LONG),
    "drift": lambda d: d.update(drift={"output": LONG, "mean": [0.5], "spread": 1, "num_images": 9}),
    "provider": lambda d: d["parity"].update(provider=LONG, tolerance=0),
}


@pytest.mark.parametrize("name", LENGTHY)
def test_a_reason_has_no_more_of_a_manifest_than_a_reader_takes_in(package: Path, name: str):
    edit(package, LENGTHY[name])
    with pytest.raises(PackageError, match="xxx") as caught:
        verify(package)
    assert len(str(caught.value).replace(str(package), "")) < 600


@pytest.mark.parametrize("number", ["1e999", "-1e999"])
def test_a_number_that_json_has_and_no_float_is_refused(package: Path, number: str):
    """It would be read as an infinity, which JSON cannot say again."""
    edit(package, lambda document: document["provenance"].update(x="NUMBER"))
    text = (package / MANIFEST).read_text().replace('"NUMBER"', number)
    (package / MANIFEST).write_text(text)
    with pytest.raises(PackageError, match="is damaged: a number is too large"):
        load_manifest(package)


def test_numbers_that_json_does_not_say_do_not_hold_either(pristine: Path):
    parity = load_manifest(pristine).parity
    row = replace(parity.rows[0], relative_difference=math.nan)
    assert "the logits differ by nan" in replace(parity, rows=(row, *parity.rows[1:])).failure()
    assert Drift(mean=(math.inf,), spread=1.0, num_images=9).failure()
    assert "its spread is inf" in Drift(mean=(0.5,), spread=math.inf, num_images=9).failure()


def test_a_variant_may_lose_just_as_much_as_it_says():
    """0.7 is 0.1 less than 0.8 in shares of images, and not in binary."""
    variant = Variant(name="int8", accuracy=0.7, fp32_accuracy=0.8, max_loss=0.1, num_images=10)
    assert variant.failure() == ""
    assert "more than 0.1 is lost" in replace(variant, accuracy=0.69).failure()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"accuracy": -5.0}, "its accuracies are -5.0 and, of fp32, 0.8; accepted: shares"),
        ({"fp32_accuracy": 9.0}, "its accuracies are 0.8 and, of fp32, 9.0; accepted: shares"),
        ({"accuracy": math.nan}, "its accuracies are nan"),
        ({"accuracy": 0.0, "max_loss": 1.0}, "its max_loss is 1; accepted: 0 up to 1"),
        ({"max_loss": math.inf}, "its max_loss is inf"),
        ({"max_loss": -0.1}, "its max_loss is -0.1"),
        ({"num_images": 0}, "int8 was not compared with fp32"),
        ({"num_images": -1}, "it has -1 validation"),
        ({"calibration_images": -3}, "-3 calibration images"),
    ],
)
def test_a_record_of_accuracy_that_cannot_be_does_not_hold(change: dict[str, Any], reason: str):
    variant = Variant(name="int8", accuracy=0.8, fp32_accuracy=0.8, max_loss=0.0, num_images=10, calibration_images=9)
    assert variant.failure() == ""
    assert reason in replace(variant, **change).failure()


def test_the_widest_tolerance_is_one_that_is_written():
    assert max(PARITY_TOLERANCES.values()) == MOST_TOLERANCE


def test_a_package_of_schema_1_is_what_it_was(package: Path):
    """It says nothing of variants, of other providers and of drift."""

    def older(document: dict[str, Any]) -> None:
        document["schema"] = 1
        for name in ("variant", "provider_parity", "drift"):
            del document[name]

    now = verify(package)
    edit(package, older)
    assert verify(package) == replace(now, schema=1)
    assert verify(package).variant == Variant(name="fp32")
    image = np.zeros((1, 40, 48, 3), np.uint8)
    assert Predictor(package).predict(image)[0].shape == (1, 5)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000], ids=repr)
def test_a_manifest_that_is_no_json_object_is_refused(package: Path, content: bytes):
    (package / MANIFEST).write_bytes(content)
    with pytest.raises(PackageError, match=MANIFEST):
        verify(package)


def test_a_manifest_that_cannot_be_read_is_refused(package: Path):
    (package / MANIFEST).unlink()
    (package / MANIFEST).mkdir()
    with pytest.raises(PackageError, match=r"manifest\.json cannot be read .*headstart export"):
        verify(package)


@pytest.mark.timeout(30)
@pytest.mark.parametrize("make", ["fifo", "link", "endless"])
def test_a_manifest_that_is_no_plain_file_is_refused_unread(package: Path, tmp_path: Path, make: str):
    path = package / MANIFEST
    path.rename(tmp_path / "elsewhere")
    if make == "fifo":
        os.mkfifo(path)
    elif make == "link":
        path.symlink_to(tmp_path / "elsewhere")
    else:
        with path.open("wb") as file:
            file.truncate(1 << 40)
    with pytest.raises(PackageError, match=r"manifest\.json cannot be read \(it (is a link|has more than 16777216 b)"):
        load_manifest(package)


def test_missing_extra_and_linked_files_are_refused(package: Path, tmp_path: Path):
    (package / "notes.txt").write_text("mine")
    with pytest.raises(PackageError, match=r"holds notes\.txt"):
        verify(package)
    (package / "notes.txt").unlink()
    for name in (MANIFEST, SIGNATURE):
        (package / "more").mkdir()
        (package / "more" / name).write_text("{}")
        with pytest.raises(PackageError, match=f"holds more/{name}"):
            verify(package)
        shutil.rmtree(package / "more")
    (package / MODEL).rename(tmp_path / MODEL)
    with pytest.raises(PackageError, match=r"lacks model\.onnx"):
        verify(package)
    (package / MODEL).symlink_to(tmp_path / MODEL)
    with pytest.raises(PackageError, match="is a link"):
        verify(package)


@pytest.mark.parametrize("name", ["manifest.json", "./package.sig"])
def test_a_graph_that_names_a_file_without_a_digest_is_refused(
    package: Path, monkeypatch: pytest.MonkeyPatch, name: str
):
    for start in range(20):  # wherever a block of the file ends
        content = b"." * start + name.encode() + b"...."
        (package / MODEL).write_bytes(content)
        edit(package, lambda document: document["files"].update({MODEL: digest(package / MODEL)}))
        for block in (3, 16, 1 << 20):
            monkeypatch.setattr(package_module, "_BLOCK", block)
            with pytest.raises(PackageError, match=f"model.onnx names {Path(name).name}, which no digest covers"):
                verify(package)


def test_what_is_no_package_is_refused(tmp_path: Path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "absent", tmp_path / "file"):
        with pytest.raises(PackageError, match=r"no package.*headstart export"):
            verify(path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, item in inner for place in places(item, (*path, key)))]


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_manifest_is_read_or_refused(pristine: Path, tmp_path_factory: pytest.TempPathFactory, data: Any):
    document = json.loads((pristine / MANIFEST).read_text())
    place = data.draw(st.sampled_from(places(document)[1:]))
    inner = document
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = data.draw(JSON)
    folder = tmp_path_factory.getbasetemp() / "mutated"
    folder.mkdir(exist_ok=True)
    (folder / MANIFEST).write_text(json.dumps(document))
    (folder / MODEL).write_bytes((pristine / MODEL).read_bytes())
    try:
        manifest = verify(folder)
    except PackageError:
        return
    assert load_manifest(folder) == manifest


def fill(folder: Path, package: Path) -> None:
    for name in (MODEL, MANIFEST):
        (folder / name).write_bytes((package / name).read_bytes())


def test_a_new_package_takes_the_place_of_the_earlier_one(package: Path, pristine: Path):
    edit(package, lambda document: document.update(name="earlier"))
    with new_package(package) as folder:
        fill(folder, pristine)
        assert verify(package).name == "earlier"
    assert verify(package).name == "small"
    assert sorted(path.name for path in package.parent.iterdir()) == ["package"]


def test_a_package_that_does_not_verify_leaves_the_earlier_one(package: Path):
    before = (package / MANIFEST).read_bytes()

    def write() -> None:
        with new_package(package) as folder:
            fill(folder, package)
            (folder / MODEL).write_bytes(b"half")

    with pytest.raises(PackageError, match="was changed"):
        write()
    assert (package / MANIFEST).read_bytes() == before
    verify(package)
    assert sorted(path.name for path in package.parent.iterdir()) == ["package"]


def test_a_package_that_cannot_take_its_place_leaves_the_earlier_one(
    package: Path, pristine: Path, monkeypatch: pytest.MonkeyPatch
):
    def rename(path: Path, target: Path, real: Callable[..., Path] = Path.rename) -> Path:
        if path.name.endswith(".partial"):
            raise OSError("not now")
        return real(path, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(OSError, match="not now"), new_package(package) as folder:
        fill(folder, pristine)
    verify(package)
    assert sorted(path.name for path in package.parent.iterdir()) == ["package"]


KILLED = """
import os, signal, sys
from pathlib import Path
from headstart.serving import package
directory, where = Path(sys.argv[1]), sys.argv[2]
kill = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
content = {name: (directory / name).read_bytes() for name in ("model.onnx", "manifest.json")}
def rename(path, target, real=Path.rename):
    result = real(path, target)
    if where == "between the renames":
        kill()
    return result
Path.rename = rename
with package.new_package(directory) as folder:
    (folder / "model.onnx").write_bytes(content["model.onnx"])
    if where == "half written":
        kill()
    (folder / "manifest.json").write_bytes(content["manifest.json"])
    if where == "written":
        kill()
"""


@pytest.mark.parametrize("where", ["half written", "written", "between the renames"])
def test_a_killed_writer_never_leaves_half_a_package(package: Path, pristine: Path, where: str):
    done = subprocess.run([sys.executable, "-c", KILLED, str(package), where], check=False)
    assert done.returncode == -signal.SIGKILL
    if package.exists():
        verify(package)
    else:
        assert where == "between the renames"
    with new_package(package) as folder:
        verify(package)  # the earlier one is back before anything is written
        fill(folder, pristine)
    verify(package)
    assert sorted(path.name for path in package.parent.iterdir()) == ["package"]


def test_other_peoples_folders_are_not_replaced(tmp_path: Path, pristine: Path):
    thesis = tmp_path / "thesis"
    thesis.mkdir()
    with new_package(thesis) as folder:  # an empty folder may be
        fill(folder, pristine)
    for path in (tmp_path / "notes", tmp_path / "notes" / "file"):
        (tmp_path / "notes").mkdir(exist_ok=True)
        (tmp_path / "notes" / "file").write_text("mine")
        with pytest.raises(PackageError, match="not a package"), new_package(path):
            pytest.fail("a folder was given")
    assert (tmp_path / "notes" / "file").read_text() == "mine"
    assert os.listdir(tmp_path / "notes") == ["file"]  # noqa: PTH208 (hidden leftovers count)
