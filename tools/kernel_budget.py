#!/usr/bin/env python3
"""What the compiler makes of each kernel, against kernels/budget.txt. Needs nvcc and nvdisasm, no GPU.

usage: tools/kernel_budget.py [--write] [NVCC]

Fails on a stack frame, a spill, more registers or shared memory than budgeted, lower occupancy, fewer tensor-core
instructions, or fewer 16-byte loads or stores, all as the machine code has them. --write replaces the budget by what was
found; look at the difference before keeping it. NVCC and NVDISASM are taken from the environment or from where
tools/get-nvcc.sh put them, if not given; nvdisasm also from beside nvcc and from PATH.
"""

import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUDGET = ROOT / "kernels" / "budget.txt"
# Per multiprocessor: bytes of shared memory, threads, blocks.
LIMITS = {"sm_80": (164 << 10, 2048, 32), "sm_90": (228 << 10, 2048, 32)}
FLAGS = ["-std=c++17", "-O3", "-Werror", "all-warnings"]
HEADER = """\
# What the compiler may use per kernel: tools/kernel_budget.py --write makes this table. `mma`, `loads` and `stores` count
# tensor-core instructions and 16-byte accesses of device memory in the machine code; a kernel must have as many.
"""
FIELDS = ["threads", "registers", "shared", "occupancy", "mma", "loads", "stores"]
# Instructions of the machine code by field. LD and ST reach device memory through generic addresses, LDGSTS copies from it
# to shared memory.
INSTRUCTIONS = {
    "mma": r"\b[A-Z]*MMA\.",
    "loads": r"\b(?:LDG|LD|LDGSTS)\.(?:\w+\.)*128\b",
    "stores": r"\b(?:STG|ST)\.(?:\w+\.)*128\b",
}


def occupancy(arch, registers, shared, threads):
    """Share of the multiprocessor's threads that can be resident."""
    shared_all, threads_all, blocks_all = LIMITS[arch]
    warps = math.ceil(threads / 32)
    # Four partitions of 16384 registers; a warp takes them in units of 256.
    per_warp = math.ceil(max(registers, 1) * 32 / 256) * 256
    by_registers = 16384 // per_warp * 4 // warps
    # The system keeps 1 KiB per block; units of 128 bytes.
    by_shared = shared_all // (math.ceil((shared + 1024) / 128) * 128)
    blocks = min(blocks_all, threads_all // 32 // warps, by_registers, by_shared)
    return blocks * warps / (threads_all // 32)


def run(nvcc, *arguments):
    done = subprocess.run([nvcc, *FLAGS, *arguments, ROOT / "kernels/all.cu"], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return done.stderr


def find_nvdisasm(nvcc):
    """nvdisasm of the environment, of tools/get-nvcc.sh, beside nvcc, or in PATH."""
    fetched = ROOT / ".cuda/nvdisasm/nvidia/cu13/bin/nvdisasm"
    places = [os.environ.get("NVDISASM"), fetched, Path(nvcc).parent / "nvdisasm", shutil.which("nvdisasm")]
    found = next((place for place in places if place and os.access(place, os.X_OK)), None)
    return found or sys.exit("no nvdisasm: tools/get-nvcc.sh brings it, or name it in NVDISASM")


def machine_code(nvdisasm, cubin):
    """{kernel: its instructions}"""
    done = subprocess.run([nvdisasm, "-c", cubin], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    parts = re.split(r"^\.text\.(\w+):$", done.stdout, flags=re.M)
    return dict(zip(parts[1::2], parts[2::2]))


def measure(nvcc, nvdisasm):
    """{(architecture, kernel): row} and the faults that no budget allows."""
    rows, faults = {}, []
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor() as pool:
        ptx = Path(folder) / "kernels.ptx"
        cubins = {arch: Path(folder) / f"{arch}.cubin" for arch in LIMITS}
        made = pool.submit(run, nvcc, "-ptx", "-arch=compute_80", "-o", ptx)
        compile_for = lambda arch: run(nvcc, "-cubin", f"-arch={arch}", "-Xptxas", "-v", "-o", cubins[arch])
        logs = dict(zip(LIMITS, pool.map(compile_for, LIMITS)))
        made.result()
        bodies = dict(re.findall(r"\.entry (\w+)\((.*?)\n}", ptx.read_text(), re.S))
        for arch, cubin in cubins.items():
            log = logs[arch]
            code = machine_code(nvdisasm, cubin)
            for part in log.split("Compiling entry function '")[1:]:
                name = part.split("'")[0]
                stack, stores, loads = map(int, re.search(r"(\d+) bytes stack.*?(\d+) bytes spill stores, (\d+)", part).groups())
                if stack or stores or loads:
                    faults.append(f"{arch} {name}: {stack} bytes of stack, {stores} and {loads} bytes spilled")
                threads = int(re.search(r"\.maxntid (\d+)", bodies[name])[1])
                registers = int(re.search(r"Used (\d+) registers", part)[1])
                shared = re.search(r"(\d+) bytes smem", part)
                shared = int(shared[1]) if shared else 0
                percent = int(100 * occupancy(arch, registers, shared, threads))
                counts = [len(re.findall(pattern, code[name])) for pattern in INSTRUCTIONS.values()]
                rows[arch, name] = [threads, registers, shared, percent, *counts]
    return rows, faults


def read():
    rows = {}
    for line in BUDGET.read_text().splitlines():
        if line and not line.startswith("#"):
            arch, name, *numbers = line.split()
            if len(numbers) != len(FIELDS):
                sys.exit(f"{BUDGET}: {line.strip()!r} has not the columns {' '.join(FIELDS)}; make it anew with --write")
            rows[arch, name] = [int(n) for n in numbers]
    return rows


def compare(rows, budget):
    for key in sorted(rows.keys() ^ budget.keys()):
        yield f"{' '.join(key)}: {'not in the budget' if key in rows else 'in the budget, but gone'}"
    for key in sorted(rows.keys() & budget.keys()):
        for field, found, allowed in zip(FIELDS, rows[key], budget[key]):
            more_is_worse = field in ("registers", "shared", "threads")
            if found > allowed if more_is_worse else found < allowed:
                yield f"{' '.join(key)}: {field} {found}, budget {allowed}"


def main():
    arguments = [a for a in sys.argv[1:] if a != "--write"]
    nvcc = arguments[0] if arguments else os.environ.get("NVCC") or ROOT / ".cuda/nvidia/cu13/bin/nvcc"
    budget = None if "--write" in sys.argv else read()
    rows, faults = measure(nvcc, find_nvdisasm(nvcc))
    if budget is None:
        lines = [f"# arch  kernel{' ' * 25}{' '.join(FIELDS)}"]
        lines += [f"{a} {n:32} {' '.join(f'{x:6}' for x in row)}" for (a, n), row in sorted(rows.items())]
        BUDGET.write_text(HEADER + "\n".join(lines) + "\n")
    else:
        faults += compare(rows, budget)
    print("\n".join(faults) or f"{len(rows)} kernel images within their budget")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
