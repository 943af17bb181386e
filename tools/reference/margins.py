"""How close the decoder's ReLU comes to its kink, in f64, for sets of pictures; fixtures.py takes sets that stay clear.

Where rounding moves an input of the ReLU across zero, one element of the gradient appears or vanishes, and every
gradient below changes by up to 1e-4, in any f32 implementation. Such a fixture could not tell right from wrong.

    python margins.py --case b0 --count 2 --upto 200
"""

import argparse

import numpy as np
import torch

import fixtures
import formula


def margin(model, pictures: list[int], image_size: int) -> float:
    """Smallest |input of the ReLU| of a model in training mode."""
    seen = []
    norm = [m for n, m in model.named_modules() if n.endswith("batch_norm")][-1]
    handle = norm.register_forward_hook(lambda module, inputs, output: seen.append(output.abs().min().item()))
    pixels = np.stack([formula.picture(k, image_size)[0] for k in pictures])
    with torch.no_grad():
        model.train()(pixel_values=torch.from_numpy(formula.normalise(pixels)).double())
    handle.remove()
    return seen[0]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", choices=["tiny", "b0"], default="b0")
    parser.add_argument("--count", type=int, default=2, help="pictures in a batch")
    parser.add_argument("--upto", type=int, default=40, help="highest picture number")
    options = parser.parse_args()
    torch.set_num_threads(1)
    cases, size = {"tiny": (fixtures.TINY_CASES, 64), "b0": (fixtures.B0_CASES, 128)}[options.case]
    for name, case in cases.items():
        model = fixtures.build(options.case, case).double()
        sets = [list(range(k, k + options.count)) for k in range(0, options.upto, options.count)]
        results = sorted(((margin(model, s, size), s) for s in sets), reverse=True)
        print(name, " ".join(f"{value:.1e} {pictures}" for value, pictures in results[:4]))


if __name__ == "__main__":
    main()
