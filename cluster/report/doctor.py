"""What this machine has, and what each finding means for Headstart."""

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from headstart.cluster.report.table import stdout_console
from headstart.cluster.stages.context import cache_root

Finding = dict[str, Any]

_PACKAGES = {
    "torch": "features and fine-tuning",
    "torchvision": "architectures and their ImageNet weights",
    "triton": "the kernels on a GPU",
    "ray": "fine-tuning, tune and submit",
    "onnx": "export",
    "onnxscript": "export",
    "onnxruntime-gpu": "predict, and the proof of an export",
    "numpy": "everything",
    "scikit-learn": "scores and the raw-pixel control",
}
_LOW_DISK_GB = 2
_STYLES = {"ok": "green", "warn": "yellow", "fail": "red"}

# Run by itself, because a library that torch has loaded into this process would load here and not for `predict`, and
# because ONNX Runtime writes the reason to the process's own stderr.
_PROBE = """
import sys
from headstart.serving.errors import PackageError
from headstart.serving.runtime import open_session
try:
    open_session(sys.stdin.buffer.read(), sys.argv[1])
except PackageError as error:
    sys.exit(str(error))
"""
_PROBE_SECONDS = 120  # a GPU's first context takes 10 s, a loaded machine several times as long


def examine() -> list[Finding]:
    """Return the findings, each with `check`, `status` (ok, warn or fail), `value` and `meaning`."""
    return [
        *_versions(), _processors(), *_gpus(), *_providers(), _ray(),
        _writable("cache", cache_root()), _writable("runs", Path("runs").absolute()), _disk(),
    ]  # fmt: skip


def print_findings(findings: list[Finding], console: Console | None = None) -> None:
    """Print the findings as a table."""
    table = Table(title="headstart doctor", title_justify="left")
    for column in ("", "check", "found", "what it means"):
        table.add_column(column, overflow="fold")  # a library's name is of no use when cut
    for finding in findings:
        style = _STYLES[finding["status"]]
        table.add_row(
            f"[{style}]{finding['status']}[/{style}]", finding["check"], escape(finding["value"]),
            escape(finding["meaning"]),
        )  # fmt: skip
    (console or stdout_console(110)).print(table)


def _finding(check: str, status: str, value: object, meaning: str) -> Finding:
    return {"check": check, "status": status, "value": str(value), "meaning": meaning}


def _versions() -> list[Finding]:
    supported = (3, 11) <= sys.version_info[:2] <= (3, 13)
    version = platform.python_version()
    findings = [_finding("python", "ok" if supported else "warn", version, "3.11 to 3.13 are supported")]
    required = {found.name: found.specifier for found in map(Requirement, _requirements())}
    for name, use in _PACKAGES.items():
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            mend = f"for {use}; install it: pip install -c constraints.txt -e ."
            findings.append(_finding(name, "fail", "missing", mend))
            continue
        if name in required and not required[name].contains(version, prereleases=True):
            meaning = f"for {use}; tested is {required[name]}: pip install -c constraints.txt -e ."
            findings.append(_finding(name, "warn", version, meaning))
        else:
            findings.append(_finding(name, "ok", version, f"for {use}"))
    names = {"onnxruntime", "onnxruntime-gpu"}
    if names <= {distribution.metadata["Name"] for distribution in importlib.metadata.distributions()}:
        meaning = "they own one import name: pip uninstall both, then install onnxruntime-gpu"
        findings.append(_finding("onnxruntime", "fail", "both builds", meaning))
    return findings


def _requirements() -> list[str]:
    try:
        return importlib.metadata.requires("headstart") or []
    except importlib.metadata.PackageNotFoundError:  # run from a checkout that is not installed
        return []


def _processors() -> Finding:
    count = len(os.sched_getaffinity(0))
    meaning = (
        "two workers train side by side" if count >= 2 else "two workers share one core: train.workers=1 is as fast"
    )
    return _finding("CPUs", "ok" if count >= 2 else "warn", count, meaning)


def _gpus() -> list[Finding]:
    import torch

    if not torch.cuda.is_available():
        return [_finding("GPUs", "warn", "none", "training runs on the CPU in fp32; it works, it is slower")]
    findings = []
    for index in range(torch.cuda.device_count()):
        name = torch.cuda.get_device_name(index)
        with torch.cuda.device(index):
            native = torch.cuda.is_bf16_supported(including_emulation=False)
        meaning = "train.precision auto is bf16 here" if native else "no bf16 of its own: train.precision auto is fp32"
        findings.append(_finding(f"GPU {index}", "ok", name, meaning))
    return findings


def _providers() -> list[Finding]:
    """Try each provider that ONNX Runtime lists, as `predict` would: it drops one that does not load in silence."""
    import onnx

    from headstart.serving.ort import onnxruntime

    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Identity", ["x"], ["y"])], "probe", [value("x", 1, [1])], [value("y", 1, [1])]
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    return [_provider(name, model.SerializeToString()) for name in onnxruntime.get_available_providers()]


def _provider(name: str, model: bytes) -> Finding:
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-c", _PROBE, name],
            input=model,
            capture_output=True,
            timeout=_PROBE_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return _finding(name, "warn", "listed", f"gives no answer in {_PROBE_SECONDS} s")
    if done.returncode == 0:
        return _finding(name, "ok", "loads", f"predict --provider {name} takes it")
    said = done.stderr.decode(errors="replace")
    # The library that is missing is in ONNX Runtime's log alone.
    missing = re.search(r"Failed to load library .* with error: ([^\n]+)", said)
    reason = missing[1] if missing else (said.strip().splitlines() or ["no reason given"])[-1]
    default = name == "CPUExecutionProvider"
    mend = "reinstall onnxruntime-gpu" if default else "without it `predict` uses the CPU"
    return _finding(name, "fail" if default else "warn", "listed", f"does not load: {reason}; {mend}")


def _ray() -> Finding:
    meaning = (
        "started by a run with a random token; its ports listen on every interface whatever is set, so the token is "
        "the protection: on a shared network keep RAY_AUTH_TOKEN secret or use a firewall"
    )
    return _finding("Ray's ports", "warn", "all interfaces", meaning)


def _writable(check: str, folder: Path) -> Finding:
    try:
        with tempfile.NamedTemporaryFile(dir=_existing(folder)):
            pass
    except OSError as error:
        hint = "set HEADSTART_CACHE to another folder" if check == "cache" else "give --out another folder"
        return _finding(check, "fail", folder, f"cannot be written ({error.strerror}): {hint}")
    return _finding(check, "ok", folder, "can be written")


def _disk() -> Finding:
    try:
        free = shutil.disk_usage(_existing(cache_root())).free / 1e9
    except OSError as error:
        return _finding("free disk", "warn", "unknown", f"cannot be told: {error.strerror}")
    meaning = "all weights take about 1 GB; features 4 bytes a dimension and image"
    if free < _LOW_DISK_GB:
        meaning = f"little: {meaning}. Free some, or set HEADSTART_CACHE to another disk's folder"
    return _finding("free disk", "ok" if free >= _LOW_DISK_GB else "warn", f"{free:.1f} GB", meaning)


def _existing(folder: Path) -> Path:
    """Return the nearest parent that exists: what is missing is made when it is needed."""
    return next(parent for parent in (folder, *folder.parents) if parent.exists())
