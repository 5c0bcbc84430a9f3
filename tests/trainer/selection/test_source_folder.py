"""What a run writes into `source/` comes back bit for bit; a sketch of another probe does not."""

import hashlib
from dataclasses import replace

import pytest
import torch

from headstart.trainer.backbones.architectures import build_architecture
from headstart.trainer.backbones.backbone import load_backbone
from headstart.trainer.errors import RunError, SourceError
from headstart.trainer.selection import source_folder
from headstart.trainer.selection.source_folder import (
    Sketch,
    image_id,
    read_card,
    read_head,
    read_seen,
    read_sketch,
    write_source,
)
from headstart.trainer.selection.sources import catalog

HEAD = {"weight": torch.randn(4, 1152), "bias": torch.randn(4)}


def sketch(n: int = 5, d: int = 3, **changes) -> Sketch:
    torch.manual_seed(n)
    return Sketch(
        **{
            "features": torch.randn(n, d),
            "labels": torch.arange(n),
            "mean": torch.randn(d),
            "probe": "ab" * 32,
            **changes,
        }
    )


def card(**changes):
    return replace(
        catalog()["mtcnn-onet"], name="mine", classes=("a", "b", "c", "d"), data_fingerprint="cd" * 32, **changes
    )


def test_round_trip(tmp_path, cache):
    module, _ = build_architecture("headstart:mtcnn-onet")
    written = write_source(tmp_path / "source", card(), module.state_dict(), HEAD, sketch())
    assert {path.name for path in (tmp_path / "source").iterdir()} == {
        "card.yaml",
        "weights.safetensors",
        "sketch.safetensors",
    }
    assert read_card(tmp_path / "source") == written
    assert written == card(weights="weights.safetensors", sha256=written.sha256)
    backbone = load_backbone(written, cache, base=tmp_path / "source")
    assert backbone.module is not None
    assert all(torch.equal(t, module.state_dict()[n]) for n, t in backbone.module.state_dict().items())
    head = read_head(tmp_path / "source")
    assert head.keys() == HEAD.keys()
    assert all(torch.equal(head[n], HEAD[n]) for n in HEAD)
    found = read_sketch(tmp_path / "source", probe="ab" * 32)
    assert found is not None
    assert torch.equal(found.features, sketch().features)
    assert torch.equal(found.labels, sketch().labels)
    assert torch.equal(found.mean, sketch().mean)
    assert (found.probe, found.precision, found.centre) == ("ab" * 32, "float32", "origin")


def test_graph_keeps_its_own_weights(tmp_path, cache):
    original = replace(catalog()["document-orientation"], name="mine")
    written = write_source(tmp_path, original, None, HEAD, sketch())
    assert written == original == read_card(tmp_path)
    assert load_backbone(written, cache, base=tmp_path).graph is not None
    assert torch.equal(read_head(tmp_path)["bias"], HEAD["bias"])


def test_changed_weights_are_refused(tmp_path, cache):
    module, _ = build_architecture("headstart:mtcnn-onet")
    written = write_source(tmp_path, card(), module.state_dict(), HEAD, sketch())
    path = tmp_path / "weights.safetensors"
    path.write_bytes(path.read_bytes()[:-4] + b"\0\0\0\1")
    for use in (lambda: read_head(tmp_path), lambda: load_backbone(written, cache, base=tmp_path)):
        with pytest.raises(SourceError, match=r"has SHA-256 .*, the card says"):
            use()


def test_the_list_of_images_is_small_and_held_to_its_digest(tmp_path):
    digests = [hashlib.sha256(bytes([i])).hexdigest() for i in range(100)]
    seen = frozenset(map(image_id, digests))
    written = write_source(tmp_path, card(), None, HEAD, sketch(), seen=seen)
    path = tmp_path / "seen.bin"
    content = path.read_bytes()
    assert len(content) == 16 * 100
    assert written.seen_sha256 == hashlib.sha256(content).hexdigest()
    assert read_card(tmp_path) == written
    assert read_seen(tmp_path, written) == seen
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(SourceError, match=r"seen.bin is not the file that its card names; run its recipe again"):
        read_seen(tmp_path, written)
    path.unlink()
    with pytest.raises(SourceError, match=r"seen.bin cannot be read"):
        read_seen(tmp_path, written)
    assert read_seen(tmp_path, card()) is None


def test_sketch_of_another_probe(tmp_path):
    write_source(tmp_path, card(), None, HEAD, sketch())
    assert read_sketch(tmp_path) is not None
    with pytest.raises(SourceError, match=r"made under probe abababab.*, this run's is efefefef"):
        read_sketch(tmp_path, probe="ef" * 32)
    (tmp_path / "sketch.safetensors").write_bytes(b"spoilt")
    with pytest.raises(SourceError, match="is no sketch"):
        read_sketch(tmp_path)
    (tmp_path / "sketch.safetensors").unlink()
    assert read_sketch(tmp_path, probe="ef" * 32) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n": 1001}, r"features are torch.float32 \[1001, 3\]; .* 1 to 1000"),
        ({"features": torch.zeros(5)}, "features are"),
        ({"features": torch.zeros(5, 3, dtype=torch.float64)}, "features are torch.float64"),
        ({"labels": torch.arange(4)}, r"accepted: int64 \[5\]"),
        ({"mean": torch.zeros(2)}, r"accepted: float32 \[3\]"),
    ],
)
def test_impossible_sketches(changes, message):
    with pytest.raises(ValueError, match=message):
        sketch(**changes)


def test_full_disk(tmp_path, monkeypatch):
    def full(path, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(source_folder, "write_atomically", full)
    with pytest.raises(RunError, match="No space left on device; free space"):
        write_source(tmp_path, card(), None, HEAD, sketch())


def test_a_folder_that_is_written_anew_has_no_card_until_it_is_whole(tmp_path, monkeypatch):
    write_source(tmp_path, card(), None, HEAD, sketch())
    plain = source_folder.write_atomically

    def killed(path, content):
        if path.name == source_folder.SKETCH:
            raise KeyboardInterrupt
        plain(path, content)

    monkeypatch.setattr(source_folder, "write_atomically", killed)
    with pytest.raises(KeyboardInterrupt):
        write_source(tmp_path, card(), None, HEAD, sketch())
    with pytest.raises(SourceError, match=r"has no card\.yaml"):
        read_card(tmp_path)


def test_folder_without_a_card(tmp_path):
    with pytest.raises(SourceError, match=r"has no card.yaml; name the source/ folder"):
        read_card(tmp_path)
