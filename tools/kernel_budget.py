#!/usr/bin/env python3
"""What the compiler makes of each kernel, against kernels/budget.txt. Needs nvcc, no GPU.

usage: tools/kernel_budget.py [--write] [NVCC]

Fails on a stack frame, a spill, more registers or shared memory than budgeted, lower occupancy, missing tensor-core
instructions or missing 16-byte loads. --write replaces the budget by what was found; look at the difference before keeping
it. NVCC is taken from the environment or from where tools/get-nvcc.sh put it, if not given.
"""

import math
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUDGET = ROOT / "kernels" / "budget.txt"
# Per multiprocessor: bytes of shared memory, threads, blocks.
LIMITS = {"sm_80": (164 << 10, 2048, 32), "sm_90": (228 << 10, 2048, 32)}
FLAGS = ["-std=c++17", "-O3", "-Werror", "all-warnings"]
HEADER = """\
# What the compiler may use per kernel: tools/kernel_budget.py --write makes this table. `mma` and `wide` count
# tensor-core instructions and 16-byte loads in the PTX; a kernel that has any must keep some.
"""
FIELDS = ["threads", "registers", "shared", "occupancy", "mma", "wide"]


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


def measure(nvcc):
    """{(architecture, kernel): row} and the faults that no budget allows."""
    rows, faults = {}, []
    with tempfile.TemporaryDirectory() as folder:
        ptx = Path(folder) / "kernels.ptx"
        run(nvcc, "-ptx", "-arch=compute_80", "-o", ptx)
        bodies = dict(re.findall(r"\.entry (\w+)\((.*?)\n}", ptx.read_text(), re.S))
        for arch in LIMITS:
            log = run(nvcc, "-cubin", f"-arch={arch}", "-Xptxas", "-v", "-o", Path(folder) / "kernels.cubin")
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
                mma = bodies[name].count("mma.sync")
                wide = len(re.findall(r"ld\.global[.\w]*\.v4\.", bodies[name]))
                rows[arch, name] = [threads, registers, shared, percent, mma, wide]
    return rows, faults


def read():
    rows = {}
    for line in BUDGET.read_text().splitlines():
        if line and not line.startswith("#"):
            arch, name, *numbers = line.split()
            rows[arch, name] = [int(n) for n in numbers]
    return rows


def compare(rows, budget):
    for key in sorted(rows.keys() ^ budget.keys()):
        yield f"{' '.join(key)}: {'not in the budget' if key in rows else 'in the budget, but gone'}"
    for key in sorted(rows.keys() & budget.keys()):
        for field, found, allowed in zip(FIELDS, rows[key], budget[key]):
            if field in ("registers", "shared", "threads"):
                broken = found > allowed
            elif field == "occupancy":
                broken = found < allowed
            else:
                broken = allowed > 0 and found == 0
            if broken:
                yield f"{' '.join(key)}: {field} {found}, budget {allowed}"


def main():
    arguments = [a for a in sys.argv[1:] if a != "--write"]
    nvcc = arguments[0] if arguments else os.environ.get("NVCC", ROOT / ".cuda/nvidia/cu13/bin/nvcc")
    rows, faults = measure(nvcc)
    if "--write" in sys.argv:
        lines = [f"# arch  kernel{' ' * 25}{' '.join(FIELDS)}"]
        lines += [f"{a} {n:32} {' '.join(f'{x:6}' for x in row)}" for (a, n), row in sorted(rows.items())]
        BUDGET.write_text(HEADER + "\n".join(lines) + "\n")
    else:
        faults += compare(rows, read())
    print("\n".join(faults) or f"{len(rows)} kernel images within their budget")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
