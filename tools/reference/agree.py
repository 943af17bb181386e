"""How far two outputs of fixtures.py are apart, in the measures the Rust tests use.

python agree.py REFERENCE OTHER            # prints a table
python agree.py REFERENCE --also f32=DIR two_threads=DIR --out agreement.json
"""

import argparse
import json
import re
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

# Their true gradient in training mode is 0 (see PARITY): what they receive is rounding noise.
ZERO_GRADIENT = re.compile(r"(attention\.self\.key|linear_c\.\d+\.proj|encoder\.layer_norm\.3)\.bias$")


def tensors(a: Path, b: Path) -> dict[str, list[tuple[float, str]]]:
    """Distances by group.

    Gradients, buffers: relative L2. `updated`, `weights`: L2 as a share of the distance travelled. Logits: largest
    difference as a share of the largest logit. `*_zero`, the tensors whose true gradient is zero: largest absolute
    difference.
    """
    groups = {}
    for file in sorted(x.name for x in a.glob("*.safetensors") if (b / x.name).exists()):
        left, right = load_file(a / file), load_file(b / file)
        numbers = json.loads((a / file).with_suffix(".json").read_text())["numbers"]
        assert left.keys() == right.keys(), f"{file}: different tensors"
        for name, x in left.items():
            case, kind, *rest = name.split("/")
            x, y = x.astype(np.float64), right[name].astype(np.float64)
            gap = np.linalg.norm(x - y)
            if kind.startswith("logits"):
                value = np.abs(x - y).max() / np.abs(x).max()
            elif kind in ("grad", "updated", "weights") and ZERO_GRADIENT.search(name):
                kind, value = f"{kind}_zero", np.abs(x - y).max()
            elif kind in ("updated", "weights"):
                value = gap / max(numbers[case]["distance_strided"][rest[0]], 1e-30)
            else:
                value = gap / max(np.linalg.norm(x), 1e-30)
            groups.setdefault(f"{file.split('.')[0]}/{case}/{kind}", []).append((float(value), "/".join(rest)))
    return groups


def histories(a: Path, b: Path) -> dict[str, list[tuple[float, str]]]:
    """Losses (absolute difference), gradient norms (relative) and metrics (absolute)."""
    groups = {}

    def note(key, value, where):
        groups.setdefault(key, []).append((abs(value), where))

    for file in sorted(x.name for x in a.glob("*.json") if x.with_suffix(".safetensors").exists()):
        if not (b / file).exists():
            continue
        left, right = (json.loads((d / file).read_text())["numbers"] for d in (a, b))
        for case in left:
            prefix = f"{file.split('.')[0]}/{case}"
            for key in ("loss_eval", "loss_train"):
                if key in left[case]:
                    note(f"{prefix}/{key}", left[case][key] - right[case][key], "")
            if "grad_norm" in left[case]:
                note(f"{prefix}/grad_norm", right[case]["grad_norm"] / left[case]["grad_norm"] - 1, "")
            for x, y in zip(left[case].get("history", []), right[case].get("history", []), strict=True):
                for key in x:
                    where = f"epoch {x['epoch']:g}"
                    if key in ("epoch", "step", "eval_confusion") or isinstance(x[key], list):
                        continue
                    relative = key in ("grad_norm", "learning_rate")
                    note(f"{prefix}/{key}", y[key] / x[key] - 1 if relative else y[key] - x[key], where)
    return groups


def compare(a: Path, b: Path) -> dict:
    """Median, maximum and where the maximum is, by group."""
    groups = tensors(a, b) | histories(a, b)
    return {
        group: {"median": float(np.median([v for v, _ in pairs])), "max": max(pairs)[0], "at": max(pairs)[1]}
        for group, pairs in groups.items()
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("reference", type=Path)
    parser.add_argument("other", type=Path, nargs="?")
    parser.add_argument("--also", nargs="*", default=[], metavar="LABEL=DIR")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    others = dict(item.split("=", 1) for item in options.also)
    if options.other:
        others["other"] = options.other
    results = {label: compare(options.reference, Path(d)) for label, d in others.items()}
    for label, groups in results.items():
        print(f"{label}\n{'group':48} {'median':>9} {'max':>9}  at")
        for group, row in groups.items():
            print(f"{group:48} {row['median']:9.1e} {row['max']:9.1e}  {row['at']}")
    if options.out:
        short = {
            label: {g: [float(f"{r['median']:.2e}"), float(f"{r['max']:.2e}")] for g, r in groups.items()}
            for label, groups in results.items()
        }
        text = re.sub(r"\[\s+(\S+)\s+(\S+)\s+\]", r"[\1 \2]", json.dumps(short, indent=1))
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
