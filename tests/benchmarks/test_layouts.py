"""The comparison of layouts is of programs that fit and give the same sums; how fast they are is for a GPU to say."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.layouts import CANDIDATES, cases
from headstart.kernels.engine.layouts import choose_config
from tests.kernels.test_compilation import SHARED, case, compile_all

# Small tiles, which the interpreter takes a second for; in a process of its own, because it is chosen at the import.
COMPARED = """
from benchmarks.layouts import Case, compare
from headstart.kernels.engine.layouts import Config

used, other = Config(16, 16, 64, 1, 1), Config(32, 16, 64, 1, 1)
for epilogue in ("sqrt", "rbf"):
    case = Case("bf16", 70, epilogue, num_target=33, num_tasks=3, rows=20)
    rows = compare(case, (used, other), used, "cpu", runs=2)
    assert sorted(row["bm"] for row in rows) == [16, 32] and rows[0]["p50"] <= rows[1]["p50"]
    assert [row["used"] for row in rows if row["bm"] == 16] == ["used"]
    # A tile of 32 rows adds 16 numbers more in float32 than one of 16: 16 x 2^-24 of their sum at the most.
    assert all(float(row["difference"]) < 1e-6 for row in rows), rows
    assert {row["bm"]: float(row["difference"]) for row in rows}[16] == 0
"""


def test_layouts_give_the_same_sums_and_the_fastest_comes_first():
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", COMPARED], check=True, timeout=200, env=environment)


def test_the_layout_in_use_is_among_those_of_a_hopper():
    for each in cases():
        assert choose_config(each.precision, each.dim, (9, 0)) in CANDIDATES[each.precision], each


@pytest.mark.slow
def test_every_layout_compiles_for_a_hopper_fits_and_does_not_spill(tmp_path: Path):
    programs = []
    for precision, configs in CANDIDATES.items():
        for config in configs:
            program = case(90, precision, "rbf", bandwidths=5)  # of the two epilogues the one that takes more registers
            program["constants"] |= {"BM": config.bm, "BN": config.bn, "BK": config.bk}
            program["options"] |= {"num_warps": config.num_warps, "num_stages": config.num_stages}
            programs.append(program | {"name": f"{precision}, {config}"})
    for program, found in zip(programs, compile_all(programs, tmp_path), strict=True):
        assert (found["spills"], found["stack"]) == (0, 0), program["name"]
        assert found["shared"] <= SHARED[90], program["name"]
