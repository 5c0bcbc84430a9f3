"""Compiles Triton programs ahead of time and reads what came out. Needs Triton alone, no PyTorch and no GPU.

python compile_programs.py programs.py < cases.json > results.json
"""

import importlib.util
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


def compile_case(programs, case: dict) -> dict:
    """case: kernel, capability, types and constants of its parameters by name, the aligned ones, options."""
    kernel = getattr(programs, case["kernel"])
    signature, constants, attributes = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in case["constants"]:
            signature[name], constants[i,] = "constexpr", case["constants"][name]
            continue
        signature[name] = case["types"][name]
        if name in case["aligned"]:
            attributes[i,] = [["tt.divisibility", 16]]
    compiled = triton.compile(
        ASTSource(kernel, signature, constants, attributes),
        target=GPUTarget("cuda", case["capability"], 32),
        options=case["options"],
    )
    return {"case": case["name"], "version": triton.__version__, **inspect(compiled)}


def inspect(compiled) -> dict:
    """Registers, bytes of shared memory and of the stack, and instructions of a compiled program."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.run([TOOLS / "cuobjdump", what, file.name], capture_output=True, text=True, check=True).stdout
            for what in ("-res-usage", "-sass")
        )
    count = {name: len(re.findall(rf"\s{name}\b", code)) for name in ("STL", "LDL", "FFMA", "LDGSTS")}
    return {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "stack": int(re.search(r"STACK:(\d+)", usage)[1]),
        "shared": compiled.metadata.shared,
        "spills": count["STL"] + count["LDL"],
        "ffma": count["FFMA"],
        "tensor": sorted(set(re.findall(r"\s(HG?MMA\.\S+)", code))),
        "copies": count["LDGSTS"],
        "wide_copies": len(re.findall(r"\sLDGSTS\S*\.128\b", code)),
        "wide_loads": len(re.findall(r"\sLDG\.\S*128\b", code)),
        # Starts times the pitch, in 64 bits.
        "wide_products": len(re.findall(r"arith\.muli [^:\n]*%c\d+_i64 : i64", compiled.asm["ttir"])),
    }


def main() -> None:
    spec = importlib.util.spec_from_file_location("programs", sys.argv[1])
    programs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(programs)
    json.dump([compile_case(programs, case) for case in json.load(sys.stdin)], sys.stdout)


if __name__ == "__main__":
    main()
