"""Hugging Face's Trainer in the configuration that both sides can follow: f32 on the CPU, samples in order, nothing
random; it logs the training loss unrounded and the metrics of metrics.py."""

import tempfile

import numpy as np
import torch
import transformers
from torch.utils.data import Dataset, SequentialSampler

import formula
import metrics
import stack


class Pictures(Dataset):
    """Pixels u8 (N, S, S, 3) and masks (N, S, S), normalised on the way out."""

    def __init__(self, pixels: np.ndarray, masks: np.ndarray, dtype=torch.float32):
        self.pixels, self.masks, self.dtype = pixels, masks, dtype

    def __len__(self):
        return len(self.pixels)

    def __getitem__(self, i):
        return {
            "pixel_values": torch.from_numpy(formula.normalise(self.pixels[i])).to(self.dtype),
            "labels": torch.from_numpy(self.masks[i].astype(np.int64)),
        }


class OrderedTrainer(transformers.Trainer):
    """A Trainer that keeps the order of the training set, and the digits of its loss."""

    since_log, last_logged, on_log = 0.0, 0, None

    def _get_train_sampler(self, *_):
        return SequentialSampler(self.train_dataset)

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        self.since_log += loss.item()
        return loss

    def log(self, logs, *args, **kwargs):
        if "loss" in logs:
            logs["loss"] = self.since_log / (self.state.global_step - self.last_logged)
            self.since_log, self.last_logged = 0.0, self.state.global_step
        super().log(logs, *args, **kwargs)
        if self.on_log:
            self.on_log(self.state.log_history[-1])


class StopAfter(transformers.TrainerCallback):
    """Ends training after some epochs, without touching the schedule."""

    def __init__(self, epochs: int):
        self.epochs = epochs

    def on_epoch_end(self, args, state, control, **_):
        control.should_training_stop = control.should_training_stop or round(state.epoch) >= self.epochs


def upsampled_prediction(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Class per pixel at the labels' size, u8."""
    full = torch.nn.functional.interpolate(logits, size=labels.shape[-2:], mode="bilinear", align_corners=False)
    return full.argmax(1).to(torch.uint8)


def train(
    model,
    train_set,
    eval_set,
    *,
    epochs,
    lr,
    batch_size,
    grad_accum,
    eval_batch_size,
    warmup_ratio,
    max_grad_norm,
    weight_decay=0.0,
    stop_after=None,
    on_log=None,
) -> list[dict]:
    """Trains `model` in place, for `stop_after` of the `epochs` if given; returns the history without its timings."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            output_dir=folder,
            num_train_epochs=epochs,
            learning_rate=lr,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=grad_accum,
            per_device_eval_batch_size=eval_batch_size,
            lr_scheduler_type="cosine",
            max_grad_norm=max_grad_norm,
            weight_decay=weight_decay,
            optim="adamw_torch",
            eval_strategy="epoch",
            logging_strategy="epoch",
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            dataloader_pin_memory=False,
            remove_unused_columns=False,
            label_names=["labels"],
            disable_tqdm=True,
            **({"warmup_steps": warmup_ratio} if stack.V5 else {"warmup_ratio": warmup_ratio}),
        )
        trainer = OrderedTrainer(
            model=model,
            args=arguments,
            train_dataset=train_set,
            eval_dataset=eval_set,
            preprocess_logits_for_metrics=upsampled_prediction,
            compute_metrics=lambda p: metrics.summary(p.label_ids, p.predictions),
        )
        trainer.remove_callback(transformers.PrinterCallback)
        if stop_after is not None:
            trainer.add_callback(StopAfter(stop_after))
        trainer.on_log = on_log
        trainer.train()
    timed = ("runtime", "per_second", "total_flos")
    return [{k: v for k, v in row.items() if not k.endswith(timed)} for row in trainer.state.log_history]
