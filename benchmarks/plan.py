"""What `lapilli plan` says of a run's memory on the CPU, beside what the run really takes.

    python benchmarks/plan.py [--work DIR] [--only NAME ...]

A 25M-parameter model is trained for four steps in a process of its own, in several ways; the peak of its resident
memory, less what it had before its weights were read, is compared with the plan without its share for the process.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from workload import make_conversations, make_language_model, make_pictures, make_vision_encoder

TOKENIZER = Path(__file__).parents[1] / "tests" / "reference" / "tokenizer" / "tokenizer.model"
WAYS = {
    "projector": ["train.freeze=projector"],
    "freeze_vision": [],
    "full": ["train.freeze=full"],
    "lora": ["train.lora.r=16"],
    "checkpointing": ["train.gradient_checkpointing=full"],
    "full, checkpointing": ["train.freeze=full", "train.gradient_checkpointing=full"],
    "two micro-batches": ["train.tokens_per_micro_batch=2048"],
    "several micro-batches, full": ["train.freeze=full", "train.tokens_per_micro_batch=1536"],
    "bf16": ["run.precision=bf16"],
    "bf16, full": ["run.precision=bf16", "train.freeze=full"],
    "bf16, several micro-batches": ["run.precision=bf16", "train.tokens_per_micro_batch=1536"],
    "static shapes": ["run.static_shapes=2", "train.tokens_per_micro_batch=2048"],
    "two samples": ["train.global_batch_size=2"],
    "two samples, checkpointing": ["train.global_batch_size=2", "train.gradient_checkpointing=full"],
}
MEASURED = r"""
import json, re, sys
from pathlib import Path
from lapilli.recipe.load import load_recipe
from lapilli.train import setup
from lapilli.train.run import train_stage

def status(name):
    return 1024 * int(re.search(rf"^{name}:\s+(\d+)", Path("/proc/self/status").read_text(), re.M).group(1))

def noted(*args):
    global before
    before = status("VmRSS")
    return load(*args)

load, setup.load_weights = setup.load_weights, noted
(stage,) = load_recipe(sys.argv[1], sys.argv[2:]).recipe.stages
train_stage(stage, {})
print(json.dumps(status("VmHWM") - before))
"""


def make(work: Path) -> Path:
    """The benchmarks' model and data, and a recipe of four steps."""
    from lapilli.assemble.build import BuildOptions, build

    recipe = work / "recipe.yaml"
    if recipe.exists():
        return recipe
    work.mkdir(parents=True, exist_ok=True)
    make_language_model(work / "language", TOKENIZER)
    make_vision_encoder(work / "vision")
    build(BuildOptions(str(work / "vision"), str(work / "language"), dtype="float32"), work / "model")
    make_conversations(work / "data.json", make_pictures(work / "images", 32), 96)
    recipe.write_text(
        "model: model\nout: run\ndata: {train: {path: data.json, images: images}, placement: front, workers: 0, "
        "index: index}\ntrain: {global_batch_size: 4, learning_rate: 2.0e-5, max_steps: 4}\n"
        "run: {precision: fp32, device: cpu, threads: 1}\n"
    )
    return recipe


def compare(work: Path, way: str) -> tuple[int, int]:
    """(planned, measured) bytes of one way to train."""
    recipe, overrides = make(work), WAYS[way]
    out = f"out={work / 'run' / way.replace(', ', '-').replace(' ', '-')}"
    command = [sys.executable, "-m", "lapilli.cli", "plan", str(recipe), out, *overrides, "--device", "cpu", "--json"]
    made = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)[0]["needs"]["device"]
    planned = sum(made.values()) - made["process"]
    ran = subprocess.run(
        [sys.executable, "-c", MEASURED, str(recipe), out, *overrides], capture_output=True, text=True, check=True
    )
    return planned, int(ran.stdout.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("plan-benchmark"))
    parser.add_argument("--only", nargs="*", choices=list(WAYS), default=list(WAYS))
    arguments = parser.parse_args()
    for way in arguments.only:
        planned, measured = compare(arguments.work.absolute(), way)
        print(f"{way:<27} planned {planned / 1e6:6,.0f} MB  measured {measured / 1e6:6,.0f} MB  "
              f"{planned / measured - 1:+.1%}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
