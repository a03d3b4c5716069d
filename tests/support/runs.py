"""Runs of a tiny model that are compared with each other: how they are made, and what it means that they are equal."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lapilli.recipe.load import load_recipe
from lapilli.train.metrics import read_metrics
from lapilli.train.run import train_stage

REFERENCE = Path(__file__).parents[1] / "reference"


def make_workshop(folder: Path, base: Path) -> Path:
    """A folder with conversations, text and pictures by turns, held-out ones, and a recipe."""
    records = json.loads((REFERENCE / "training/instruct.json").read_text())
    pictures, text = ([r for r in records if ("image" in r) == wanted] for wanted in (True, False))
    mixed = [one for pair in zip(pictures[:6], text[:6], strict=True) for one in pair]
    (folder / "chat.json").write_text(json.dumps(mixed))
    (folder / "held-out.json").write_text(json.dumps(records[:5]))
    (folder / "recipe.yaml").write_text(f"""\
model: {base}
out: run
data: {{train: chat.json, images: {REFERENCE / "training/images"}, workers: 0, index: {folder / "index"}}}
train: {{global_batch_size: 4, tokens_per_micro_batch: 700, warmup_ratio: 0}}
run: {{precision: fp32, device: cpu, deterministic: true, threads: 1}}
""")
    return folder


def train_alone(path, *overrides, resume="auto", out=None, evaluate=None):
    loaded = load_recipe(path, [*overrides, *([f"out={out}"] if out else [])])
    (stage,) = loaded.recipe.stages
    with open("/dev/null", "w") as stream:
        train_stage(stage, {}, resume=resume, stream=stream, evaluate=evaluate)
    return Path(str(stage.out))


def assert_learned_the_same(one, two, *, after=0):
    """Losses, gradients and counts of every step, validation losses and weights of two runs."""
    rows, others = (read_metrics(folder / "metrics.jsonl") for folder in (one, two))
    rows = [row for row in rows if row["step"] > after]
    assert [row["step"] for row in rows] == [row["step"] for row in others]
    assert rows
    for row, other in zip(rows, others, strict=True):
        for key in ("tokens", "supervised_tokens", "samples", "learning_rate", "epoch"):
            assert row[key] == other[key], (row["step"], key)
        for key in ("loss", "grad_norm", "validation_loss"):
            assert (key in row) == (key in other)
            assert row.get(key, 0.0) == pytest.approx(other.get(key, 0.0), rel=1e-5), (row["step"], key)
    names = [p.name for p in (one / "model").glob("*.safetensors")]
    assert names
    for name in names:
        a, b = (load_file(folder / "model" / name) for folder in (one, two))
        assert a.keys() == b.keys()
        for key in a:
            torch.testing.assert_close(a[key], b[key], rtol=1e-5, atol=1e-6, msg=f"{name}: {key}")
