"""Every program in every layout that is used, compiled for A100 and H100 with neither: it fits, and does not spill."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget

from headstart.kernels.engine import fused, gpu, launch, programs, streamed, tile
from headstart.kernels.engine.launch import Value
from headstart.kernels.engine.layouts import FINISH, choose_config
from headstart.kernels.engine.precision import make_operand

SCRIPT = Path(__file__).with_name("compile_programs.py")
PRECISIONS = ("fp32", "bf16", "bf16x3", "tf32")
# (epilogue, p, bandwidths)
EPILOGUES = (
    ("sqrt", 2, 0),
    ("rbf", 2, 1),
    ("rbf", 2, 5),
    ("nearest", 2, 0),
    ("lse", 1, 0),
    ("lse", 2, 0),
)
PITCHES = (512, 2048)  # one of each layout
# Bytes of shared memory that one program may take: of A100 and H100, CUDA C++ programming guide, compute capabilities.
# What is used on 8.x must also fit the cards of 8.6 and 8.9.
SHARED = {80: 99 * 1024, 90: 227 * 1024}
TYPES = {
    "x_squares": "*fp32", "y_squares": "*fp32", "table": "*i64", "h": "*fp32", "coefficients": "*fp32",
    "values": "*fp32", "indices": "*i64", "tau": "fp32", "inv_epsilon": "fp32", "products": "*fp32", "x_rows": "i32",
    "y_rows": "i32", "y_start": "i64", "stride": "i64", "out_stride": "i64",
    "partials": "*fp32", "totals": "*fp64", "sums": "*fp64", "num_groups": "i32", "width": "i64",
}  # fmt: skip


def case(
    capability: int, precision: str, epilogue: str, p: int = 2, bandwidths: int = 0, pitch: int = 2048,
    kernel: str = "tile_kernel",
) -> dict[str, Any]:  # fmt: skip
    config = FINISH if kernel == "finish_kernel" else choose_config(precision, pitch, divmod(capability, 10))
    constants = {
        "EPILOGUE": epilogue, "P": p, "B": bandwidths, "BM": config.bm,
        "BN": config.bn, "BK": config.bk, "PITCH": pitch, "INTERPRET": False, "STEPS": streamed.STEPS,
        "INPUT_PRECISION": "tf32" if precision == "tf32" else "ieee",
    }  # fmt: skip
    operand = "*bf16" if precision.startswith("bf16") else "*fp32"
    operands = ["x_high", "y_high"] + (["x_low", "y_low"] if precision == "bf16x3" else [])
    needed = {"rbf": ["coefficients"], "nearest": ["indices"], "lse": ["h"], "sqrt": []}[epilogue]
    for name in {"x_low", "y_low", "coefficients", "indices", "h"} - set(operands) - set(needed):
        constants[name] = None
    kept = getattr(programs, kernel).arg_names
    return {
        "name": f"sm_{capability}-{kernel}-{precision}-{epilogue}{p}x{bandwidths}-K{pitch}",
        "kernel": kernel, "capability": capability, "types": TYPES | dict.fromkeys(operands, operand),
        "constants": {name: value for name, value in constants.items() if name in kept},
        "aligned": ["products", *operands],
        "options": {"num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": True},
    }  # fmt: skip


def adding_cases(capability: int) -> Iterator[dict[str, Any]]:
    for kernel, block in (("add_kernel", 256), ("task_kernel", streamed.BLOCK)):
        yield {
            "name": f"sm_{capability}-{kernel}", "kernel": kernel, "capability": capability, "types": TYPES,
            "constants": {"BLOCK": block}, "aligned": [], "options": {"num_warps": 4, "enable_fp_fusion": True},
        }  # fmt: skip


def quick_cases(capability: int) -> Iterator[dict[str, Any]]:
    """Each precision, each epilogue and each kernel, once."""
    for precision in PRECISIONS:
        yield case(capability, precision, "sqrt")
    for epilogue, p, bandwidths in (("rbf", 2, 5), ("nearest", 2, 0), ("lse", 2, 0)):
        yield case(capability, "bf16", epilogue, p, bandwidths, pitch=512)
    yield case(capability, "fp32", "sqrt", kernel="finish_kernel")
    yield from adding_cases(capability)


def all_cases(capability: int) -> Iterator[dict[str, Any]]:
    for epilogue, p, bandwidths in EPILOGUES:
        for precision in PRECISIONS:
            for pitch in (64, *PITCHES) if epilogue == "sqrt" else PITCHES:  # 64: a single step
                yield case(capability, precision, epilogue, p, bandwidths, pitch)
        yield case(capability, "fp32", epilogue, p, bandwidths, kernel="finish_kernel")
    yield from adding_cases(capability)


def compile_all(
    cases: list[dict[str, Any]], cache: Path, python: tuple[str, ...] = (sys.executable,)
) -> list[dict[str, Any]]:
    """In two processes, because Triton compiles one program at a time."""

    def compile_some(some: list[dict[str, Any]]) -> list[dict[str, Any]]:
        ended = subprocess.run(
            [*python, str(SCRIPT), programs.__file__], input=json.dumps(some), capture_output=True, text=True,
            check=False, env={**os.environ, "TRITON_CACHE_DIR": str(cache), "TRITON_INTERPRET": "0"},
        )  # fmt: skip
        assert ended.returncode == 0, ended.stderr[-3000:]
        found: list[dict[str, Any]] = json.loads(ended.stdout)
        return found

    with ThreadPoolExecutor(2) as pool:
        halves = list(pool.map(compile_some, (cases[::2], cases[1::2])))
    found = [None] * len(cases)
    found[::2], found[1::2] = halves
    return found


def check(case: dict[str, Any], found: dict[str, Any]) -> None:
    assert (found["spills"], found["stack"]) == (0, 0), found
    assert found["registers"] <= 255, found
    assert found["shared"] <= SHARED[case["capability"]], found
    if case["kernel"] == "finish_kernel":
        assert found["wide_loads"] >= 8, found  # 32 x 256 products, 16 bytes for each of 128 threads at a time: 16
        return
    if case["kernel"] != "tile_kernel":
        return
    precision = case["name"].split("-")[2]
    kinds = {instruction.split(".")[0] for instruction in found["tensor"]}
    assert kinds == (set() if precision == "fp32" else {"HGMMA" if case["capability"] == 90 else "HMMA"}), found
    number = {"bf16": "BF16", "bf16x3": "BF16", "tf32": "TF32"}.get(precision, "")
    assert all(number in instruction and ".F32" in instruction for instruction in found["tensor"]), found
    assert precision != "fp32" or found["ffma"] >= 512, found
    # Operands come to shared memory 16 bytes at a time, asynchronously, wherever there is more than one step.
    assert found["copies"] == found["wide_copies"], found
    assert found["copies"] > 0 or case["constants"]["PITCH"] == 64, found
    # The start of x and of y times the pitch in 64 bits: 2^31 is passed at 1 M rows of 2,048.
    assert found["wide_products"] >= 2, found


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    cases = [*quick_cases(90), *(case(80, precision, "sqrt") for precision in PRECISIONS)]
    return list(zip(cases, compile_all(cases, tmp_path_factory.mktemp("quick")), strict=True))


def test_each_precision_and_each_epilogue_fits_and_does_not_spill(quick: list[tuple[dict[str, Any], dict[str, Any]]]):
    for each, found in quick:
        assert found["version"] == triton.__version__
        check(each, found)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_every_layout_fits_and_does_not_spill(tmp_path: Path):
    cases = [*all_cases(80), *all_cases(90)]
    for each, found in zip(cases, compile_all(cases, tmp_path), strict=True):
        check(each, found)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_program_compiles_with_the_oldest_triton(tmp_path: Path):
    """With 3.6, which GPU machines have, in an environment with Triton alone: it needs no PyTorch to compile.

    All layouts of the newer target, each precision and kernel of the older one.
    """
    python = str(tmp_path / "venv/bin/python")
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True, capture_output=True)
    install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "triton==3.6.0"]
    ended = subprocess.run(install, capture_output=True, text=True, check=False)
    if ended.returncode:
        pytest.skip(f"pip cannot install triton 3.6.0 here: {ended.stderr.strip()[-300:]}")
    cases = [*all_cases(90), *quick_cases(80)]
    for each, found in zip(cases, compile_all(cases, tmp_path / "cache", (python, "-I")), strict=True):
        assert found["version"] == "3.6.0"
        check(each, found)


def test_launches_of_all_sizes_and_places_share_one_binary(
    quick: list[tuple[dict[str, Any], dict[str, Any]]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    """What own sums of equal tasks agreeing in every bit rests on, tried on the launches themselves, without a GPU:
    a driver that only says what it is, and programs that are compiled for it and not run."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    driver = SimpleNamespace(
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
    )
    compiled: dict[str, list[Any]] = {}

    def compiling(name: str) -> Any:
        class Compiling:
            def __getitem__(self, grid: Any) -> Any:
                def launched(*arguments: Any, **options: Any) -> None:
                    made = getattr(copy, name).warmup(*arguments, grid=grid, **options)
                    compiled.setdefault(name, []).append(made)

                return launched

        return Compiling()

    # A copy of the programs that no other test has launched.
    spec = importlib.util.spec_from_file_location("programs_copy", programs.__file__)
    assert spec is not None
    assert spec.loader is not None
    copy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copy)
    monkeypatch.setattr(fused, "tile_kernel", compiling("tile_kernel"))
    for name in ("finish_kernel", "add_kernel", "task_kernel"):
        monkeypatch.setattr(streamed, name, compiling(name))
    monkeypatch.setattr(launch, "own_rows", lambda precision: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(triton.runtime.driver, "_active", driver)

    def operand(n: int, start: int) -> Any:
        rows = make_operand(torch.randn(start + n, 2000), torch.zeros(2000), "fp32", 2048)
        return type(rows)(*(part if part is None else part[start:] for part in rows))

    paths = {"fused": {"tile_kernel"}, "streamed": {"finish_kernel", "add_kernel", "task_kernel"}}
    for path, kernels in paths.items():
        before = set(compiled)
        for n, start in ((1, 0), (16, 1), (300, 3)):
            x, y = operand(n, start), operand(2 * n + 1, 2 * start)
            offsets = torch.tensor([0, n, 2 * n + 1])
            options = {"precision": "fp32", "value": Value("sqrt"), "path": path, "memory": 2**26}
            launch.cross_sums(x, y, offsets, **options)
            launch.own_sums(y, offsets, **options)
        assert set(compiled) - before == kernels
    for launches in compiled.values():
        assert len(launches) >= 6
        assert len({each.hash for each in launches}) == 1
    # And they are the binaries that are looked at above.
    read = importlib.util.spec_from_file_location("compile_programs", SCRIPT)
    assert read is not None
    assert read.loader is not None
    script = importlib.util.module_from_spec(read)
    read.loader.exec_module(script)
    looked_at = {each["name"]: found for each, found in quick}
    launched = (case(90, "fp32", "sqrt", kernel=kernel) for kernel in ("tile_kernel", "finish_kernel"))
    for each in (*launched, *adding_cases(90)):
        found = script.inspect(compiled.pop(each["kernel"])[0])
        assert {key: looked_at[each["name"]][key] for key in found} == found
    assert not compiled


@pytest.mark.parametrize("d", [3, 2048, 20000], ids="D{}".format)
def test_the_default_memory_takes_rows_of_any_length(d: int):
    x = torch.zeros(1, d).expand(5000, d)
    setting = gpu.Setting(x, len(x), x[0], tile.Value("distance"), "bf16", "streamed", None)
    chunks = list(setting.chunks(torch.tensor([0, 10, 5000])))
    assert [chunk.start for chunk in chunks] == [0, *(chunk.end for chunk in chunks[:-1])]
    assert chunks[-1].end == 5000
