"""Whole runs give the losses that the original trainer recorded, step by step."""

import json
from pathlib import Path

import pytest

from lapilli.assemble.load import load
from lapilli.model.freeze import apply_freeze
from lapilli.recipe.schema import Data, Run, Stage, Train
from lapilli.train.metrics import read_metrics
from lapilli.train.optimizer import parameter_groups
from lapilli.train.run import train_stage

REFERENCE = Path(__file__).parents[1] / "reference/training"
RUNS = ["pretrain", "finetune", "finetune-projector-lr", "finetune-lora"]


def recorded(name):
    return json.loads((REFERENCE / f"{name}.json").read_text())


def train_of(name) -> Train:
    arguments = recorded(name)["arguments"]
    lora = {"r": 8, "alpha": 16, "dropout": 0} if arguments.get("lora_enable") else None
    return Train(
        freeze="projector" if arguments.get("tune_mm_mlp_adapter") else "freeze_vision",
        lora=lora,
        global_batch_size=8,
        loss_reduction="microbatch_mean",
        micro_batch_size=4,
        learning_rate=arguments["learning_rate"],
        projector_learning_rate=arguments.get("mm_projector_lr"),
        weight_decay=arguments["weight_decay"],
    )


@pytest.fixture
def reference_stage(base, tmp_path):
    def make(name) -> Stage:
        run = recorded(name)
        records = {r["id"]: r for r in json.loads((REFERENCE / Path(run["arguments"]["data_path"]).name).read_text())}
        in_order = [records[i] for step in run["steps"] for i in step["samples"]]
        (tmp_path / "data.json").write_text(json.dumps(in_order))
        data = {
            "train": str(tmp_path / "data.json"),
            "images": str(REFERENCE / "images"),
            "template": "plain" if run["arguments"]["version"] == "plain" else "vicuna_v1",
            "placement": "front",
            "max_length": 512,
            "order": "sequential",
            "workers": 0,
        }
        return Stage(
            model=str(base),
            out=str(tmp_path / "run"),
            data=Data.model_validate(data),
            train=train_of(name),
            run=Run(precision="fp32", device="cpu", threads=1),
        )

    return make


@pytest.mark.parametrize("name", RUNS)
def test_losses_equal_the_recorded_ones(reference_stage, name, tmp_path):
    train_stage(reference_stage(name), {}, stream=(tmp_path / "log").open("w"))
    rows = read_metrics(tmp_path / "run/metrics.jsonl")
    steps = recorded(name)["steps"]
    assert len(rows) == len(steps)
    compared = 1 if name == "finetune-lora" else len(rows)  # adapters start at random
    for row, step in zip(rows[:compared], steps, strict=False):
        assert row["loss"] == pytest.approx(step["loss"], abs=5e-5)
    assert rows[0]["learning_rate"] == 0
    for row, step in zip(rows[1:], steps, strict=False):  # the original logs what the next step runs at
        assert row["learning_rate"] == pytest.approx(step["learning_rate"], rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("name", RUNS)
def test_parameter_groups_equal_the_recorded_ones(base, name):
    from lapilli.model.adapter import add_lora

    model, train = load(base).model, train_of(name)
    if train.lora:
        add_lora(model, r=train.lora.r, alpha=train.lora.alpha, dropout=train.lora.dropout)
    apply_freeze(model, train.freeze, lora=train.lora is not None)
    groups = parameter_groups(model.named_parameters(), train)
    ours = [(g.weight_decay, g.learning_rate, len(g.parameters), g.numel) for g in groups]
    theirs = [
        (g["weight_decay"], g["initial_lr"], g["parameters"], g["numel"]) for g in recorded(name)["parameter_groups"]
    ]
    assert ours == theirs
    assert sum(g.numel for g in groups) == recorded(name)["trainable"]
