"""Plans: what fits is said to fit, what does not comes with what would, and a run out of memory says the same."""

import json
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from tests.support.runs import train_alone

from lapilli.base.errors import RunError
from lapilli.recipe.load import load_recipe
from lapilli.run.plan import plan_recipe
from lapilli.train.metrics import read_metrics
from lapilli.train.parallel.single import Single
from lapilli.train.plan.machine import named
from lapilli.train.plan.plan import SEVERAL


def plan(path, *overrides, memory=80 * 10**9, processes=1, kind="cuda"):
    machine = replace(named("h100"), kind=kind, memory_bytes=memory)
    with open("/dev/null", "w") as stream:
        (made,) = plan_recipe(load_recipe(path, list(overrides)), machine, processes, stream=stream)
    return made


def test_engines_split_what_they_say_they_split(recipe_file):
    made = plan(recipe_file(), "train.freeze=full", processes=4)
    of = {one.engine: one.device for one in made.options if one.checkpointing == "none"}
    trained = sum(part.trainable for part in made.parts)
    assert set(of) == set(SEVERAL)
    assert made.chosen.engine == "ddp"
    assert of["ddp"]["optimiser"] == 8 * trained
    assert of["zero1"]["optimiser"] == of["fsdp"]["optimiser"] == 2 * trained
    assert of["fsdp"]["gradients"] == of["zero2"]["gradients"] == trained
    assert of["fsdp"]["weights"] < 0.3 * of["ddp"]["weights"]
    assert of["fsdp+offload"]["weights"] + of["fsdp+offload"]["optimiser"] < of["fsdp"]["optimiser"]
    assert made.fits
    assert made.advice() == []
    assert made.seconds == pytest.approx(4 * made.seconds_per_step)


def test_what_does_not_fit_comes_with_what_would(recipe_file):
    path = recipe_file()
    whole = plan(path, "train.freeze=full", "train.tokens_per_micro_batch=4000")
    least = min(one.total for one in whole.options)
    between = plan(
        path, "train.freeze=full", "train.tokens_per_micro_batch=4000", memory=(whole.chosen.total + least) // 2
    )
    assert not between.fits
    (checkpointing,) = [line for line in between.advice() if "gradient_checkpointing=" in line]
    wanted = re.search(r"gradient_checkpointing=(\w+)", checkpointing).group(1)
    (promised,) = [one for one in between.options if one.checkpointing == wanted]
    assert promised.total <= between.machine.memory_bytes
    below = plan(path, "train.freeze=full", "train.tokens_per_micro_batch=4000", memory=least - 1_000_000)
    assert any("tokens_per_micro_batch=" in line for line in below.advice())


def test_padding_to_fixed_shapes_is_planned_as_the_run_has_it(recipe_file):
    path, shapes = recipe_file(), "run.static_shapes=2"
    made, packed = plan(path, shapes), plan(path)
    rows = read_metrics(train_alone(path, shapes) / "metrics.jsonl")
    positions = sum(row["tokens"] / (1 - row["padding"]) for row in rows)
    assert made.workload.positions_per_step * len(rows) == pytest.approx(positions, rel=1e-4)
    assert made.workload.tokens_per_step == packed.workload.tokens_per_step
    share = 1 - sum(row["tokens"] for row in rows) / positions
    assert f"{share:.0%} of a step is padding" in "\n".join(made.lines())
    assert made.flops_per_step["none"] > packed.flops_per_step["none"]
    assert made.workload.shape.tokens == made.workload.positions <= 700
    absent = plan(path, shapes, "data.train=absent.json").workload
    assert absent.positions_per_step > absent.tokens_per_step


def test_micro_batches_are_played_in_the_sizes_that_the_run_has(recipe_file):
    path, whole = recipe_file(), "train.tokens_per_micro_batch=100000"
    tokens = [row["tokens"] for row in read_metrics(train_alone(path, whole) / "metrics.jsonl")]
    assert plan(path, whole).workload.shares == tuple((own / max(tokens),) for own in tokens)
    split = plan(path, f"train.tokens_per_micro_batch={max(tokens) * 2 // 3}").workload
    assert split.micro_batches > 1
    assert len(split.shares) == len(tokens)
    assert max(max(step) for step in split.shares) == 1
    assert {len(step) for step in split.shares} <= {1, 2}


def test_a_copy_for_the_last_checkpoint_lies_where_activations_were(recipe_file):
    path = recipe_file()
    last = plan(path, "train.freeze=full", kind="cpu")
    often = plan(path, "train.freeze=full", "train.save_every=2", kind="cpu")
    trained = sum(part.trainable for part in last.parts)
    files = 2 * 8 * trained  # the optimiser's, as bytes of its tensors and of the file
    assert last.chosen.device["checkpoint being written"] == files
    assert often.chosen.device["checkpoint being written"] == files + 12 * trained


def test_data_that_are_not_there_are_assumed_and_said(recipe_file, tmp_path):
    path = recipe_file()
    (tmp_path / "chat.json").unlink()
    made = plan(path, "train.max_steps=10")
    assert "chat.json is not there; assumed: one picture" in made.workload.assumed
    assert any("assumed" in line for line in made.lines())
    assert made.seconds is not None


def test_a_run_out_of_memory_says_what_it_needs(recipe_file, monkeypatch):
    def allocate(*_args, **_kwargs):
        return torch.empty(2**50)

    monkeypatch.setattr(Single, "update", allocate)
    with pytest.raises(RunError) as raised:
        train_alone(recipe_file(), "train.freeze=full")
    said = str(raised.value)
    assert said.startswith("out of memory: ")
    assert "this run needs about" in said
    assert "train.gradient_checkpointing=" in said or "tokens_per_micro_batch=" in said


def test_a_dry_run_reads_no_weights_and_shows_the_first_batch(recipe_file, base, tmp_path):
    from lapilli.train.parallel.world import ALONE
    from lapilli.train.rehearse import rehearse

    (stage,) = load_recipe(recipe_file(), []).recipe.stages
    said: list[str] = []
    with open("/dev/null", "w") as stream:
        found = rehearse(stage, "auto", said.append, stream, ALONE)
    text = "\n".join(said)
    assert found.total_steps == 4
    assert re.search(r"projector +6.3k", text)
    assert "first step: 4 samples" in text
    assert re.search(r"<picture: \d+ tokens>", text)
    assert re.search(r"\[[^\]]+</s>\]", text)  # what is learned ends with the end token
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_the_command_prints_json_and_its_status(recipe_file):
    command = [sys.executable, "-m", "lapilli.cli", "plan", recipe_file(), "--device", "h100", "--json"]
    fits = subprocess.run([*command, "--nodes", "2", "--gpus", "4"], capture_output=True, text=True, check=False)
    assert fits.returncode == 0, fits.stderr
    (made,) = json.loads(fits.stdout)
    assert made["processes"] == 8
    assert made["needs"]["total"] == sum(made["needs"]["device"].values())
    small = subprocess.run([*command, "--memory", "100MB"], capture_output=True, text=True, check=False)
    assert small.returncode == 1
    assert json.loads(small.stdout)[0]["fits"] is False
