"""The reference stack: SegFormer of transformers with weights from the formula, adapters of peft.

Works under transformers 4 and 5. Tensors go by transformers 4's names, which are also the names on disk.
"""

import re

import numpy as np
import torch
import transformers
from peft import LoraConfig, get_peft_model

import formula

V5 = int(transformers.__version__.split(".")[0]) >= 5

# Module names, transformers 4 -> 5. Order matters: longer names first.
RENAMES = [
    (r"encoder\.patch_embeddings\.(\d+)\.", r"stages.\1.patch_embeddings."),
    (r"encoder\.block\.(\d+)\.", r"stages.\1.blocks."),
    (r"encoder\.layer_norm\.(\d+)", r"stages.\1.layer_norm"),
    (r"attention\.self\.query", "attention.q_proj"),
    (r"attention\.self\.key", "attention.k_proj"),
    (r"attention\.self\.value", "attention.v_proj"),
    (r"attention\.self\.sr", "attention.sequence_reduction.sequence_reduction"),
    (r"attention\.self\.layer_norm", "attention.sequence_reduction.layer_norm"),
    (r"attention\.output\.dense", "attention.o_proj"),
    (r"mlp\.dense1", "mlp.fc1"),
    (r"mlp\.dense2", "mlp.fc2"),
    (r"layer_norm_1", "layernorm_before"),
    (r"layer_norm_2", "layernorm_after"),
    (r"linear_c\.", "linear_projections."),
]
BACK = [
    (r"stages\.(\d+)\.patch_embeddings\.", r"encoder.patch_embeddings.\1."),
    (r"stages\.(\d+)\.blocks\.", r"encoder.block.\1."),
    (r"stages\.(\d+)\.layer_norm", r"encoder.layer_norm.\1"),
    (r"attention\.q_proj", "attention.self.query"),
    (r"attention\.k_proj", "attention.self.key"),
    (r"attention\.v_proj", "attention.self.value"),
    (r"attention\.sequence_reduction\.sequence_reduction", "attention.self.sr"),
    (r"attention\.sequence_reduction\.layer_norm", "attention.self.layer_norm"),
    (r"attention\.o_proj", "attention.output.dense"),
    (r"mlp\.fc1", "mlp.dense1"),
    (r"mlp\.fc2", "mlp.dense2"),
    (r"layernorm_before", "layer_norm_1"),
    (r"layernorm_after", "layer_norm_2"),
    (r"linear_projections\.", "linear_c."),
]

ATTENTION = ["attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"]
TARGETS = {
    "attention": ATTENTION,
    "attention+ffn": ATTENTION + ["mlp.dense1", "mlp.dense2"],
    "all-linear": ATTENTION + ["mlp.dense1", "mlp.dense2"] + [f"linear_c.{i}.proj" for i in range(4)],
}


def _rename(name: str, rules) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def native(name: str) -> str:
    """A name of transformers 4 as the installed version says it."""
    return _rename(name, RENAMES) if V5 else name


def canonical(name: str) -> str:
    """A parameter or buffer name of the (possibly peft-wrapped) model as transformers 4 names it on disk."""
    name = name.removeprefix("base_model.model.")
    name = name.replace(".base_layer.", ".").replace(".default.", ".").replace(".modules_to_save.", ".")
    return _rename(name, BACK) if V5 else name


def config(size: str) -> transformers.SegformerConfig:
    """`b0` with two labels, or `tiny` with three. Nothing random: drop path and dropout are 0."""
    common = dict(drop_path_rate=0.0, classifier_dropout_prob=0.0, semantic_loss_ignore_index=formula.IGNORE)
    if size == "b0":
        return transformers.SegformerConfig(num_labels=2, **common)
    return transformers.SegformerConfig(
        num_labels=3,
        depths=[1, 2, 1, 1],
        hidden_sizes=[16, 24, 40, 48],
        num_attention_heads=[1, 2, 5, 4],
        sr_ratios=[8, 4, 2, 1],
        decoder_hidden_size=32,
        **common,
    )


def fill(module: torch.nn.Module, where=lambda name: True) -> None:
    """Overwrites parameters and buffers whose canonical name satisfies `where` with the formula's."""
    with torch.no_grad():
        for name, value in [*module.named_parameters(), *module.named_buffers()]:
            if where(canonical(name)):
                value.copy_(torch.from_numpy(formula.tensor(canonical(name), tuple(value.shape))))


def lora(model, rank: int, alpha: float, targets: list[str], train_head: bool = False):
    """`model` with peft adapters on `targets` (names of transformers 4), dropout 0."""
    settings = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=0.0,
        bias="none",
        target_modules=[native(t) for t in targets],
        modules_to_save=["decode_head"] if train_head else None,
    )
    return get_peft_model(model, settings)


def trainable(model) -> dict[str, torch.nn.Parameter]:
    """Trainable parameters by canonical name."""
    return {canonical(n): p for n, p in model.named_parameters() if p.requires_grad}


def statistics(model) -> dict[str, torch.Tensor]:
    """The buffers in use (those of a trained copy, where peft made one) by canonical name."""
    return {canonical(n): b for n, b in model.named_buffers() if ".original_module." not in n}


def array(t: torch.Tensor) -> np.ndarray:
    """A detached copy as numpy."""
    return t.detach().cpu().numpy().copy()
