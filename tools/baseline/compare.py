"""Interleaves segpeft-native with transformers + peft and prints medians and ratios as a markdown table.

    cargo build --release && python compare.py
    python compare.py --device cuda --compile both

Rounds alternate, and so does who goes first; each side of a round is a process of its own that warms up and then times
a few steps. A machine that slows down on the way slows all sides.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
NAMES = {"fft": "training step, full fine-tuning", "lora": "training step, LoRA r=16", "eval": "evaluation"}
# Their sides, by --compile; ours is the first.
SIDES = {"eager": ["ours", "eager"], "compile": ["ours", "compiled"], "both": ["ours", "eager", "compiled"]}
DEFAULTS = {
    "cpu": {"dtype": "f32", "batch_size": 4, "steps": 3},
    "cuda": {"dtype": "bf16", "batch_size": 64, "steps": 10},
}
# What a measurement reports as its memory: the process's, or on a GPU the device's.
MEMORY = {"cpu": ("peak_rss_bytes", "peak_rss_bytes"), "cuda": ("device_bytes", "peak_device_bytes")}


def run(command: list[str], threads: int, seconds: float) -> dict | None:
    """Runs a measuring process and reads the JSON document on its standard output; None if it fails or takes longer."""
    environment = os.environ | {"RAYON_NUM_THREADS": str(threads), "OMP_NUM_THREADS": str(threads)}
    limit = None if seconds == float("inf") else seconds
    try:
        result = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        print(f"{' '.join(command)}: stopped, the time given with --seconds is over", file=sys.stderr)
        return None
    if result.returncode:
        print(f"{' '.join(command)}: exit code {result.returncode}", file=sys.stderr)
        return None
    return json.loads(result.stdout[result.stdout.index("{") :])


def machine(threads: int) -> str:
    """Processor, threads in use, memory, system."""
    info = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.split(":", 1)[1].strip() for line in info if line.startswith("model name")), platform.machine())
    flags = next((line.split() for line in info if line.startswith("flags")), [])
    vectors = "AVX-512" if "avx512f" in flags else "AVX2" if "avx2" in flags else "no AVX2"
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{model} ({vectors}), {threads} of {os.cpu_count()} threads, {memory:.0f} GiB, {platform.platform()}"


def row(step: str, side: str, sides: dict, options) -> str | None:
    """A row of the table: medians over the rounds in which neither ours nor their `side` failed, and their ratios."""
    rounds = [pair for pair in zip(sides["ours"], sides[side], strict=True) if all(pair)]
    if not rounds:
        return None
    rates = [[options.batch_size / statistics.median(result["seconds"]) for result in pair] for pair in rounds]
    ratios = [ours / theirs for ours, theirs in rates]
    ours, theirs = (statistics.median(rate) for rate in zip(*rates))
    name = NAMES[step] + (", against torch.compile" if side == "compiled" else "")
    peaks = [[r.get(key) for r in results] for key, results in zip(MEMORY[options.device], zip(*rounds))]
    peaks = [statistics.median(peak) / 2**20 if all(peak) else None for peak in peaks]
    memory = [f"{peak:.0f}" if peak else "-" for peak in peaks] + [f"{peaks[0] / peaks[1]:.2f}" if all(peaks) else "-"]
    speed_up = f"{ours / theirs:.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
    return f"| {name} | {ours:.2f} | {theirs:.2f} | {speed_up} | {' | '.join(memory)} |"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--binary", type=Path, default=HERE.parents[1] / "target/release/segpeft-native")
    parser.add_argument("--python", default=sys.executable, help="interpreter with requirements.txt installed")
    parser.add_argument("--step", choices=NAMES, nargs="+", default=list(NAMES))
    parser.add_argument("--device", choices=DEFAULTS, default="cpu")
    parser.add_argument("--compile", choices=SIDES, default="eager", help="PyTorch's side: as it is, compiled, or both")
    parser.add_argument("--dtype", choices=["f32", "bf16"], help="of PyTorch's side (default: f32; bf16 on a GPU)")
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--batch-size", type=int, help="default: 4; 64 on a GPU")
    parser.add_argument("--steps", type=int, help="timed steps per process (default: 3; 10 on a GPU)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop measuring after this long")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--json", type=Path, help="write every measurement here")
    options = parser.parse_args()
    for name, value in DEFAULTS[options.device].items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if not options.binary.exists():
        parser.error(f"{options.binary} does not exist: cargo build --release, or give --binary")
    options.binary = options.binary.resolve()

    common = [f"--device={options.device}", f"--size={options.size}", f"--batch-size={options.batch_size}"]
    common.append(f"--steps={options.steps}")
    names = SIDES[options.compile]
    measured = {step: {side: [] for side in names} for step in options.step}
    failed = False
    end = time.monotonic() + options.seconds

    def left():
        return end - time.monotonic()

    # Rounds outermost: when time runs out, every step has been compared, if less often.
    for round_ in range(options.rounds):
        for step in options.step:
            if left() <= 0:
                print(f"{step} round {round_ + 1}: left out, {options.seconds:.0f} s are over", file=sys.stderr)
                continue
            theirs = [options.python, str(HERE / "baseline.py"), "--step", step, "--dtype", options.dtype, *common]
            commands = {
                "ours": [str(options.binary), "doctor", "--step", step, *common, "--json"],
                "eager": theirs,
                "compiled": [*theirs, "--compile"],
            }
            for side in names if round_ % 2 == 0 else reversed(names):
                result = run(commands[side], options.threads, max(0.0, left()))
                measured[step][side].append(result)
                failed |= result is None and left() > 0
                rate = f"{result['images_per_second']:.2f} images/s" if result else "failed"
                print(f"{step} round {round_ + 1} {side}: {rate}", file=sys.stderr)

    if options.json:
        options.json.write_text(json.dumps(measured, indent=1) + "\n")
    theirs = [result for sides in measured.values() for side in names[1:] for result in sides[side] if result]
    table = [row(step, side, sides, options) for step, sides in measured.items() for side in names[1:]]
    if not any(table):
        sys.exit("nothing to compare: one side failed in every round, or there was no time")
    ours = subprocess.run([options.binary, "--version"], stdout=subprocess.PIPE, text=True).stdout.strip()
    gpu = theirs[0].get("device_name")
    where = f"{gpu}, " if gpu else ""
    precision, unit = ("bf16", "device MiB") if gpu else ("f32", "MiB")
    if any(result and result.get("matrix_units") for sides in measured.values() for result in sides["ours"]):
        precision += ", in evaluation as two bf16 in matrix units"
    print(f"{where}{machine(options.threads)}\n")
    print(f"{ours} ({precision}) against {', '.join(f'{k} {v}' for k, v in theirs[0]['versions'].items())} ", end="")
    print(f"({options.dtype}); {options.size}x{options.size}, batch {options.batch_size}; ", end="")
    rounds = sorted({len(sides["ours"]) for sides in measured.values()})
    print(f"medians of {' or '.join(map(str, rounds))} rounds of {options.steps} steps\n")
    print("| | ours, images/s | PyTorch, images/s | speed-up (range over rounds) ", end="")
    print(f"| ours, {unit} | PyTorch, {unit} | memory |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    print("\n".join(filter(None, table)))
    sys.exit(failed or not all(table))


if __name__ == "__main__":
    main()
