#!/usr/bin/env python3
"""Images against Pillow, OpenCV and albumentations; run by hand, results as quoted in the project's notes.

    images.py compare SOURCE PACK   a packed file against Pillow's decoding and OpenCV's resizing of the same archive or folder
    images.py png SOURCE FOLDER     what Pillow decodes, as a folder of PNG files: packing it leaves resizing as the only difference
    images.py fixtures FOLDER       the files in tests/fixtures/dataset (synthetic)

Versions used: pillow 13.0.0, opencv-python-headless 5.0.0.93 (4.12.0.88 gives the same fixtures), albumentations 2.0.8,
numpy 2.
"""

import argparse
import io
import json
import pathlib
import struct
import zipfile
import zlib

import cv2
import numpy as np
from PIL import Image


def read_source(path):
    """Yields (stem, image bytes, mask bytes), ascending."""
    files = {"images": {}, "masks": {}}
    if path.is_dir():
        for part in files:
            files[part] = {p.stem: p.read_bytes for p in (path / part).iterdir()}
    else:
        archive = zipfile.ZipFile(path)
        for name in archive.namelist():
            entry = pathlib.PurePosixPath(name)
            if entry.parent.name in files and not name.endswith("/"):
                files[entry.parent.name][entry.stem] = lambda name=name: archive.read(name)
    for stem in sorted(files["images"], key=str.encode):
        yield stem, files["images"][stem](), files["masks"][stem]()


def read_pack(path):
    """(names, pixels (n, s, s, 3), masks (n, s, s)) of a packed file."""
    head = path.open("rb").read(40)
    magic, version, _, size, count, names_len, _ = struct.unpack("<8sIIIIQQ", head)
    assert magic == b"SEGPEFTD" and version == 1, "not a packed file of version 1"
    start = 40 + 4 * count
    with path.open("rb") as f:
        f.seek(start)
        names = f.read(names_len).decode().splitlines()
    start = -(-(start + names_len) // 4096) * 4096
    records = np.memmap(path, np.uint8, "r", start, (count, 4 * size * size))
    pixels = records[:, : 3 * size * size].reshape(count, size, size, 3)
    return names, pixels, records[:, 3 * size * size :].reshape(count, size, size)


def compare(source, pack):
    names, pixels, masks = read_pack(pack)
    size = pixels.shape[1]
    histogram = np.zeros(256, np.int64)
    mask_pixels = mask_images = 0
    worst_mean = (0.0, "")
    for i, (stem, image, mask) in enumerate(read_source(source)):
        assert names[i] == stem, (names[i], stem)
        rgb = np.asarray(Image.open(io.BytesIO(image)).convert("RGB"))
        expected = cv2.resize(rgb, (size, size), interpolation=cv2.INTER_LINEAR)
        difference = cv2.absdiff(expected, np.ascontiguousarray(pixels[i]))
        histogram += np.bincount(difference.ravel(), minlength=256)
        worst_mean = max(worst_mean, (float(difference.mean()), stem))
        grey = np.asarray(Image.open(io.BytesIO(mask)).convert("L"))
        expected = cv2.resize(grey, (size, size), interpolation=cv2.INTER_NEAREST) > 127
        wrong = int((expected != masks[i].astype(bool)).sum())
        mask_pixels += wrong
        mask_images += wrong > 0
    assert i + 1 == len(names), "the packed file holds other images"
    total = histogram.sum()
    print(f"{len(names)} images at {size}x{size}, OpenCV {cv2.__version__}, Pillow {Image.__version__}")
    print(f"pixels: largest difference {np.flatnonzero(histogram).max()}, mean {histogram @ np.arange(256) / total:.5f}")
    print(f"        largest mean of one image {worst_mean[0]:.4f} ({worst_mean[1]})")
    for level in np.flatnonzero(histogram):
        print(f"        {level:3d} levels: {histogram[level]:12d}  {100 * histogram[level] / total:.6f} %")
    print(f"masks:  {mask_pixels} pixels differ, in {mask_images} images")


def png(source, folder):
    for part in ("images", "masks"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    for stem, image, mask in read_source(source):
        for part, data, mode in (("images", image, "RGB"), ("masks", mask, "L")):
            picture = Image.open(io.BytesIO(data)).convert(mode)
            picture.save(folder / part / f"{stem}.png", compress_level=1)


def noise(seed, *shape):
    """Pixels by formula: the high byte of a multiplicative hash of the index."""
    i = np.arange(np.prod(shape), dtype=np.uint64) + np.uint64(seed)
    return ((i * np.uint64(2654435761) & np.uint64(0xFFFFFFFF)) >> np.uint64(24)).astype(np.uint8).reshape(shape)


def scene(height, width):
    """A smooth coloured scene with an edge in it."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    red = 170 + 60 * np.sin(x / 9) * np.cos(y / 13)
    green = 90 + 50 * np.sin((x + 2 * y) / 17)
    blue = 80 + 40 * np.cos((x - y) / 11)
    inside = (x - 0.6 * width) ** 2 + (y - 0.4 * height) ** 2 < (0.25 * height) ** 2
    rgb = np.stack([red, green, blue], -1)
    rgb[inside] = 0.5 * rgb[inside] + np.array([110, 40, 30], np.float32)
    return np.clip(np.rint(rgb), 0, 255).astype(np.uint8), inside


def fixtures(folder):
    import albumentations

    folder.mkdir(parents=True, exist_ok=True)
    cases = []
    small = [((5, 7), (16, 12)), ((16, 12), (5, 7)), ((1, 1), (4, 4)), ((2, 9), (9, 2)), ((20, 20), (10, 10)), ((13, 11), (13, 11))]
    large = [((622, 530), (512, 512)), ((1920, 1072), (512, 512)), ((332, 487), (512, 512)), ((512, 512), (128, 128)),
             ((1024, 1024), (512, 512)), ((97, 641), (160, 96)), ((513, 511), (512, 512)), ((100, 100), (320, 320))]
    for seed, (source, target) in enumerate(small + large):
        for channels in (1, 3):
            image = noise(seed, source[1], source[0], channels)
            linear = cv2.resize(image, target, interpolation=cv2.INTER_LINEAR)
            case = {"seed": seed, "from": source, "to": target, "channels": channels, "linear_crc": zlib.crc32(linear.tobytes())}
            if channels == 1:
                nearest = cv2.resize(image, target, interpolation=cv2.INTER_NEAREST)
                case["nearest_crc"] = zlib.crc32(nearest.tobytes())
            if (source, target) in small:
                case["linear"] = linear.tobytes().hex()
            cases.append(case)
    (folder / "resize.json").write_text("[\n" + ",\n".join(map(json.dumps, cases)) + "\n]\n")

    transform = albumentations.RandomBrightnessContrast(p=1)
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, 2)
    rows = []
    draws = np.random.default_rng(7).uniform(-0.2, 0.2, (30, 2)).astype(np.float32)
    for contrast, brightness in [*(draws + np.float32([1, 0])), (np.float32(1), np.float32(0)), (np.float32(1.2), np.float32(0.2))]:
        table = transform.apply(ramp, alpha=float(contrast), beta=float(brightness) * 255)[..., 0]
        rows.append({"contrast": float(contrast), "brightness": float(brightness), "table": table.tobytes().hex()})
    (folder / "augment.json").write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")

    rgb, inside = scene(45, 61)
    pictures = {
        "420": ("RGB", {"quality": 90, "subsampling": "4:2:0"}),
        "422": ("RGB", {"quality": 90, "subsampling": "4:2:2"}),
        "444": ("RGB", {"quality": 90, "subsampling": "4:4:4"}),
        "progressive": ("RGB", {"quality": 85, "progressive": True}),
        "restart": ("RGB", {"quality": 85, "restart_marker_rows": 1}),
        "grey": ("L", {"quality": 90}),
        "cmyk": ("CMYK", {"quality": 90}),
    }
    for name, (mode, options) in pictures.items():
        Image.fromarray(rgb).convert(mode).save(folder / f"{name}.jpg", **options)
        Image.open(folder / f"{name}.jpg").convert("RGB").save(folder / f"{name}.pillow.png", optimize=True)
    mask = Image.fromarray(inside.astype(np.uint8) * 255).convert("RGB")
    mask.save(folder / "mask.jpg", quality=60)
    Image.open(folder / "mask.jpg").convert("L").save(folder / "mask.pillow.png", optimize=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for function, arguments in ((compare, ["source", "pack"]), (png, ["source", "folder"]), (fixtures, ["folder"])):
        command = commands.add_parser(function.__name__)
        for argument in arguments:
            command.add_argument(argument, type=pathlib.Path)
        command.set_defaults(run=lambda args, f=function, names=arguments: f(*(getattr(args, n) for n in names)))
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
