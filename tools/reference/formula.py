"""Weights and pictures from a formula, so that both sides of a comparison compute them and no file holds them.

Integer and f64 arithmetic throughout, rounded to f32 once at the end: the results are exact, not merely close.
"""

import numpy as np

MEAN = np.array([0.485, 0.456, 0.406], np.float32)
STD = np.array([0.229, 0.224, 0.225], np.float32)
IGNORE = 255


def fnv1a(data: bytes) -> int:
    """FNV-1a, 64 bits."""
    h = 0xCBF29CE484222325
    for byte in data:
        h = (h ^ byte) * 0x100000001B3 & 0xFFFFFFFFFFFFFFFF
    return h


def words(name: str, count: int) -> np.ndarray:
    """`count` 64-bit words of the stream `name`: the splitmix64 finaliser of FNV-1a(name) + i."""
    with np.errstate(over="ignore"):
        z = np.uint64(fnv1a(name.encode())) + np.arange(count, dtype=np.uint64)
        z = z + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The tensor called `name` (transformers 4's name) in PyTorch's layout: f32, int64 for a counter."""
    if name.endswith("num_batches_tracked"):
        return np.zeros(shape, np.int64)
    count = int(np.prod(shape))
    u = (words(name, count) >> np.uint64(40)).astype(np.float64) / float(1 << 24)
    v = 2.0 * u - 1.0
    if name.endswith("running_var"):
        x = 0.5 + u
    elif name.endswith("running_mean"):
        x = 0.2 * v
    elif name.endswith("lora_B.weight"):
        x = 0.05 * v
    elif len(shape) >= 2:
        x = v * np.sqrt(3.0 / float(np.prod(shape[1:])))
    elif name.endswith(".weight"):
        x = 1.0 + 0.2 * v
    elif name.endswith(".bias"):
        x = 0.1 * v
    else:
        raise ValueError(f"{name}: the formula has no rule for this name")
    return x.astype(np.float32).reshape(shape)


def picture(k: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Picture number `k`: pixels u8 (size, size, 3) and mask u8 (size, size), 0 or 1: a disc on a noisy ground."""
    h = [int(w) for w in words(f"shape{k}", 3)]
    cx = size // 4 + h[0] % (size // 2)
    cy = size // 4 + h[1] % (size // 2)
    r = size // 8 + h[2] % (size // 8)
    y, x = np.mgrid[0:size, 0:size]
    mask = ((y - cy) ** 2 + (x - cx) ** 2 < r * r).astype(np.uint8)
    noise = ((words(f"image{k}", size * size * 3) >> np.uint64(56)) % np.uint64(60)).astype(np.int64)
    pixels = 60 + 20 * np.arange(3) + 70 * mask[..., None].astype(np.int64) + noise.reshape(size, size, 3)
    return pixels.astype(np.uint8), mask


def three_labels(mask: np.ndarray) -> np.ndarray:
    """A mask (size, size) with a third class and ignored pixels: the last quarter of the rows becomes 2, then the first
    two rows, and the column size/2, become IGNORE."""
    size = mask.shape[0]
    labels = mask.copy()
    labels[3 * size // 4 :] = 2
    labels[:2] = IGNORE
    labels[:, size // 2] = IGNORE
    return labels


def normalise(pixels: np.ndarray) -> np.ndarray:
    """u8 (..., H, W, 3) to f32 (..., 3, H, W) as transformers' image processor does: scaled in f64, rounded to f32,
    then (x - mean) / std in f32."""
    scaled = (pixels.astype(np.float64) * (1 / 255)).astype(np.float32)
    return np.ascontiguousarray(np.moveaxis((scaled - MEAN) / STD, -1, -3))


def strided(values: np.ndarray, most: int = 256) -> np.ndarray:
    """Up to `most` elements of `values` in C order: index j * numel // n for j in 0..n, n = min(numel, most)."""
    flat = values.reshape(-1)
    n = min(flat.size, most)
    return flat[np.arange(n) * flat.size // n]
