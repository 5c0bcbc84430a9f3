"""The feature cache: one pass an image, equal to live features, whole after any death, never of something else."""

import contextlib
import errno
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import PIL
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from headstart.trainer import exact, features
from headstart.trainer.backbones.backbone import Backbone
from headstart.trainer.backbones.tensors import tensors_fingerprint
from headstart.trainer.errors import RunError, SourceError
from headstart.trainer.features import SHARD_SIZE, extract_features, feature_key
from headstart.trainer.inputs.batches import pixel_batches, to_pixels
from headstart.trainer.inputs.dataset import ImageArrays, LabelledImages
from headstart.trainer.inputs.preprocessing import Preprocessing

GREY = Preprocessing(resize=8, crop=8, channels=1, mean=(0.5,), std=(0.25,))


class Counting(nn.Module):
    """A small convolution that counts the images it sees."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.net = nn.Sequential(nn.Conv2d(1, 6, 3, stride=2), nn.ReLU(), nn.Flatten())
        self.seen = 0

    def forward(self, pixels: Tensor) -> Tensor:
        self.seen += len(pixels)
        found: Tensor = self.net(pixels)
        return found


def backbone(seed: int = 0, preprocessing: Preprocessing = GREY) -> Backbone:
    module = Counting(seed)
    return Backbone(
        name="counting",
        architecture="test:counting",
        module=module,
        preprocessing=preprocessing,
        num_features=54,
        fingerprint=tensors_fingerprint(module.state_dict(), "test:counting"),
    )


def images(num: int, *, mixed: bool = False, seed: int = 0) -> LabelledImages:
    rng = np.random.default_rng(seed)
    sizes = rng.integers(5, 20, (num, 2)) if mixed else np.full((num, 2), 9)
    storage = ImageArrays(tuple(rng.integers(0, 256, (h, w, 3), dtype=np.uint8) for h, w in sizes))
    labels = np.arange(num) % 3
    return LabelledImages(("a", "b", "c"), labels, storage.digests(), storage, storage.grey())


@pytest.mark.parametrize("mixed", [False, True], ids=["one-size", "mixed-sizes"])
@pytest.mark.parametrize("num", [1, 31, SHARD_SIZE, SHARD_SIZE + 1, 2 * SHARD_SIZE + 7])
def test_cached_features_are_live_features_and_each_image_is_seen_once(tmp_path: Path, num: int, mixed: bool):
    data, net = images(num, mixed=mixed), backbone()
    cached = extract_features(net, data, tmp_path, tag="first")
    assert net.module.seen == num
    live = net.features(to_pixels([data.image(i) for i in range(num)], net.preprocess))
    # The same arithmetic in batches of other sizes: a few units in the last place of values of order 1.
    torch.testing.assert_close(cached.tensor(), live, atol=2e-6, rtol=2e-6)
    seen = net.module.seen
    again = extract_features(net, data, tmp_path, tag="second")
    assert net.module.seen == seen
    assert torch.equal(again.tensor(), cached.tensor())
    assert (again.num_computed("first"), again.num_computed("second")) == (num, 0)


def test_the_key_is_all_that_decides_a_feature():
    data, net = images(20), backbone()
    keys = {
        feature_key(net, data),
        feature_key(backbone(seed=1), data),
        feature_key(backbone(preprocessing=replace(GREY, resize=9)), data),
        feature_key(backbone(preprocessing=replace(GREY, mean=(0.4,))), data),
        feature_key(net, data.subset(range(19))),
        feature_key(net, data.subset([1, 0, *range(2, 20)])),
        feature_key(net, images(20, seed=1)),
    }
    assert len(keys) == 7
    relabelled = LabelledImages(("x", "y"), data.labels % 2, data.digests, data.storage, data.grey)
    assert feature_key(net, relabelled) == feature_key(backbone(), data)
    assert feature_key(replace(net, name="another"), data) == feature_key(net, data)


@pytest.mark.parametrize("library", [PIL, torch], ids=["Pillow", "torch"])
def test_another_version_of_what_computes_features_has_keys_of_its_own(monkeypatch: pytest.MonkeyPatch, library: Any):
    net, data = backbone(), images(3)
    key = feature_key(net, data)
    monkeypatch.setattr(library, "__version__", "99.0")
    assert feature_key(net, data) != key


@pytest.mark.parametrize(("constant", "other"), [("SCHEMA", 1), ("DTYPE", "float16"), ("SHARD_SIZE", 128)])
def test_another_layout_of_the_cache_has_keys_of_its_own(monkeypatch: pytest.MonkeyPatch, constant: str, other: object):
    net, data = backbone(), images(3)
    key = feature_key(net, data)
    monkeypatch.setattr(features, constant, other)
    assert feature_key(net, data) != key


def test_a_manifest_of_other_features_is_refused(tmp_path: Path):
    net, data = backbone(), images(5)
    cached = extract_features(net, data, tmp_path)
    manifest = cached.directory / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"num_samples": 5', '"num_samples": 6'))
    with pytest.raises(RunError, match="describes other features"):
        extract_features(net, data, tmp_path)


@pytest.mark.parametrize("shape", [[4, 54], [5, 53]])
def test_a_shard_of_another_shape_is_refused(tmp_path: Path, shape: list[int]):
    cached = extract_features(backbone(), images(5), tmp_path)
    save_file({"features": torch.zeros(shape)}, cached.directory / "00000.safetensors", {"tag": ""})
    with pytest.raises(RunError, match=re.escape(f"are {shape}, their manifest says [5, 54]")):
        cached.tensor()


def test_a_single_shard_is_the_files_own_memory_map(tmp_path: Path):
    found = extract_features(backbone(), images(5), tmp_path).tensor()
    maps = [
        line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines() if str(tmp_path) in line
    ]
    assert any(int(low, 16) <= found.data_ptr() < int(high, 16) for low, high in maps)


@pytest.mark.parametrize("damage", ["truncated", "altered", "emptied"])
def test_a_damaged_shard_is_made_anew_and_no_other(tmp_path: Path, damage: str):
    total = 2 * SHARD_SIZE + 5
    net, data = backbone(), images(total)
    cached = extract_features(net, data, tmp_path)
    expected, seen = cached.tensor().clone(), net.module.seen
    shard = cached.directory / "00001.safetensors"
    content = shard.read_bytes()
    altered = content[:-2] + bytes([content[-2] ^ 0x7F]) + content[-1:]
    shard.unlink()  # not written into: `cached` may be mapped
    shard.write_bytes({"truncated": content[:-10], "altered": altered, "emptied": b""}[damage])
    told: list[tuple[int, int]] = []
    again = extract_features(net, data, tmp_path, progress=lambda done, total: told.append((done, total)))
    assert torch.equal(again.tensor(), expected)
    assert net.module.seen == seen + SHARD_SIZE
    assert told == [(done, total) for done in range(SHARD_SIZE + 5 + 32, total + 1, 32)]


def test_a_damaged_manifest_is_written_anew(tmp_path: Path):
    net, data = backbone(), images(5)
    cached = extract_features(net, data, tmp_path)
    manifest = cached.directory / "manifest.json"
    content = manifest.read_text()
    manifest.write_text(content[:20])
    extract_features(net, data, tmp_path)
    assert (net.module.seen, manifest.read_text()) == (5, content)


def test_shards_of_earlier_versions_are_taken(tmp_path: Path):
    net, data = backbone(), images(5)
    cached = extract_features(net, data, tmp_path)
    save_file({"features": cached.tensor().clone()}, cached.directory / "00000.safetensors", {"tag": ""})
    extract_features(net, data, tmp_path)
    assert net.module.seen == 5


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_features_that_are_not_finite_are_refused_by_image(tmp_path: Path, bad: float):
    net, data = backbone(), images(SHARD_SIZE + 40)
    plain = net.module.forward

    def spoil(pixels: Tensor) -> Tensor:
        found = plain(pixels)
        if net.module.seen > SHARD_SIZE + 32:
            found[[3, 6], [5, 0]] = bad
        return found

    net.module.forward = spoil
    place = rf"number {SHARD_SIZE + 35} \(sample {SHARD_SIZE + 35} in memory, 9x9x3\)"
    said = rf"counting gives NaN or infinite features for 2 images, the first is {place}"
    with pytest.raises(SourceError, match=said):
        extract_features(net, data, tmp_path)
    assert [path.name for path in tmp_path.glob("features/*/*.safetensors")] == ["00000.safetensors"]


def test_a_full_disk_keeps_the_whole_shards_and_leaves_no_rubbish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    net, data = backbone(), images(SHARD_SIZE + 10)
    real_fsync, calls = os.fsync, []

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 3:  # the manifest, the first shard, and the second
            raise OSError(errno.ENOSPC, "No space left on device")
        real_fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match=r"No space left on device.*HEADSTART_CACHE"):
        extract_features(net, data, tmp_path)
    folder = next((tmp_path / "features").iterdir())
    assert sorted(path.name for path in folder.iterdir()) == ["00000.safetensors", "manifest.json"]
    monkeypatch.setattr(os, "fsync", real_fsync)
    net.module.seen = 0
    resumed = extract_features(net, data, tmp_path)
    assert net.module.seen == 10
    assert torch.equal(resumed.tensor(), extract_features(backbone(), data, tmp_path / "other").tensor())


def test_a_full_disk_is_told_before_the_first_shard_and_keeps_nobody_from_what_is_cached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    net, data = backbone(), images(5)
    cached = extract_features(net, data, tmp_path)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert torch.equal(extract_features(net, data, tmp_path).tensor(), cached.tensor())
    with pytest.raises(RunError, match="No space left on device"):
        extract_features(net, images(4), tmp_path)
    assert net.module.seen == 5


def test_an_interrupted_extraction_leaves_no_thread_behind(tmp_path: Path):
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    before = set(threading.enumerate())
    with pytest.raises(KeyboardInterrupt) as interrupted:
        extract_features(backbone(), images(100), tmp_path, progress=interrupt)
    assert set(threading.enumerate()) <= before
    assert interrupted.tb is not None


KILLED = """
import sys, time, importlib.util
spec = importlib.util.spec_from_file_location("t", sys.argv[1]); t = importlib.util.module_from_spec(spec)
spec.loader.exec_module(t)
from pathlib import Path
def slow(done, total):
    print(done, flush=True); time.sleep(0.05)
t.extract_features(t.backbone(), t.images(3 * t.SHARD_SIZE), Path(sys.argv[2]), progress=slow)
"""


def test_a_killed_extraction_goes_on_at_the_first_missing_shard(tmp_path: Path):
    command = [sys.executable, "-c", KILLED, __file__, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if int(line) > SHARD_SIZE + 32:
                process.send_signal(signal.SIGKILL)
                break
    time.sleep(0.1)
    net = backbone()
    resumed = extract_features(net, images(3 * SHARD_SIZE), tmp_path)
    assert net.module.seen == 2 * SHARD_SIZE
    undisturbed = extract_features(backbone(), images(3 * SHARD_SIZE), tmp_path / "other")
    assert torch.equal(resumed.tensor(), undisturbed.tensor())

    old, young = (resumed.directory / f".0000{n}.safetensors.0123456789abcdef.tmp" for n in (1, 2))
    for half in (old, young):  # as of a write that was killed
        half.touch()
    os.utime(old, (1e9, 1e9))
    extract_features(net, images(3 * SHARD_SIZE), tmp_path)
    assert (old.exists(), young.exists()) == (False, True)  # the younger may be another process's, at work


@pytest.mark.parametrize("setting", ["none", "tf32", "ieee"])
def test_whatever_the_process_has_set_there_is_no_tf32_and_the_setting_stays(setting: str):
    backends, on_gpu = torch.backends, SimpleNamespace(device=torch.device("cuda"), module=nn.Identity(), name="x")
    before, backends.fp32_precision = backends.fp32_precision, setting
    convolutions = backends.cudnn.conv.fp32_precision
    try:
        with features._placed(on_gpu):  # type: ignore[arg-type] - without the weights, which need a GPU
            assert backends.cudnn.conv.fp32_precision == backends.cuda.matmul.fp32_precision == "ieee"
            assert backends.cudnn.deterministic
        assert backends.fp32_precision == setting
        assert backends.cudnn.conv.fp32_precision == convolutions
        assert not backends.cudnn.deterministic
    finally:
        backends.fp32_precision = before


@pytest.mark.parametrize("setting", ["bf16", "none"])
def test_features_are_kept_as_exact_as_their_key_says_whatever_holds_outside(tmp_path: Path, setting: str):
    data, conv = images(40), torch.backends.mkldnn.conv
    exact_ones = extract_features(backbone(), data, tmp_path / "one").tensor()
    before = conv.fp32_precision
    conv.fp32_precision = setting  # bfloat16 convolutions where the processor has them
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = extract_features(backbone(), data, tmp_path / "other").tensor()
            assert torch.is_autocast_enabled("cpu")
        assert conv.fp32_precision == setting
    finally:
        conv.fp32_precision = before
    assert torch.equal(found, exact_ones)


@pytest.mark.gpu
def test_on_a_gpu_features_are_those_of_the_cpu_and_the_same_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    net, data = backbone(), images(SHARD_SIZE + 7, mixed=True)
    found = extract_features(net, data, tmp_path / "first")
    assert {str(each.device) for each in net.module.parameters()} == {"cpu"}
    assert torch.equal(extract_features(backbone(), data, tmp_path / "second").tensor(), found.tensor())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    expected = extract_features(net, data, tmp_path / "first")
    assert expected.directory != found.directory
    # Sums of nine products of order 1 in another order; under TF32 they would be off by some 2^-11.
    torch.testing.assert_close(found.tensor(), expected.tensor(), atol=1e-5, rtol=0)


def test_the_features_of_a_gpu_have_keys_of_their_own_and_those_of_a_graph_have_not(monkeypatch: pytest.MonkeyPatch):
    net, data = backbone(), images(3)
    graph = replace(net, module=None)
    keys = [feature_key(net, data)]
    assert feature_key(graph, data) == keys[0]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name in ("NVIDIA A100", "NVIDIA H100"):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        keys.append(feature_key(net, data))
    assert len(set(keys)) == 3
    assert feature_key(graph, data) == keys[0]


def test_a_gpu_whose_memory_is_full_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    net = backbone()

    def full(self: Backbone, pixels: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB.\nMore about it.")

    monkeypatch.setattr(Backbone, "device", torch.device("meta"))  # as good as any that this machine has not
    monkeypatch.setattr(exact, "exact_products", contextlib.nullcontext)
    monkeypatch.setattr(Backbone, "features", full)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100")
    with pytest.raises(RunError, match=r"NVIDIA H100 has no memory .* counting: .* 20 MiB\. Free it, or set CUDA"):
        extract_features(net, images(3), tmp_path)


def test_progress_ends_at_the_total(tmp_path: Path):
    told: list[tuple[int, int]] = []
    extract_features(backbone(), images(70), tmp_path, progress=lambda done, total: told.append((done, total)))
    assert told == [(32, 70), (64, 70), (70, 70)]


def test_batches_come_in_order_and_threads_end_with_the_generator():
    data, net = images(50, mixed=True), backbone()
    order = np.random.default_rng(0).permutation(50)
    batches = np.split(order, range(7, 50, 7))
    found = torch.cat(list(pixel_batches(data, batches, net.preprocess)))
    expected = to_pixels([data.image(i) for i in order], net.preprocess)
    assert torch.equal(found, expected)
    assert features.DTYPE == "float32"


@pytest.mark.usefixtures("unprivileged")
def test_features_that_another_user_keeps_closed_are_told(tmp_path: Path):
    cached = extract_features(backbone(), images(5), tmp_path)
    cached.directory.chmod(0)
    try:
        with pytest.raises(RunError, match=r"cannot read features.*manifest\.json.*chmod.*HEADSTART_CACHE"):
            extract_features(backbone(), images(5), tmp_path)
    finally:
        cached.directory.chmod(0o700)


def test_features_that_are_deleted_while_they_are_used_are_told(tmp_path: Path):
    cached = extract_features(backbone(), images(5), tmp_path, tag="mine")
    shutil.rmtree(cached.directory)
    for use in (cached.tensor, lambda: cached.num_computed("mine")):
        with pytest.raises(RunError, match=r"00000\.safetensors was deleted or altered.*run the same command again"):
            use()
    assert extract_features(backbone(), images(5), tmp_path).tensor().shape == (5, 54)
