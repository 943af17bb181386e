"""Interleaves segpeft-native with transformers + peft and prints medians and ratios as a markdown table.

    cargo build --release && python compare.py

Rounds alternate, and so does who goes first; each side of a round is a process of its own that warms up and then times
a few steps. A machine that slows down on the way slows both.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
NAMES = {"fft": "training step, full fine-tuning", "lora": "training step, LoRA r=16", "eval": "evaluation"}


def run(command: list[str], threads: int) -> dict:
    """Runs a measuring process and reads the JSON document on its standard output."""
    environment = os.environ | {"RAYON_NUM_THREADS": str(threads), "OMP_NUM_THREADS": str(threads)}
    result = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
    if result.returncode:
        sys.exit(f"{' '.join(command)}: exit code {result.returncode}")
    return json.loads(result.stdout[result.stdout.index("{") :])


def machine(threads: int) -> str:
    """Processor, threads in use, memory, system."""
    info = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.split(":", 1)[1].strip() for line in info if line.startswith("model name")), platform.machine())
    flags = next((line.split() for line in info if line.startswith("flags")), [])
    vectors = "AVX-512" if "avx512f" in flags else "AVX2" if "avx2" in flags else "no AVX2"
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{model} ({vectors}), {threads} of {os.cpu_count()} threads, {memory:.0f} GiB, {platform.platform()}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--binary", type=Path, default=HERE.parents[1] / "target/release/segpeft-native")
    parser.add_argument("--python", default=sys.executable, help="interpreter with requirements.txt installed")
    parser.add_argument("--step", choices=NAMES, nargs="+", default=list(NAMES))
    parser.add_argument("--dtype", choices=["f32", "bf16"], default="f32", help="of PyTorch's side")
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--steps", type=int, default=3, help="timed steps per process")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--json", type=Path, help="write every measurement here")
    options = parser.parse_args()
    if not options.binary.exists():
        parser.error(f"{options.binary} does not exist: cargo build --release, or give --binary")

    common = [f"--size={options.size}", f"--batch-size={options.batch_size}", f"--steps={options.steps}"]
    measured = {step: {"ours": [], "theirs": []} for step in options.step}
    for step in options.step:
        commands = {
            "ours": [str(options.binary), "doctor", "--step", step, *common, "--json"],
            "theirs": [options.python, str(HERE / "baseline.py"), "--step", step, "--dtype", options.dtype, *common],
        }
        for round_ in range(options.rounds):
            for side in ("ours", "theirs") if round_ % 2 == 0 else ("theirs", "ours"):
                result = run(commands[side], options.threads)
                measured[step][side].append(result)
                print(f"{step} round {round_ + 1} {side}: {result['images_per_second']:.2f} images/s", file=sys.stderr)

    versions = measured[options.step[0]]["theirs"][0]["versions"]
    ours = subprocess.run([options.binary, "--version"], stdout=subprocess.PIPE, text=True).stdout.strip()
    print(f"{machine(options.threads)}\n")
    print(f"{ours} (f32) against {', '.join(f'{k} {v}' for k, v in versions.items())} ({options.dtype}); ", end="")
    print(f"{options.size}x{options.size}, batch {options.batch_size}; ", end="")
    print(f"medians of {options.rounds} rounds of {options.steps} steps\n")
    print("| | ours, images/s | PyTorch, images/s | speed-up (range over rounds) | ours, MiB | PyTorch, MiB | memory |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for step, sides in measured.items():
        rate = {s: [options.batch_size / statistics.median(r["seconds"]) for r in sides[s]] for s in sides}
        peak = {s: statistics.median(r["peak_rss_bytes"] for r in sides[s]) / 2**20 for s in sides}
        middle = {s: statistics.median(rate[s]) for s in sides}
        ratios = [a / b for a, b in zip(rate["ours"], rate["theirs"], strict=True)]
        print(
            f"| {NAMES[step]} | {middle['ours']:.2f} | {middle['theirs']:.2f} "
            f"| {middle['ours'] / middle['theirs']:.2f} ({min(ratios):.2f}-{max(ratios):.2f}) "
            f"| {peak['ours']:.0f} | {peak['theirs']:.0f} | {peak['ours'] / peak['theirs']:.2f} |"
        )
    if options.json:
        options.json.write_text(json.dumps(measured, indent=1) + "\n")


if __name__ == "__main__":
    main()
