"""Logits of models and adapters that segpeft-native wrote, in transformers and peft, and the other way round.

    python logits.py --program ../../target/release/segpeft-native --out scratch \\
        --config segformer-b0-ade/config.json [--published DIR]

trains, exports and predicts with the program, loads what it wrote (adapters under the names of the installed version of
transformers), and compares the logits over pictures by formula, stored as PNG at the model's size, so that neither decoding
nor resizing differs. Ends with status 1 if a difference exceeds 1e-4 of the largest logit.

peft's files hold neither BatchNorm's statistics nor a fresh classifier: both are taken from the program's sidecar.
`--config` is that of a checkpoint of 150 classes, whose weights come from the formula; `--published` a folder in which
adapters are looked for.
"""

import argparse
import json
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import peft
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from safetensors.torch import load_file

import formula
import stack

SIZE = 128
PICTURES = range(200, 206)
BOUND = 1e-4
NAMES = "5" if stack.V5 else "4"
TWO_LABELS = {"id2label": {0: "background", 1: "polyp"}, "label2id": {"background": 0, "polyp": 1}}
SHORT = ["--size", str(SIZE), "--epochs", "2", "--batch-size", "4", "--grad-accum", "2", "--lr", "0.002", "-q"]
SIDECAR = "segpeft_sidecar.safetensors"


class Comparison:
    """Runs the program and collects differences; everything lies in `out`."""

    def __init__(self, program: Path, out: Path):
        self.program, self.out, self.worst = program.resolve(), out, 0.0
        self.compared = 0
        pixels = [formula.picture(k, SIZE)[0] for k in PICTURES]
        self.input = torch.from_numpy(formula.normalise(np.stack(pixels)))

    def run(self, *arguments):
        command = [str(a) for a in (self.program, *arguments)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{' '.join(command)}\n{done.stderr}")

    def predicted(self, model: Path, adapter: Path | None = None) -> np.ndarray:
        """The program's logits (pictures, labels, SIZE/4, SIZE/4)."""
        file = self.out / "logits.safetensors"
        adapted = ["--adapter", adapter] if adapter else []
        self.run("predict", self.out / "pictures", "--model", model, *adapted, "--size", SIZE,
                 "--out", self.out / "predictions", "--save-logits", file, "-q")
        logits = load_file(file)
        return np.stack([logits[f"p{k}"].numpy() for k in PICTURES])

    def check(self, what: str, model, ours: np.ndarray):
        """`model` is the reference's, `ours` the program's logits."""
        with torch.no_grad():
            theirs = model.eval()(pixel_values=self.input).logits.numpy()
        assert theirs.shape == ours.shape, (what, theirs.shape, ours.shape)
        difference = float(np.abs(ours - theirs).max() / np.abs(theirs).max())
        self.worst = max(self.worst, difference)
        self.compared += 1
        print(f"{difference:9.2e}  largest {np.abs(theirs).max():8.3f}  {what}{'' if difference < BOUND else '  TOO FAR'}")


def full(folder: Path):
    """A model's folder; no tensor may be missing, left over or of another size."""
    model, info = transformers.SegformerForSemanticSegmentation.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model


def two_labels(folder: Path):
    """A model's folder with a classifier of two labels, if need be a fresh one."""
    return transformers.SegformerForSemanticSegmentation.from_pretrained(
        folder, ignore_mismatched_sizes=True, **TWO_LABELS
    )


def with_adapter(model, adapter: Path):
    """`model` under the adapter, with what the sidecar holds."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = PeftModel.from_pretrained(model, adapter)
    missing = [str(w.message) for w in caught if "missing" in str(w.message).lower()]
    assert not missing, missing
    if (adapter / SIDECAR).exists():
        state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        # The original of a module that was trained as a whole stays as it was.
        target = {stack.canonical(name): t for name, t in state.items() if ".original_module." not in name}
        for name, tensor in load_file(adapter / SIDECAR).items():
            with torch.no_grad():
                target[stack.canonical(name)].copy_(tensor)
    return model


def make(comparison: Comparison, config: Path):
    """Pictures to train on and to predict, starting points, peft's adapters."""
    out = comparison.out
    for folder in ("data/images", "data/masks", "pictures"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    for k in range(12):
        pixels, mask = formula.picture(k, SIZE)
        Image.fromarray(pixels).save(out / f"data/images/p{k:02}.png")
        Image.fromarray(mask * 255).save(out / f"data/masks/p{k:02}.png")
    for k in PICTURES:
        Image.fromarray(formula.picture(k, SIZE)[0]).save(out / f"pictures/p{k}.png")
    two = transformers.SegformerForSemanticSegmentation(transformers.SegformerConfig(**TWO_LABELS))
    many = transformers.SegformerForSemanticSegmentation(
        transformers.SegformerConfig.from_dict(json.loads(config.read_text()))
    )
    for name, model in {"two": two, "many": many}.items():
        stack.fill(model)
        model.save_pretrained(out / name)
    (out / "bin").mkdir(exist_ok=True)
    many.config.save_pretrained(out / "bin")
    torch.save(many.state_dict() if not stack.V5 else load_file(out / "many/model.safetensors"),
               out / "bin/pytorch_model.bin")
    attention = [stack.native(t) for t in stack.ATTENTION]
    adapters = {
        "rslora": dict(target_modules=attention, r=8, lora_alpha=16, use_rslora=True),
        "head": dict(target_modules=attention, r=4, lora_alpha=8, modules_to_save=["decode_head"]),
        "convolutions": dict(target_modules=[stack.native(t) for t in (
            "attention.self.query", "attention.self.sr", "patch_embeddings.1.proj", "linear_fuse")], r=4, lora_alpha=6),
        "expression": dict(target_modules=r".*(query|q_proj|dense1|fc1)", r=3, lora_alpha=5),
    }
    for name, settings in adapters.items():
        model = get_peft_model(full(out / "two"), LoraConfig(**settings))
        stack.fill(model, lambda name: ".lora_" in name)
        if settings.get("modules_to_save"):
            # Weights of their own, so that it shows if the base model's were used.
            with torch.no_grad():
                for parameter in model.base_model.model.decode_head.modules_to_save["default"].parameters():
                    parameter.mul_(1.25)
        model.save_pretrained(out / "peft" / name, save_embedding_layers=False)
    return adapters.keys()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--program", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="scratch folder, new")
    parser.add_argument("--config", type=Path, required=True, help="config.json of a checkpoint of 150 classes")
    parser.add_argument("--published", type=Path, help="folder of published adapters")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    print(f"transformers {transformers.__version__}, peft {peft.__version__}, torch {torch.__version__}")
    out = options.out
    out.mkdir(parents=True)
    comparison = Comparison(options.program, out)
    run, check, predicted = comparison.run, comparison.check, comparison.predicted
    adapters = make(comparison, options.config)
    two, many, binary = out / "two", out / "many", out / "bin"

    check("a checkpoint of two classes", full(two), predicted(two))
    check("a checkpoint of 150 classes", full(many), predicted(many))
    check("the same as pytorch_model.bin", full(many), predicted(binary))
    run("export", "--model", binary, "--out", out / "exported", "--size", SIZE, "-q")
    check("  exported as safetensors", full(out / "exported"), predicted(binary))

    train = ["train", "--data", out / "data", "--hf-names", NAMES, *SHORT]
    for name, base in {"two": two, "150": many}.items():
        final = out / f"fft-{name}/final"
        run(*train, "--method", "fft", "--model", base, "--out", final.parent)
        check(f"full fine-tuning of {name} classes", full(final), predicted(final))
    lora = {
        "notebook": (many, ["--protocol", "notebook"]),
        "attention": (binary, ["--rank", "4"]),
        "attention+ffn": (two, ["--targets", "attention+ffn", "--lora-dropout", "0.1"]),
        "all-linear": (many, ["--targets", "all-linear", "--rank", "8", "--lora-alpha", "20"]),
        "all-linear and head": (many, ["--targets", "all-linear", "--train-head"]),
        "attention and head": (two, ["--train-head"]),
        "convolutions": (many, ["--targets", "query,attention.self.sr,patch_embeddings.1.proj,linear_fuse"]),
        "rslora, trained on": (two, ["--adapter", out / "peft/rslora"]),
        "head, trained on": (two, ["--adapter", out / "peft/head"]),
    }
    for number, (name, (base, flags)) in enumerate(lora.items()):
        final = out / f"lora-{number}/final"
        run(*train, "--model", base, *flags, "--out", final.parent)
        factors = load_file(final / "adapter_model.safetensors")
        assert all(t.abs().max() > 0 for n, t in factors.items() if "lora_B" in n), "B has not moved"
        ours = predicted(base, final)
        reference = with_adapter(two_labels(many if base == binary else base), final)
        check(f"LoRA {name}", reference, ours)
        merged = out / f"merged-{number}"
        run("export", "--merge", "--model", base, "--adapter", final, "--out", merged, "--size", SIZE, "-q")
        check("  merged here, as a full model there", full(merged), predicted(merged))
        check("  merged there", reference.merge_and_unload(), ours)

    for name in adapters:
        adapter = out / "peft" / name
        check(f"peft's {name}", with_adapter(two_labels(two), adapter), predicted(two, adapter))
    for config in sorted(options.published.rglob("adapter_config.json")) if options.published else []:
        adapter, number = config.parent, config.parent.relative_to(options.published).as_posix().replace("/", "-")
        ours = predicted(many, adapter)
        renamed = out / f"renamed-{number}"
        run("export", "--adapter", adapter, "--hf-names", NAMES, "--out", renamed, "-q")
        check(f"published {number}, its names those of transformers {NAMES}", with_adapter(full(many), renamed), ours)
        if not stack.V5:
            check("  as published", with_adapter(full(many), adapter), ours)
        merged = out / f"merged-{number}"
        run("export", "--merge", "--model", many, "--adapter", adapter, "--out", merged, "--size", SIZE, "-q")
        check("  merged here, as a full model there", full(merged), ours)
    print(f"{comparison.compared} comparisons, largest difference {comparison.worst:.2e} of the largest logit")
    sys.exit(comparison.worst >= BOUND)


if __name__ == "__main__":
    main()
