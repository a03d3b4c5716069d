"""What is kept for the backward pass, and what computing it again costs: peak memory and time of one step.

    python benchmarks/recompute.py [--width 512] [--layers 8] [--tokens 1024] [--precision fp32] [--compile]

Each way runs in a process of its own, over one packed sequence of four segments; the baseline is the same process
before its first forward pass. Times are of the processor, medians.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from itertools import pairwise

MODES = ("none", "selective", "full")


def measure(options: argparse.Namespace) -> dict[str, float]:
    import torch
    from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

    from lapilli.data.image import ImageSpec
    from lapilli.data.sample import Batch
    from lapilli.model.config import LapilliConfig
    from lapilli.model.freeze import apply_freeze
    from lapilli.model.vlm import VisionLanguageModel
    from lapilli.train.device.cpu import Cpu
    from lapilli.train.loss import LossModule
    from lapilli.train.recompute import compile_layers, keep_for_backward

    torch.manual_seed(0)
    torch.set_num_threads(1)
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    text = LlamaConfig(
        vocab_size=1000, hidden_size=options.width, intermediate_size=options.width * 11 // 4,
        num_hidden_layers=options.layers, num_attention_heads=options.width // 64, tie_word_embeddings=False,
    )  # fmt: skip
    layout = {"tile_height": 8, "tile_width": 8, "grid_height": 2, "grid_width": 2}
    config = LapilliConfig(vision_config=vision, text_config=text, layout=layout, image_token_id=1)
    model = VisionLanguageModel(config, CLIPVisionModel(vision), LlamaForCausalLM(text)).float().train()
    apply_freeze(model, "freeze_vision")
    model.vision_encoder.eval()
    keep_for_backward(model, options.mode)
    device = Cpu()
    if options.compile:
        compile_layers(model, device)
    module = LossModule(model, ImageSpec(size=(8, 8), mean=(0.5,) * 3, std=(0.5,) * 3))
    ids = torch.randint(2, 1000, (options.tokens,))
    bounds = torch.linspace(0, options.tokens, 5).int()
    positions = torch.cat([torch.arange(int(b - a)) for a, b in pairwise(bounds)])
    labels = ids.masked_fill(positions == 0, -100)
    batch = Batch(ids, labels, positions, bounds)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    losses, seconds = [], []
    for _ in range(options.steps):
        began = time.process_time()
        with device.autocast(options.precision):
            loss = module(batch)
        loss.backward()
        seconds.append(time.process_time() - began)
        losses.append(float(loss.detach()) / options.tokens)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {"MiB": peak / 1024, "seconds": statistics.median(seconds[1:]), "loss": losses[-1]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--mode", choices=MODES, help="measure this one here, and print it as JSON")
    options = parser.parse_args()
    if options.mode:
        print(json.dumps(measure(options)))
        return
    print(f"{'':<12}{'MiB above':>10}{'CPU s':>8}  loss")
    for mode in [m for m in MODES if not (options.compile and m == "selective")]:
        command = [sys.executable, __file__, *sys.argv[1:], "--mode", mode]
        out = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1]
        found = json.loads(out)
        print(f"{mode:<12}{found['MiB']:>10.0f}{found['seconds']:>8.2f}  {found['loss']:.7f}", flush=True)


if __name__ == "__main__":
    main()
