"""Providers and their options: what is asked of ONNX Runtime, and what is refused on a machine without a GPU."""

import subprocess
import sys
import threading
from pathlib import Path

import onnxruntime
import pytest
import torch

from headstart.serving import device as module
from headstart.serving.device import (
    CUDA,
    ENGINES,
    GRAPH_THREAD,
    TENSORRT,
    Device,
    check,
    open_on,
    providers,
    read_options,
)
from headstart.serving.errors import PackageError
from headstart.serving.runtime import CPU
from tests.serving.server.graphs import mlp

lacks_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="says what is said without a GPU")
has_builds = pytest.mark.skipif(
    not {CUDA, TENSORRT} <= set(onnxruntime.get_available_providers()), reason="needs the GPU build of ONNX Runtime"
)


@has_builds
def test_cuda_has_the_cpu_behind_it_and_our_options_below_the_operators():
    assert providers(Device(provider=CUDA)) == [
        (
            CUDA,
            {"cudnn_conv_algo_search": "HEURISTIC", "arena_extend_strategy": "kSameAsRequested", "use_tf32": "0"},
        ),
        CPU,
    ]
    asked = {"enable_cuda_graph": "1", "cudnn_conv_algo_search": "EXHAUSTIVE", "use_tf32": "1"}
    (_, options), _ = providers(Device(provider=CUDA, options=asked))
    assert options == {**asked, "arena_extend_strategy": "kSameAsRequested"}


@has_builds
@pytest.mark.parametrize("provider", [CUDA, TENSORRT])
def test_where_cuda_graphs_are_asked_for_one_thread_has_the_device(provider: str, monkeypatch: pytest.MonkeyPatch):
    opened: list[str] = []
    monkeypatch.setattr(module, "open_session", lambda *_: opened.append(threading.current_thread().name))
    name = {CUDA: "enable_cuda_graph", TENSORRT: "trt_cuda_graph_enable"}[provider]
    for value, thread in (("1", GRAPH_THREAD), ("True", GRAPH_THREAD), ("0", None), ("False", None)):
        device = Device(provider=provider, options={name: value})
        assert device.thread is thread
        open_on(device, b"")
    assert Device(provider=provider).thread is None
    assert Device().thread is None
    assert opened == ["headstart-graphs"] * 2 + [threading.current_thread().name] * 2


@has_builds
def test_tensorrt_has_cuda_and_the_cpu_behind_it_and_engines_by_package(tmp_path: Path):
    found = providers(Device(provider=TENSORRT))
    assert found[0][0] == TENSORRT
    assert found[1:] == providers(Device(provider=CUDA))
    device = Device(provider=TENSORRT, options={ENGINES: str(tmp_path), "trt_fp16_enable": "True"})
    first, second = (providers(device, key)[0][1] for key in ("a", "b"))
    assert first[ENGINES] == str(tmp_path / "a")
    assert second[ENGINES] == str(tmp_path / "b")
    assert {key: first[key] for key in first if key != ENGINES} == {
        "trt_fp16_enable": "True",
        "trt_engine_cache_enable": "True",  # the only word for it that ONNX Runtime's Python takes
        "trt_timing_cache_enable": "True",
        "trt_timing_cache_path": str(tmp_path),
    }
    assert providers(device)[0][1] == {"trt_fp16_enable": "True"}, "a graph without a key keeps no engine"


@has_builds
def test_the_folder_of_a_packages_engines_is_made_or_the_reason_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(module, "open_session", lambda *_: None)
    engines = tmp_path / "of" / "ours"
    for key in ("a", "b", "a"):
        open_on(Device(provider=TENSORRT, options={ENGINES: str(engines)}), b"", key=key)
    assert sorted(path.name for path in engines.iterdir()) == ["a", "b"]
    (tmp_path / "file").touch()
    with pytest.raises(PackageError, match=f"{ENGINES} cannot be made: .*Not a directory.*give a folder") as caught:
        open_on(Device(provider=TENSORRT, options={ENGINES: str(tmp_path / "file")}), b"", key="a")
    assert isinstance(caught.value.__cause__, OSError)  # so that it is tried again


@has_builds
def test_all_that_cuda_needs_beside_its_driver_is_installed():
    code = "import onnxruntime; onnxruntime.preload_dlls()"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert ended.stdout + ended.stderr == "", "it prints what it does not find"


@lacks_gpu
@has_builds
@pytest.mark.parametrize("provider", [CUDA, TENSORRT])
def test_a_provider_that_does_not_load_is_refused(provider: str):
    for call in (lambda: check(Device(provider=provider)), lambda: open_on(Device(provider=provider), mlp())):
        with pytest.raises(PackageError, match=f"({provider}.* does not load|cannot load the graph on {provider})"):
            call()


@lacks_gpu
@has_builds
@pytest.mark.parametrize("provider", [CUDA, TENSORRT])
def test_the_command_refuses_it_before_it_serves(provider: str, tmp_path: Path):
    command = [sys.executable, "-m", "headstart.cluster.cli", "serve", str(tmp_path), "--port", "0"]
    ended = subprocess.run(
        [*command, "--provider", provider, "--provider-option", "device_id=0"],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert ended.returncode == 2, ended.stderr
    assert ended.stdout == ""
    assert provider in ended.stderr.splitlines()[-1]
    assert "Traceback" not in ended.stderr


def test_options_are_read_and_refused():
    assert read_options(["a=1", "b=x=y"]) == {"a": "1", "b": "x=y"}
    for wrong in (["a"], ["=1"], ["a="], ["a=1", "a=2"]):
        with pytest.raises(PackageError, match="KEY=VALUE"):
            read_options(wrong)
    with pytest.raises(PackageError, match=f"{CPU} takes no options, found a"):
        Device(options={"a": "1"})
