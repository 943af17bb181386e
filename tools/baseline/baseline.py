"""Times SegFormer-B0 with two labels in transformers + peft: training steps, or evaluation. Prints JSON lines.

    python baseline.py --step fft lora eval --dtype f32 bf16 --size 512 --batch-size 4 --steps 3

A training step is forward, loss, backward, gradient clipping, fused AdamW (the Trainer's default). An evaluation step
is forward without gradients, upsampling to the labels' size, argmax. The batch is already decoded, normalised and on
the device. Each measurement runs in a process of its own, so that its peak memory is its own. Tensors are laid out as
transformers lays them out, also on a GPU. With --compile the model goes through torch.compile in its default mode; what
that does at first use falls into the steps before timing.
"""

import argparse
import itertools
import json
import resource
import subprocess
import sys
import time

# Names of the notebook's effective LoRA targets, in transformers 4 and 5.
TARGETS = ["query", "key", "value", "attention.output.dense", "q_proj", "k_proj", "v_proj", "o_proj"]
CONFIG = dict(num_labels=2, drop_path_rate=0.1, classifier_dropout_prob=0.1)  # all else is B0 by default


def measure(step: str, dtype: str, options) -> dict:
    """Runs warm-up and timed steps; returns the measurement."""
    import peft
    import torch
    import transformers

    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    device = torch.device(options.device)
    model = transformers.SegformerForSemanticSegmentation(transformers.SegformerConfig(**CONFIG))
    if step == "lora":
        rank = options.rank
        model = peft.get_peft_model(model, peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=TARGETS))
    model = model.to(device).train(step != "eval")
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=5e-4, weight_decay=0.0, fused=True)
    forward = torch.compile(model) if options.compile else model
    n, size = options.batch_size, options.size
    pixels = torch.randn(n, 3, size, size, device=device)
    labels = (torch.rand(n, size, size, device=device) > 0.8).long()

    def autocast():
        return torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bf16")

    def train():
        with autocast():
            loss = forward(pixel_values=pixels, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def evaluate():
        with torch.no_grad(), autocast():
            logits = forward(pixel_values=pixels).logits
            full = torch.nn.functional.interpolate(logits.float(), (size, size), mode="bilinear", align_corners=False)
            full.argmax(1)

    def wait():
        if device.type == "cuda":
            torch.cuda.synchronize()

    seconds = []
    for i in range(options.warmup + options.steps):
        wait()
        if i == options.warmup and device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()  # what compilation took for a moment does not count
        start = time.perf_counter()
        evaluate() if step == "eval" else train()
        wait()
        seconds.append(time.perf_counter() - start)
    seconds = seconds[options.warmup :]
    result = {
        "step": step,
        "dtype": dtype,
        "device": options.device,
        "compiled": options.compile,
        "size": size,
        "batch_size": n,
        "rank": options.rank if step == "lora" else None,
        "threads": torch.get_num_threads(),
        "seconds": seconds,
        "images_per_second": n * len(seconds) / sum(seconds),
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "versions": {m.__name__: m.__version__ for m in (torch, transformers, peft)},
    }
    if device.type == "cuda":
        result |= {"device_name": torch.cuda.get_device_name(), "peak_device_bytes": torch.cuda.max_memory_allocated()}
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--step", choices=["fft", "lora", "eval"], nargs="+", default=["fft", "lora", "eval"])
    parser.add_argument("--dtype", choices=["f32", "bf16"], nargs="+", default=["f32"])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--compile", action="store_true", help="torch.compile the model")
    parser.add_argument("--warmup", type=int, help="steps before timing (default: 1; 3 on a GPU or with --compile)")
    parser.add_argument("--steps", type=int, default=3, help="timed steps")
    parser.add_argument("--threads", type=int, help="CPU threads; PyTorch's own choice without it")
    options = parser.parse_args()
    if options.warmup is None:
        options.warmup = 3 if options.device == "cuda" or options.compile else 1
    choices = list(itertools.product(options.step, options.dtype))
    if len(choices) == 1:
        print(json.dumps(measure(*choices[0], options)), flush=True)
        return
    given = ["device", "size", "batch_size", "rank", "warmup", "steps", "threads"]
    common = [f"--{k.replace('_', '-')}={getattr(options, k)}" for k in given if getattr(options, k) is not None]
    common += ["--compile"] if options.compile else []
    for step, dtype in choices:
        subprocess.run([sys.executable, __file__, "--step", step, "--dtype", dtype, *common], check=True)


if __name__ == "__main__":
    main()
