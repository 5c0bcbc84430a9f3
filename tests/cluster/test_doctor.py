"""`headstart doctor` says what is there, and does not call working what only claims to be."""

import importlib.metadata
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch

from headstart.cluster.report import doctor

Run = Callable[..., Any]


@pytest.fixture
def findings(headstart: Run) -> dict[str, dict[str, str]]:
    ended = headstart("doctor", "--json")
    assert ended.code == 0, ended.stderr
    document = ended.json()  # one document, although ONNX Runtime prints when a provider does not load
    assert all(set(finding) == {"check", "status", "value", "meaning"} for finding in document)
    assert all(finding["status"] in ("ok", "warn") and finding["meaning"] for finding in document)
    found = {finding["check"]: finding for finding in document}
    assert len(found) == len(document)
    return found


def test_every_part_of_the_machine_has_a_finding(findings: dict[str, dict[str, str]], tmp_path: Path, cache: Path):
    for package in ("torch", "torchvision", "triton", "ray", "onnx", "onnxruntime-gpu", "numpy", "scikit-learn"):
        assert findings[package]["value"] == importlib.metadata.version(package)
        assert findings[package]["status"] == "ok"
    assert findings["python"]["value"].startswith("3.1")
    assert int(findings["CPUs"]["value"]) == len(os.sched_getaffinity(0))
    assert any(check.startswith("GPU") for check in findings)
    assert findings["cache"] == {
        "check": "cache", "status": "ok", "value": str(cache), "meaning": "can be written"
    }  # fmt: skip
    assert findings["runs"]["value"] == str(tmp_path / "runs")
    assert float(findings["free disk"]["value"].removesuffix(" GB")) > 0
    assert findings["Ray's ports"]["status"] == "warn"
    assert "RAY_AUTH_TOKEN" in findings["Ray's ports"]["meaning"]


def test_a_provider_is_ok_only_if_it_loads(findings: dict[str, dict[str, str]]):
    for provider in onnxruntime.get_available_providers():
        loads = findings[provider]["status"] == "ok"
        assert findings[provider]["value"] == ("loads" if loads else "listed")
        assert findings[provider]["meaning"].startswith("does not load: ") != loads
    assert findings["CPUExecutionProvider"]["status"] == "ok"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, and CUDA may load")
def test_cuda_is_listed_and_does_not_load_without_a_gpu(findings: dict[str, dict[str, str]]):
    assert "CUDAExecutionProvider" in onnxruntime.get_available_providers()
    assert findings["GPUs"]["value"] == "none"
    finding = findings["CUDAExecutionProvider"]
    assert finding["status"] == "warn"
    assert finding["meaning"].endswith("without it `predict` uses the CPU")


def test_a_cache_that_cannot_be_written_fails(headstart: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("HEADSTART_CACHE", str(tmp_path / "file" / "cache"))
    ended = headstart("doctor", "--json")
    assert ended.code == 2
    (failed,) = [finding for finding in ended.json() if finding["status"] == "fail"]
    assert failed["check"] == "cache"
    assert failed["value"] == str(tmp_path / "file" / "cache")
    assert "Not a directory" in failed["meaning"]
    assert "set HEADSTART_CACHE" in failed["meaning"]


def test_what_is_missing_or_too_old_is_said(headstart: Run, monkeypatch: pytest.MonkeyPatch):
    plain = importlib.metadata.version

    def version(name: str) -> str:
        if name == "triton":
            raise importlib.metadata.PackageNotFoundError(name)
        return "2.40.0" if name == "ray" else plain(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(doctor, "_providers", list)
    ended = headstart("doctor")
    assert ended.code == 2
    rows = {line.split("│")[2].strip(): line for line in ended.stdout.splitlines() if line.startswith("│")}
    assert "fail" in rows["triton"]
    assert "missing" in rows["triton"]
    assert "warn" in rows["ray"]
    assert "2.40.0" in rows["ray"]
    assert "pip install -c constraints.txt -e ." in ended.stdout
