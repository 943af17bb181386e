"""Writes the fixtures that the Rust tests compare with: see README.md for what each holds.

python fixtures.py --out ../../tests/fixtures/reference
"""

import argparse
import json
import warnings
from pathlib import Path

import numpy as np
import peft
import torch
import transformers
from safetensors.numpy import save_file

import formula
import stack
import trainer

TINY_CASES = {
    "fft": None,
    "lora_attention": dict(rank=3, alpha=6, targets="attention"),
    "lora_all_linear": dict(rank=3, alpha=6, targets="all-linear"),
    "lora_train_head": dict(rank=3, alpha=6, targets="attention", train_head=True),
}
# Sets of pictures that keep the decoder's ReLU clear of its kink: see margins.py.
TINY_PICTURES = [33, 34, 35]
B0_PICTURES = {"fft": [84, 85], "lora": [64, 65]}
B0_CASES = {"fft": None, "lora": dict(rank=16, alpha=32, targets="attention")}
TRAINING_CASES = {"fft": None, "lora": dict(rank=8, alpha=16, targets="attention")}

LR, BETAS, EPSILON, MAX_GRAD_NORM = 5e-4, (0.9, 0.999), 1e-8, 1.0
TRAINING = dict(
    epochs=3, lr=LR, batch_size=2, grad_accum=4, eval_batch_size=3, warmup_ratio=0.1, max_grad_norm=MAX_GRAD_NORM
)
TRAIN_PICTURES, EVAL_PICTURES, TRAINING_SIZE = range(0, 13), range(13, 18), 128


def l2(x: np.ndarray) -> float:
    return float(np.linalg.norm(x.astype(np.float64)))


def build(size: str, case: dict | None, lora_b: bool = True):
    """The model of a case, with weights from the formula (`lora_b` false: B = 0, as training starts)."""
    model = transformers.SegformerForSemanticSegmentation(stack.config(size))
    if case is not None:
        targets = stack.TARGETS[case["targets"]]
        model = stack.lora(model, case["rank"], case["alpha"], targets, case.get("train_head", False))
    stack.fill(model, lambda name: lora_b or not name.endswith("lora_B.weight"))
    return model


def passes(size, case, pixels, labels, dtype):
    """Evaluation-mode and training-mode forward passes and one backward pass of a fresh model."""
    model = build(size, case).to(dtype)
    inputs = {
        "pixel_values": torch.from_numpy(formula.normalise(pixels)).to(dtype),
        "labels": torch.from_numpy(labels.astype(np.int64)),
    }
    model.eval()
    with torch.no_grad():
        evaluation = model(**inputs)
    model.train()
    training = model(**inputs)
    training.loss.backward()
    tensors = {"logits_eval": stack.array(evaluation.logits), "logits_train": stack.array(training.logits)}
    for name, buffer in stack.statistics(model).items():
        tensors[f"buffer/{name}"] = stack.array(buffer)
    grads = {name: stack.array(p.grad) for name, p in stack.trainable(model).items()}
    numbers = {
        "loss_eval": evaluation.loss.item(),
        "loss_train": training.loss.item(),
        "grad_norm": float(np.sqrt(sum(l2(g) ** 2 for g in grads.values()))),
        "grad_l2": {name: l2(g) for name, g in grads.items()},
    }
    return model, tensors, grads, numbers


def snapshot(model) -> dict[str, np.ndarray]:
    """Copies of the trainable parameters."""
    return {name: stack.array(p) for name, p in stack.trainable(model).items()}


def travelled(model, start: dict) -> tuple[dict, dict, dict]:
    """Strided trainable parameters, and the L2 distance of each from `start`: of all elements, of the strided ones."""
    values, full, part = {}, {}, {}
    for name, end in snapshot(model).items():
        values[name] = formula.strided(end)
        full[name] = l2(end.astype(np.float64) - start[name])
        part[name] = l2(formula.strided(end).astype(np.float64) - formula.strided(start[name]))
    return values, full, part


def tiny(dtype):
    pictures = [formula.picture(k, 64) for k in TINY_PICTURES]
    pixels = np.stack([p for p, _ in pictures])
    labels = np.stack([formula.three_labels(m) for _, m in pictures])
    tensors, numbers = {}, {}
    for name, case in TINY_CASES.items():
        _, outputs, grads, numbers[name] = passes("tiny", case, pixels, labels, dtype)
        tensors |= {f"{name}/{k}": v for k, v in outputs.items()}
        tensors |= {f"{name}/grad/{k}": v for k, v in grads.items()}
    return tensors, {"config": sizes("tiny"), "image_size": 64, "pictures": TINY_PICTURES, "cases": TINY_CASES} | {
        "numbers": numbers
    }


def b0(dtype):
    tensors, numbers = {}, {}
    for name, case in B0_CASES.items():
        pixels, labels = (np.stack(x) for x in zip(*(formula.picture(k, 128) for k in B0_PICTURES[name])))
        model, outputs, grads, numbers[name] = passes("b0", case, pixels, labels, dtype)
        start, parameters = snapshot(model), list(stack.trainable(model).values())
        torch.nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
        torch.optim.AdamW(parameters, lr=LR, betas=BETAS, eps=EPSILON, weight_decay=0.0).step()
        updated, full, part = travelled(model, start)
        numbers[name] |= {"distance": full, "distance_strided": part}
        tensors |= {f"{name}/{k}": v for k, v in outputs.items()}
        tensors |= {f"{name}/grad/{k}": formula.strided(v) for k, v in grads.items()}
        tensors |= {f"{name}/updated/{k}": v for k, v in updated.items()}
    optimizer = dict(lr=LR, betas=BETAS, epsilon=EPSILON, weight_decay=0.0, max_grad_norm=MAX_GRAD_NORM)
    return tensors, {"config": sizes("b0"), "image_size": 128, "pictures": B0_PICTURES, "cases": B0_CASES} | {
        "optimizer": optimizer,
        "numbers": numbers,
    }


def training(dtype):
    sets = [
        trainer.Pictures(*(np.stack(x) for x in zip(*(formula.picture(k, TRAINING_SIZE) for k in ks))), dtype)
        for ks in (TRAIN_PICTURES, EVAL_PICTURES)
    ]
    tensors, numbers = {}, {}
    for name, case in TRAINING_CASES.items():
        model = build("b0", case, lora_b=False).to(dtype)
        start = snapshot(model)
        history = trainer.train(model, *sets, **TRAINING)
        values, full, part = travelled(model, start)
        numbers[name] = {"history": history, "distance": full, "distance_strided": part}
        tensors |= {f"{name}/weights/{k}": v for k, v in values.items()}
        tensors |= {f"{name}/buffer/{k}": stack.array(v) for k, v in stack.statistics(model).items()}
    return tensors, {"config": sizes("b0"), "image_size": TRAINING_SIZE, "options": TRAINING} | {
        "train_pictures": list(TRAIN_PICTURES),
        "eval_pictures": list(EVAL_PICTURES),
        "cases": TRAINING_CASES,
        "numbers": numbers,
    }


def known_answers():
    """Values by which another implementation of the formula can check itself."""
    names = {
        "segformer.encoder.block.0.0.attention.self.query.weight": (32, 32),
        "segformer.encoder.block.0.0.attention.self.query.lora_A.weight": (16, 32),
        "segformer.encoder.block.0.0.attention.self.query.lora_B.weight": (32, 16),
        "segformer.encoder.block.0.0.mlp.dwconv.dwconv.weight": (128, 1, 3, 3),
        "segformer.encoder.layer_norm.3.weight": (256,),
        "segformer.encoder.layer_norm.3.bias": (256,),
        "decode_head.batch_norm.running_mean": (256,),
        "decode_head.batch_norm.running_var": (256,),
    }
    tensors = {}
    for name, shape in names.items():
        data = formula.tensor(name, shape)
        tensors[name] = {
            "shape": shape,
            "first": data.reshape(-1)[:3].tolist(),
            "last": float(data.reshape(-1)[-1]),
            "fnv1a": f"{formula.fnv1a(data.tobytes()):016x}",
        }
    pictures = []
    for k, size in [(0, 64), (1, 64), (2, 64), (0, 128), (17, 128)]:
        pixels, mask = formula.picture(k, size)
        pictures.append(
            {
                "picture": k,
                "size": size,
                "pixels_fnv1a": f"{formula.fnv1a(pixels.tobytes()):016x}",
                "mask_fnv1a": f"{formula.fnv1a(mask.tobytes()):016x}",
                "three_labels_fnv1a": f"{formula.fnv1a(formula.three_labels(mask).tobytes()):016x}",
                "normalised_fnv1a": f"{formula.fnv1a(formula.normalise(pixels).tobytes()):016x}",
                "mask_pixels": int(mask.sum()),
            }
        )
    words = [f"{int(w):016x}" for w in formula.words("image0", 3)]
    return {"fnv1a_image0": f"{formula.fnv1a(b'image0'):016x}", "words_image0": words} | {
        "tensors": tensors,
        "pictures": pictures,
    }


def sizes(name: str) -> dict:
    """The part of the configuration that the fixtures depend on, under the keys of config.json."""
    keys = """depths hidden_sizes num_attention_heads sr_ratios mlp_ratios patch_sizes strides decoder_hidden_size
        drop_path_rate classifier_dropout_prob semantic_loss_ignore_index id2label""".split()
    return {k: getattr(stack.config(name), k) for k in keys}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", choices=["float32", "float64"], default="float64")
    parser.add_argument("--only", choices=["tiny", "b0", "training"], nargs="*", default=["tiny", "b0", "training"])
    options = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    versions = {"transformers": transformers.__version__, "peft": peft.__version__, "torch": torch.__version__}
    versions["computed_in"] = options.dtype
    (options.out / "formula.json").write_text(json.dumps(known_answers(), indent=1) + "\n")
    for make in (tiny, b0, training):
        if make.__name__ not in options.only:
            continue
        tensors, record = make(getattr(torch, options.dtype))
        stored = {k: v.astype(v.dtype if v.dtype == np.int64 else np.float32, order="C") for k, v in tensors.items()}
        save_file(stored, options.out / f"{make.__name__}.safetensors", {"format": "pt"})
        text = json.dumps({"versions": versions} | record, indent=1)
        (options.out / f"{make.__name__}.json").write_text(text + "\n")
        print(f"{make.__name__}: {len(tensors)} tensors")


if __name__ == "__main__":
    main()
