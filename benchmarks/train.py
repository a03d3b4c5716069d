"""Training speed beside the original LLaVA, in one run on one machine.

    python benchmarks/train.py --llava-repo PATH --llava-python PATH [--rounds 3] [--conversations 96]

Both train the same 25M-parameter language model with the same frozen vision encoder on the same conversations
(global batch 8, AdamW, fp32): lapilli through `lapilli train`, the original through its own `train.py`, with and
without its gradient checkpointing. A step's time is what lies between the original's log lines, and what lapilli
records, waiting for data included; the first step of each run is left out. Without `--llava-repo` only lapilli runs.
`--llava-python` is an interpreter with the packages the original needs.
"""

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from workload import gemm_rate, make_conversations, make_language_model, make_pictures, make_vision_encoder

TOKENIZER = Path(__file__).parents[1] / "tests" / "reference" / "tokenizer" / "tokenizer.model"
BATCH = 8


@dataclass
class Timing:
    """Samples per second after the first step, and the peak resident memory of the process and its children."""

    samples_per_second: float
    peak_bytes: int
    losses: list[float]


def watch(command: list[str], env: dict[str, str], is_step: re.Pattern[str]) -> Timing:
    """Run a training command and time its steps by the lines it prints."""
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    peak = [0]

    def measure() -> None:
        while process.poll() is None:
            peak[0] = max(peak[0], resident(process.pid))
            time.sleep(0.2)

    watcher = threading.Thread(target=measure, daemon=True)
    watcher.start()
    times, losses, tail = [], [], []
    assert process.stdout is not None
    for line in process.stdout:
        tail = [*tail[-30:], line]
        for match in is_step.finditer(line):
            times.append(time.perf_counter())
            losses.append(float(match.group(1)))
    if process.wait() != 0 or len(times) < 2:
        sys.exit(f"{' '.join(command)}\n{''.join(tail)}\nfailed: no timing")
    watcher.join()
    return Timing(BATCH * (len(times) - 1) / (times[-1] - times[0]), peak[0], losses)


def resident(pid: int) -> int:
    """Proportional resident bytes of a process and all its descendants, so that shared pages count once."""
    total, stack = 0, [pid]
    while stack:
        current = stack.pop()
        try:
            text = Path(f"/proc/{current}/smaps_rollup").read_text()
            children = Path(f"/proc/{current}/task/{current}/children").read_text()
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
        found = re.search(r"^Pss:\s+(\d+)", text, re.MULTILINE)
        total += int(found.group(1)) * 1024 if found else 0
        stack += [int(c) for c in children.split()]
    return total


def run_lapilli(work: Path, number: int, tokens: int) -> Timing:
    recipe = work / "recipe.yaml"
    recipe.write_text(
        "model: model\nout: run\ndata:\n  train: {path: data.json, images: images}\n  placement: front\n"
        f"  index: index\ntrain: {{freeze: freeze_vision, global_batch_size: {BATCH}, learning_rate: 2.0e-5,\n"
        f"        tokens_per_micro_batch: {tokens}}}\n"
        "run: {precision: fp32, device: cpu}\n"
    )
    out = work / f"run-{number}"
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "lapilli.cli", "train", str(recipe), f"out={out}"]
    seen = watch(command, dict(os.environ), re.compile(r"step \d+/\d+  loss ([0-9.]+)"))
    # Its status line comes every ten seconds at most, so the steps are timed by the run's own record of each.
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()][1:]
    speed = sum(row["samples"] for row in rows) / sum(row["seconds"] for row in rows)
    return Timing(speed, seen.peak_bytes, seen.losses)


def run_llava(work: Path, repo: Path, python: str, checkpointing: bool) -> Timing:
    out = work / "llava-run"
    shutil.rmtree(out, ignore_errors=True)
    arguments = {
        "model_name_or_path": work / "language-model",
        "version": "v1",
        "data_path": work / "data.json",
        "image_folder": work / "images",
        "vision_tower": work / "vision-encoder",
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "image_aspect_ratio": "pad",
        "group_by_modality_length": True,
        "bf16": False,
        "output_dir": out,
        "num_train_epochs": 1,
        "per_device_train_batch_size": BATCH,
        "gradient_accumulation_steps": 1,
        "evaluation_strategy": "no",
        "save_strategy": "no",
        "learning_rate": 2e-5,
        "weight_decay": 0.0,
        "warmup_ratio": 0.03,
        "lr_scheduler_type": "cosine",
        "logging_steps": 1,
        "model_max_length": 2048,
        "gradient_checkpointing": checkpointing,
        "dataloader_num_workers": 1,
        "lazy_preprocess": True,
        "report_to": "none",
        "use_cpu": True,
    }
    command = [python, "-u", str(repo / "llava" / "train" / "train.py")]
    for name, value in arguments.items():
        command += [f"--{name}", str(value)]
    env = dict(os.environ) | {"PYTHONPATH": str(repo), "PYTHONUNBUFFERED": "1"}
    return watch(command, env, re.compile(r"\{'loss': ([0-9.]+)"))


def useful_flops(work: Path, conversations: int) -> float:
    """Multiplications and additions that one pass over the data needs at least: 6 N T of the language model, causal
    attention, and the vision encoder's forward pass up to the layer that is read."""
    config = json.loads((work / "language-model" / "config.json").read_text())
    width, inner, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    with open(work / "run-0" / "metrics.jsonl") as file:
        tokens = sum(json.loads(line)["tokens"] for line in file)
    per_layer = 4 * width * width + 3 * width * inner
    matrices = 6 * layers * per_layer * tokens
    attention = 6 * layers * width * tokens * (tokens / conversations)
    vision = json.loads((work / "vision-encoder" / "config.json").read_text())
    block = 4 * vision["hidden_size"] ** 2 + 2 * vision["hidden_size"] * vision["intermediate_size"]
    pictures = sum("image" in record for record in json.loads((work / "data.json").read_text()))
    return matrices + attention + 2 * pictures * 577 * (vision["num_hidden_layers"] - 1) * block


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llava-repo", type=Path, help="a checkout of the original LLaVA")
    parser.add_argument("--llava-python", default=sys.executable, help="interpreter that can run it")
    parser.add_argument("--out", type=Path, default=Path("benchmark-run"))
    parser.add_argument("--rounds", type=int, default=1, help="runs of each; medians are reported")
    parser.add_argument("--conversations", type=int, default=96, help="a multiple of the batch of 8")
    parser.add_argument("--tokens-per-micro-batch", type=int, default=4096, help="lapilli's; it decides memory")
    options = parser.parse_args()
    work = options.out.resolve()
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    make_language_model(work / "language-model", TOKENIZER)
    make_vision_encoder(work / "vision-encoder")
    make_conversations(work / "data.json", make_pictures(work / "images", 88), options.conversations)
    build = ["build", "--vision-encoder", "vision-encoder", "--language-model", "language-model", "--out", "model"]
    subprocess.run([sys.executable, "-m", "lapilli.cli", *build], cwd=work, check=True, stdout=subprocess.DEVNULL)

    rate = gemm_rate()
    results: dict[str, list[Timing]] = {}
    for number in range(options.rounds):
        results.setdefault("lapilli", []).append(run_lapilli(work, number, options.tokens_per_micro_batch))
        if options.llava_repo:
            for name, checkpointing in (("LLaVA, gradient checkpointing", True), ("LLaVA, none", False)):
                timing = run_llava(work, options.llava_repo.resolve(), options.llava_python, checkpointing)
                results.setdefault(name, []).append(timing)

    flops = useful_flops(work, options.conversations) / options.conversations
    speeds = {name: statistics.median(t.samples_per_second for t in timings) for name, timings in results.items()}
    baseline = max((speed for name, speed in speeds.items() if name != "lapilli"), default=None)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, fp32 matrix rate {rate:.0f} GFLOP/s")
    print(f"{'':34}{'samples/s':>10}{'matrix rate':>13}{'peak memory':>13}{'ratio':>8}")
    for name, timings in results.items():
        share = speeds[name] * flops / 1e9 / rate
        memory = statistics.median(t.peak_bytes for t in timings) / 2**30
        ratio = f"{speeds[name] / baseline:.2f}" if baseline else ""
        print(f"{name:34}{speeds[name]:>10.3f}{share:>12.0%} {memory:>9.2f} GiB{ratio:>8}")


if __name__ == "__main__":
    main()
