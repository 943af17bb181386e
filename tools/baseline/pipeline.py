"""The whole notebook pipeline beside `segpeft-native train`: images from disk, albumentations, the Trainer, metrics in the
manner of the `evaluate` library, final evaluations on both splits. Prints a markdown table.

    python pipeline.py --data FOLDER --epochs 2 --limit 20

FOLDER holds images/ and masks/. Both sides start from the same weights, train on the same split with the same options and
evaluate the same images; each runs in a process of its own, with all it needs to start counted.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from baseline import CONFIG, TARGETS

HERE = Path(__file__).resolve().parent


def theirs(options) -> dict:
    """The notebook's program; returns seconds, final Dice of the validation split, peak memory."""
    started = time.perf_counter()
    import albumentations as A
    import cv2
    import numpy as np
    import peft
    import torch
    import transformers

    size = options.size
    augment = A.Compose(
        [
            A.Resize(size, size),
            A.HorizontalFlip(p=0.5),
            A.RandomBrightnessContrast(p=0.2, brightness_limit=0.2, contrast_limit=0.2),
        ]
    )
    processor = transformers.SegformerImageProcessor(do_resize=False, do_reduce_labels=False)

    class Pairs(torch.utils.data.Dataset):
        def __init__(self, names):
            self.names = names

        def __len__(self):
            return len(self.names)

        def __getitem__(self, i):
            find = lambda folder: next((options.data / folder).glob(f"{self.names[i]}.*"))
            image = cv2.cvtColor(cv2.imread(str(find("images"))), cv2.COLOR_BGR2RGB)
            mask = (cv2.imread(str(find("masks")), cv2.IMREAD_GRAYSCALE) > 127).astype(np.uint8)
            pair = augment(image=image, mask=mask)
            pixels = processor(images=pair["image"], return_tensors="pt")["pixel_values"][0]
            return {"pixel_values": pixels, "labels": torch.from_numpy(pair["mask"]).long()}

    def predict(logits, labels):
        full = torch.nn.functional.interpolate(logits, labels.shape[-2:], mode="bilinear", align_corners=False)
        return full.argmax(1)

    def measure(prediction):
        """Per image, by histograms, as the library counts; then Dice over all pixels of the split."""
        hit, predicted, truth = np.zeros(2), np.zeros(2), np.zeros(2)
        for p, t in zip(prediction.predictions, prediction.label_ids, strict=True):
            hit += np.histogram(p[p == t], bins=2, range=(0, 1))[0]
            predicted += np.histogram(p, bins=2, range=(0, 1))[0]
            truth += np.histogram(t, bins=2, range=(0, 1))[0]
        return {
            "mean_iou": float(np.nanmean(hit / (predicted + truth - hit))),
            "accuracy": float(np.nanmean(hit / truth)),
            "mean_dice": float(np.nanmean(2 * hit / (predicted + truth))),
        }

    transformers.set_seed(42)
    model = transformers.SegformerForSemanticSegmentation.from_pretrained(options.start)
    if options.method == "lora":
        config = peft.LoraConfig(r=16, lora_alpha=32, target_modules=TARGETS)
        model = peft.get_peft_model(model, config)
    names = {split: (options.split / f"{split}.txt").read_text().split() for split in ("train", "val")}
    train, val = Pairs(names["train"]), Pairs(names["val"])
    arguments = transformers.TrainingArguments(
        output_dir=tempfile.mkdtemp(),
        num_train_epochs=options.epochs,
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=options.batch_size,
        learning_rate=5e-4,
        lr_scheduler_type="cosine",
        warmup_steps=0.1,  # as a share of all updates
        eval_strategy="epoch",
        save_strategy="epoch",
        logging_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        remove_unused_columns=False,
        label_names=["labels"],
        bf16=options.dtype == "bf16",
        use_cpu=options.device == "cpu",
        dataloader_num_workers=options.workers,
        disable_tqdm=True,
        report_to=[],
    )
    trainer = transformers.Trainer(
        model=model,
        args=arguments,
        train_dataset=train,
        eval_dataset=val,
        compute_metrics=measure,
        preprocess_logits_for_metrics=predict,
    )
    trainer.train()
    final = trainer.evaluate()
    trainer.evaluate(train)
    shutil.rmtree(arguments.output_dir)
    return {
        "seconds": time.perf_counter() - started,
        "dice": final["eval_mean_dice"],
        "bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def ours(options, out: Path) -> dict:
    """`segpeft-native train` with the same options; leaves its split in `out`."""
    command = [options.binary, "train", "--data", options.data, "--model", options.start, "--out", out]
    command += ["--method", options.method, "--size", options.size, "--epochs", options.epochs, "--grad-accum", 1]
    command += ["--batch-size", options.batch_size, "--eval-batch-size", options.batch_size, "--quiet"]
    command += ["--device", options.device]
    started = time.perf_counter()
    process = subprocess.Popen([str(part) for part in command], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"segpeft-native train failed with status {status}")
    seconds = time.perf_counter() - started
    record = json.loads((out / "all_metrics.json").read_text())
    return {
        "seconds": seconds,
        "dice": record["final_evaluation"]["eval_mean_dice"],
        "bytes": usage.ru_maxrss * 1024,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with images/ and masks/")
    parser.add_argument("--binary", type=Path, default=HERE.parents[1] / "target/release/segpeft-native")
    parser.add_argument("--method", choices=["fft", "lora"], default="lora")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["f32", "bf16"], help="of PyTorch's side (default: f32; bf16 on a GPU)")
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--batch-size", type=int, help="default: 4; 64 on a GPU")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--limit", type=int, help="use the first so many images only")
    parser.add_argument("--workers", type=int, default=0, help="loader processes of PyTorch's side")
    parser.add_argument("--start", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--split", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    gpu = options.device == "cuda"
    options.dtype = options.dtype or ("bf16" if gpu else "f32")
    options.batch_size = options.batch_size or (64 if gpu else 4)
    if options.split:
        print(json.dumps(theirs(options)))
        return

    import transformers

    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        if options.limit:
            for folder in ("images", "masks"):
                (scratch / "data" / folder).mkdir(parents=True)
                for path in sorted((options.data / folder).iterdir())[: options.limit]:
                    shutil.copy(path, scratch / "data" / folder)
            options.data = scratch / "data"
        options.start = scratch / "start"
        transformers.set_seed(0)
        config = transformers.SegformerConfig(**CONFIG)
        transformers.SegformerForSemanticSegmentation(config).save_pretrained(options.start)
        own = ours(options, scratch / "ours")
        given = ["data", "method", "device", "dtype", "size", "batch_size", "epochs", "workers", "start"]
        arguments = [f"--{name.replace('_', '-')}={getattr(options, name)}" for name in given]
        command = [sys.executable, __file__, f"--split={scratch / 'ours'}", *arguments]
        result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        other = json.loads(result.stdout.strip().splitlines()[-1])
    shape = f"{options.size}x{options.size}, {options.epochs} epochs, batch {options.batch_size}"
    print(f"{options.method}, {shape}, {options.device}\n")
    print("| | seconds | peak MiB | validation Dice |")
    print("| --- | --- | --- | --- |")
    for name, run in (("segpeft-native", own), (f"Trainer ({options.dtype})", other)):
        print(f"| {name} | {run['seconds']:.1f} | {run['bytes'] / 2**20:.0f} | {run['dice']:.4f} |")
    print(f"| ratio | {other['seconds'] / own['seconds']:.2f} | {other['bytes'] / own['bytes']:.2f} | |")


if __name__ == "__main__":
    main()
