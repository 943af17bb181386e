"""Writes a common starting point for segpeft-native and compare_run.py.

A two-label SegFormer-B0 and an adapter (B = 0), as transformers and peft save them. Weights come from the formula, or
from a checkpoint with a new classifier.

    python make_start.py --out start [--model CHECKPOINT] [--rank 16 --lora-alpha 32 --targets attention]

Then: segpeft-native train --model start/model --adapter start/adapter ...
"""

import argparse
from pathlib import Path

import transformers

import stack


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", type=Path, help="Hugging Face directory; without it, weights from the formula")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--lora-alpha", type=float, default=32)
    parser.add_argument("--targets", choices=stack.TARGETS, default="attention")
    parser.add_argument("--train-head", action="store_true", help="the adapter also trains the decode head")
    options = parser.parse_args()
    labels = {"id2label": {0: "background", 1: "polyp"}, "label2id": {"background": 0, "polyp": 1}}
    if options.model:
        model = transformers.SegformerForSemanticSegmentation.from_pretrained(
            options.model, ignore_mismatched_sizes=True, **labels
        )
        stack.fill(model, lambda name: name.startswith("decode_head.classifier."))
    else:
        model = transformers.SegformerForSemanticSegmentation(transformers.SegformerConfig(**labels))
        stack.fill(model)
    model.save_pretrained(options.out / "model")
    adapted = stack.lora(model, options.rank, options.lora_alpha, stack.TARGETS[options.targets], options.train_head)
    stack.fill(adapted, lambda name: name.endswith("lora_A.weight"))
    adapted.save_pretrained(options.out / "adapter", save_embedding_layers=False)


if __name__ == "__main__":
    main()
