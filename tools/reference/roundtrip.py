"""Exchanges models and adapters with `tests/formats.rs`, to prove that each side reads what the other writes.

Run by hand, under transformers 4.57.1 + peft 0.17.1 and under transformers 5.17.0 + peft 0.21.2 (torch and safetensors
beside them). D is a scratch folder:

    python4 roundtrip.py make D;  python5 roundtrip.py make D
    SEGPEFT_EXCHANGE=D cargo test --release --test formats exchange
    python4 roundtrip.py check D; python5 roundtrip.py check D

`make` writes D/python<4|5>: models (safetensors, pytorch_model.bin), adapters, and expected.json with the CRC-32 of
every tensor. The test reads them and writes them again into D/rust, where `check` loads them with transformers and peft:
no key missing, none unexpected, every tensor bit-equal.

    python5 roundtrip.py names DIR

writes the module names of B0 and B2 under both versions, paired by transformers' own renaming, as fixtures.
"""

import collections
import json
import pathlib
import sys
import warnings
import zlib

import peft
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import SegformerConfig, SegformerForSemanticSegmentation

VERSION = transformers.__version__.split(".")[0]
TARGETS = {
    "4": ["query", "key", "value", "attention.output.dense", "mlp.dense.1", "mlp.dense2", "sr"],
    "5": ["q_proj", "k_proj", "v_proj", "attention.o_proj", "mlp.dense.1", "mlp.fc2",
          "sequence_reduction.sequence_reduction"],
}
PREFIX = "base_model.model."
# Version-5 names of an adapter's tensors under version 4.
RENAMED = [
    ("stages.", "encoder.block."), (".blocks.", "."), ("q_proj", "self.query"), ("k_proj", "self.key"),
    ("v_proj", "self.value"), ("o_proj", "output.dense"), ("mlp.fc2", "mlp.dense2"),
    ("linear_projections", "linear_c"), ("sequence_reduction.sequence_reduction", "self.sr"),
]


def small(**changes):
    """B0 with one block a stage."""
    labels = {0: "background", 1: "polyp"}
    return SegformerConfig(depths=[1, 1, 1, 1], id2label=labels, label2id={v: k for k, v in labels.items()}, **changes)


def randomised(model, seed):
    """The model with every tensor random, BatchNorm's statistics and LoRA's B included."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            tensor.copy_(torch.randn(tensor.shape, generator=generator).abs() + 0.01 if "running_var" in name
                         else torch.randn(tensor.shape, generator=generator))
        else:
            tensor.fill_(1234567890123)
    return model


def crc(tensor):
    wide = tensor.to(torch.float32 if tensor.is_floating_point() else torch.int64)
    return zlib.crc32(wide.contiguous().numpy().tobytes())


def described(tensors):
    return {name: [list(t.shape), crc(t)] for name, t in sorted(tensors.items())}


def renamed(adapter):
    """An adapter's tensors under version 4's names, without peft's prefix."""
    tensors = {}
    for name, tensor in adapter.items():
        name = name.removeprefix(PREFIX)
        for new, old in RENAMED:
            name = name.replace(new, old)
        tensors[name] = tensor
    return tensors


def expected_of(root, version, kind):
    return json.loads((root / f"python{version}" / "expected.json").read_text())[kind]


def make(out):
    out.mkdir(parents=True, exist_ok=True)
    expected = {}

    for kind, dtype in {"model": torch.float32, "model-bf16": torch.bfloat16, "model-f64": torch.float64}.items():
        model = randomised(SegformerForSemanticSegmentation(small()), 1).to(dtype)
        model.save_pretrained(out / kind)
        expected[kind] = described(load_file(out / kind / "model.safetensors"))

    # The same tensors as torch.save has them: plain, as parameters, transposed and shared views, another protocol.
    state = load_file(out / "model" / "model.safetensors")
    wrapped = collections.OrderedDict((k, torch.nn.Parameter(v) if "proj.weight" in k else v) for k, v in state.items())
    views = dict(state)
    key = "segformer.encoder.block.0.0.attention.self.key.weight"
    views[key] = views[key].t().contiguous().t()
    dense = "segformer.encoder.patch_embeddings.0.proj.weight"
    views[dense] = views[dense].contiguous(memory_format=torch.channels_last)
    block = torch.cat([torch.zeros(5), state["decode_head.batch_norm.weight"], state["decode_head.batch_norm.bias"]])
    views["decode_head.batch_norm.weight"], views["decode_head.batch_norm.bias"] = block[5:261], block[261:]
    module = randomised(SegformerForSemanticSegmentation(small()), 1).state_dict()
    for kind, (tensors, protocol) in {
        "bin-plain": (state, 2), "bin-parameters": (wrapped, 2), "bin-views": (views, 2), "bin-protocol4": (state, 4),
        "bin-module": (module, 2),
    }.items():
        (out / kind).mkdir(exist_ok=True)
        torch.save(tensors, out / kind / "pytorch_model.bin", pickle_protocol=protocol)
        (out / kind / "config.json").write_text((out / "model" / "config.json").read_text())
        expected[kind] = expected["model"]
    (out / "bin-legacy").mkdir(exist_ok=True)
    torch.save(state, out / "bin-legacy" / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    (out / "bin-legacy" / "config.json").write_text((out / "model" / "config.json").read_text())

    for kind, saved in {"adapter": None, "adapter-head": ["decode_head"], "adapter-classifier": ["classifier"]}.items():
        config = LoraConfig(r=3, lora_alpha=5, target_modules=TARGETS[VERSION], modules_to_save=saved)
        model = randomised(get_peft_model(SegformerForSemanticSegmentation(small()), config), 2)
        model.save_pretrained(out / kind)
        expected[kind] = described(renamed(load_file(out / kind / "adapter_model.safetensors")))
    (out / "expected.json").write_text(json.dumps(expected, indent=1))
    print(f"wrote {out}: {', '.join(f'{k} ({len(v)} tensors)' for k, v in expected.items())}")


def same_bits(kind, name, got, want):
    assert got.shape == want.shape and got.dtype == want.dtype, (kind, name, got.shape, want.shape, got.dtype, want.dtype)
    assert torch.equal(got.flatten().view(torch.uint8), want.flatten().view(torch.uint8)), (kind, name)


def file_names(model):
    """The model's state dict under the names that full checkpoints carry."""
    return {to_checkpoint(name) if VERSION == "5" else name: t for name, t in model.state_dict().items()}


def to_checkpoint(name):
    """A version-5 module name as transformers 5 writes it into checkpoints, by transformers' own renaming."""
    if not hasattr(to_checkpoint, "table"):
        to_checkpoint.table = {}
    return to_checkpoint.table[name]


def learn_names(config, scratch):
    """Fills `to_checkpoint.table`: every tensor gets a number of its own, and the saved file tells where it went."""
    model = SegformerForSemanticSegmentation(config)
    numbers = {}
    for i, (name, tensor) in enumerate(model.state_dict().items()):
        tensor.fill_(i)
        numbers[i] = name
    model.save_pretrained(scratch)
    saved = load_file(scratch / "model.safetensors")
    assert len(saved) == len(numbers)
    to_checkpoint.table = {numbers[int(t.flatten()[0])]: name for name, t in saved.items()}
    assert len(to_checkpoint.table) == len(numbers)


def check(root):
    if VERSION == "5":
        learn_names(small(), root / "scratch5")
    for kind in ("model", "model-of-bin"):
        model, info = SegformerForSemanticSegmentation.from_pretrained(root / "rust" / kind, output_loading_info=True)
        for what in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
            assert not info.get(what), (kind, what, info[what])
        written = load_file(root / "rust" / kind / "model.safetensors")
        assert described(written) == expected_of(root, "5", "model"), kind
        loaded = file_names(model)
        assert loaded.keys() == written.keys(), loaded.keys() ^ written.keys()
        for name, tensor in loaded.items():
            same_bits(kind, name, tensor, written[name])
        assert model.config.id2label == {0: "background", 1: "polyp"} and model.config.label2id["polyp"] == 1
        assert list(model.config.depths) == [1, 1, 1, 1] and model.config.num_labels == 2
        print(f"{kind}: {len(written)} tensors bit-equal, no key missing or unexpected")

    written = json.loads((root / "rust" / "model" / "preprocessor_config.json").read_text())
    processor = image_processor(root / "rust" / "model")
    if processor is None:
        print("preprocessor_config.json: not loaded, the image processor needs Pillow")
    else:
        for name, value in written.items():
            got = getattr(processor, name, value if name == "image_processor_type" else None)
            got = dict(got) if name == "size" else list(got) if isinstance(value, list) else got
            assert {k: v for k, v in got.items() if v is not None} == value if name == "size" else got == value, (name, got)
        print(f"preprocessor_config.json: {type(processor).__name__} loads, every field as written")

    for kind in ("adapter", "adapter-head", "adapter-classifier", "adapter-of-other"):
        folder = root / "rust" / f"{kind}-{VERSION}"
        base = SegformerForSemanticSegmentation.from_pretrained(root / "rust" / "model")
        before = {name: t.clone() for name, t in base.state_dict().items()}
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model = PeftModel.from_pretrained(base, folder)
            again = model.load_adapter(folder, "default")
        lost = [k for k in again.missing_keys if "lora_" in k or "modules_to_save" in k]
        assert not lost and not again.unexpected_keys, (kind, lost, again.unexpected_keys)
        written = load_file(folder / "adapter_model.safetensors")
        source = ({"4": "5", "5": "4"}[VERSION], "adapter-head") if kind == "adapter-of-other" else (VERSION, kind)
        assert described(renamed(written)) == expected_of(root, *source), kind
        used = set()
        for name, tensor in model.state_dict().items():
            plain = name.replace(".default", "").replace(".modules_to_save", "")
            if ".original_module." in name:
                continue
            if "lora_" in name or ".modules_to_save." in name:
                same_bits(kind, name, tensor, written[plain])
                used.add(plain)
            else:
                same_bits(kind, name, tensor, before[plain.removeprefix(PREFIX).replace("base_layer.", "")])
        assert used == written.keys(), (kind, used ^ written.keys())
        scales = {m.scaling["default"] for m in model.modules() if hasattr(m, "lora_A")}
        assert scales == {5 / 3}, scales
        print(f"{folder.name}: {len(written)} tensors bit-equal, scale {scales}, no key missing or unexpected")


def image_processor(folder):
    try:
        from transformers import SegformerImageProcessor as Processor

        return Processor.from_pretrained(folder)
    except ImportError:
        pass
    try:
        from transformers.models.segformer.image_processing_pil_segformer import SegformerImageProcessorPil as Processor

        return Processor.from_pretrained(folder)
    except ImportError:
        return None


def names(out):
    assert VERSION == "5", "needs transformers 5, which knows both names"
    sizes = {"b0": ([2, 2, 2, 2], [32, 64, 160, 256], 256), "b2": ([3, 4, 6, 3], [64, 128, 320, 512], 768)}
    for size, (depths, hidden, decoder) in sizes.items():
        config = SegformerConfig(depths=depths, hidden_sizes=hidden, decoder_hidden_size=decoder)
        learn_names(config, out / "scratch")
        pairs = {v4.rsplit(".", 1)[0]: v5.rsplit(".", 1)[0] for v5, v4 in to_checkpoint.table.items()}
        modules = {name for name, m in SegformerForSemanticSegmentation(config).named_modules() if m._parameters}
        assert set(pairs.values()) == modules
        text = "".join(f"{v4} {v5}\n" for v4, v5 in sorted(pairs.items()))
        (out / f"modules_{size}.txt").write_text(text)
        print(f"modules_{size}.txt: {len(pairs)} modules")
    for file in (out / "scratch").iterdir():
        file.unlink()
    (out / "scratch").rmdir()


if __name__ == "__main__":
    command, folder = sys.argv[1], pathlib.Path(sys.argv[2])
    print(f"transformers {transformers.__version__}, peft {peft.__version__}, torch {torch.__version__}")
    {"make": lambda: make(folder / f"python{VERSION}"), "check": lambda: check(folder), "names": lambda: names(folder)}[command]()
