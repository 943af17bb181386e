"""Trains with transformers 4 and peft what a `segpeft-native train` run trained; prints both histories side by side.

The run must be comparable: --device cpu --no-augment --no-shuffle --drop-path 0 --classifier-dropout 0, started from a
two-label checkpoint and, for LoRA, from an adapter (make_start.py writes both). It may still be going on: the epochs
in its history are compared.

    segpeft-native train --data kvasir-seg.zip --model start/model --adapter start/adapter --method lora --rank 16 \\
        --lora-alpha 32 --size 128 --epochs 3 --batch-size 8 --grad-accum 2 --no-augment --no-shuffle --drop-path 0 \\
        --classifier-dropout 0 --device cpu --out run
    python compare_run.py --run run --data kvasir-seg.zip --model start/model --adapter start/adapter --size 128 \\
        --epochs 3 --batch-size 8 --grad-accum 2
"""

import argparse
import csv
import io
import json
import warnings
import zipfile
from pathlib import Path

import cv2
import numpy as np
import peft
import torch
import transformers
from PIL import Image

import trainer

COLUMNS = ["loss", "grad_norm", "learning_rate", "eval_loss", "eval_mean_iou", "eval_mean_dice", "eval_accuracy"]
RELATIVE = ("grad_norm", "learning_rate")


def files(source: Path) -> dict[str, dict[str, callable]]:
    """Readers of the images and masks of an archive or a folder: {"images": {stem: read}, "masks": {...}}."""
    found = {"images": {}, "masks": {}}
    if source.is_dir():
        paths = [(p, p.read_bytes) for p in source.rglob("*")]
    else:
        archive = zipfile.ZipFile(source)
        paths = [(Path(n), lambda n=n: archive.read(n)) for n in archive.namelist()]
    for path, read in paths:
        if path.parent.name in found and path.suffix.lower() in (".jpg", ".jpeg", ".png"):
            found[path.parent.name][path.stem] = read
    return found


def load(source: Path, stems: list[str], size: int) -> trainer.Pictures:
    """Pictures decoded by Pillow, resized by OpenCV (bilinear; masks nearest), masks cut at > 127."""
    found = files(source)
    pixels = np.empty((len(stems), size, size, 3), np.uint8)
    masks = np.empty((len(stems), size, size), np.uint8)
    for i, stem in enumerate(stems):
        image = np.asarray(Image.open(io.BytesIO(found["images"][stem]())).convert("RGB"))
        mask = np.asarray(Image.open(io.BytesIO(found["masks"][stem]())).convert("L"))
        pixels[i] = cv2.resize(image, (size, size), interpolation=cv2.INTER_LINEAR)
        masks[i] = cv2.resize(mask, (size, size), interpolation=cv2.INTER_NEAREST) > 127
    return trainer.Pictures(pixels, masks)


def by_epoch(rows: list[dict]) -> dict[int, dict[str, float]]:
    """First value of each column in each epoch (a final evaluation comes after the last epoch's own)."""
    epochs = {}
    for row in rows:
        for column in COLUMNS:
            if row.get(column) not in (None, ""):
                epochs.setdefault(round(float(row["epoch"])), {}).setdefault(column, float(row[column]))
    return epochs


def differences(ours: dict, theirs: dict) -> list[tuple[int, str, float, float, float]]:
    """(epoch, column, ours, theirs, difference), relative for gradient norm and learning rate."""
    rows = []
    for epoch in sorted(ours.keys() & theirs.keys()):
        for column in (c for c in COLUMNS if c in ours[epoch] and c in theirs[epoch]):
            a, b = ours[epoch][column], theirs[epoch][column]
            rows.append((epoch, column, a, b, (a / b - 1 if b else a) if column in RELATIVE else a - b))
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, help="output folder of segpeft-native train")
    parser.add_argument("--data", type=Path, required=True, help="archive, or folder with images/ and masks/")
    parser.add_argument("--model", type=Path, required=True, help="two-label checkpoint directory the run started from")
    parser.add_argument("--adapter", type=Path, help="peft directory the run started from; without: full fine-tuning")
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--epochs", type=int, default=50, help="of the schedule, as given to the run")
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--grad-accum", type=int, default=4)
    parser.add_argument("--eval-batch-size", type=int, default=128)
    parser.add_argument("--warmup-ratio", type=float, default=0.1)
    parser.add_argument("--weight-decay", type=float, default=0.0)
    parser.add_argument("--stop-after", type=int, help="compare this many epochs only")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path, help="write both histories here")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)
    transformers.logging.set_verbosity_error()
    if options.threads:
        torch.set_num_threads(options.threads)

    with open(options.run / "training_history.csv", newline="") as file:
        ours = by_epoch(list(csv.DictReader(file)))
    done = [epoch for epoch, row in ours.items() if "eval_loss" in row and "loss" in row]
    if not done:
        parser.error(f"{options.run}/training_history.csv holds no finished epoch yet")
    train_set, eval_set = (
        load(options.data, (options.run / name).read_text().splitlines(), options.size)
        for name in ("train.txt", "val.txt")
    )
    model = transformers.SegformerForSemanticSegmentation.from_pretrained(
        options.model, drop_path_rate=0.0, classifier_dropout_prob=0.0
    )
    if options.adapter:
        model = peft.PeftModel.from_pretrained(model, options.adapter, is_trainable=True)

    def progress(row):
        print("theirs:", {k: row[k] for k in ("epoch", *COLUMNS) if k in row}, flush=True)

    history = trainer.train(
        model,
        train_set,
        eval_set,
        epochs=options.epochs,
        lr=options.lr,
        batch_size=options.batch_size,
        grad_accum=options.grad_accum,
        eval_batch_size=options.eval_batch_size,
        warmup_ratio=options.warmup_ratio,
        max_grad_norm=1.0,
        weight_decay=options.weight_decay,
        stop_after=min(max(done), options.stop_after or max(done)),
        on_log=progress,
    )
    rows = differences(ours, by_epoch(history))
    print(f"\n{'epoch':>5} {'':16} {'ours':>14} {'theirs':>14} {'difference':>11}")
    for epoch, column, a, b, gap in rows:
        print(f"{epoch:5} {column:16} {a:14.8g} {b:14.8g} {gap:11.1e}{' relative' if column in RELATIVE else ''}")
    largest = {c: max((abs(r[4]) for r in rows if r[1] == c), default=None) for c in COLUMNS}
    print("\nlargest:", ", ".join(f"{c} {gap:.1e}" for c, gap in largest.items() if gap is not None))
    if options.json:
        options.json.write_text(json.dumps({"ours": ours, "theirs": history}, indent=1) + "\n")


if __name__ == "__main__":
    main()
