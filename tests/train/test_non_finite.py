"""A loss or gradient that is not finite never reaches the weights; what then happens, and how samples are found."""

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tests.support.processes import Job, run_together

from lapilli.base.errors import RunError
from lapilli.data.pack import pack
from lapilli.recipe.load import load_recipe
from lapilli.train.metrics import read_metrics
from lapilli.train.non_finite import part_of
from lapilli.train.run import train_stage
from lapilli.train.state import complete_checkpoints, read_state

POISON = 3e38
"""A weight in the loss that fp32 holds, and whose product with almost any loss it does not."""
COMMON = ["data.train=poisoned.json", "data.order=sequential", "train.save_every=1", "train.keep_checkpoints=9"]


def train(path, *overrides, resume="auto"):
    (stage,) = load_recipe(path, [*COMMON, *overrides]).recipe.stages
    said = []
    with open(os.devnull, "w") as stream:
        train_stage(stage, {}, resume=resume, say=said.append, stream=stream)
    return Path(str(stage.out)), "\n".join(said)


def weighted(record, weight):
    """A LLaVA record as a semantic data array, whose answers count `weight`."""
    turns = []
    for turn in record["conversations"]:
        pictures = turn["value"].count("<image>") * [{"image": record.get("image")}]
        content = [*pictures, {"text": turn["value"].replace("<image>", "").strip()}]
        answer = turn["from"] == "gpt"
        more = {"semantic_loss_weight": [weight] * len(content)} if answer else {}
        turns.append({"type": "assistant" if answer else "user", "content": content, **more})
    return {"id": record["id"], "data": turns}


@pytest.fixture
def poisoned(recipe_file, tmp_path):
    """A recipe of 4 steps in order, with poisoned records by their number."""
    records = json.loads((tmp_path / "chat.json").read_text())

    def make(*bad):
        made = [weighted(record, POISON if number in bad else 1.0) for number, record in enumerate(records)]
        (tmp_path / "poisoned.json").write_text(json.dumps(made))
        return recipe_file(), [records[number]["id"] for number in bad]

    return make


def weights(folder):
    return load_file(folder / "model/model.safetensors")


def learned(folder):
    return [(row["step"], row["loss"], row["grad_norm"]) for row in read_metrics(folder / "metrics.jsonl")]


def test_it_stops_before_a_weight_changes_and_a_skip_goes_on_from_there(poisoned):
    path, (bad,) = poisoned(9)
    with pytest.raises(RunError, match=rf"step 3: the loss is inf \(no weight was changed\); samples: .*{bad}.*bisect"):
        train(path, "out=stopped")
    stopped = Path("stopped")
    assert [read_state(one).step for one in complete_checkpoints(stopped / "checkpoints")] == [1, 2]
    _, said = train(path, "out=stopped", "train.non_finite=skip")
    assert "going on after step 2" in said
    whole, _ = train(path, "out=whole", "train.non_finite=skip")
    rows = read_metrics(whole / "metrics.jsonl")
    assert [row["step"] for row in rows if "skipped" in row] == [3]
    assert (rows[2]["loss"], rows[2]["grad_norm"], rows[2]["skipped"]) == (None, None, "the loss is inf")
    assert all(math.isfinite(row["loss"]) for row in (rows[0], rows[1], rows[3]))
    assert learned(stopped) == learned(whole)
    steps = [load_file(next((one / "weights").iterdir())) for one in complete_checkpoints(whole / "checkpoints")]
    assert all(torch.equal(tensor, steps[2][name]) for name, tensor in steps[1].items())
    assert not all(torch.equal(tensor, steps[3][name]) for name, tensor in steps[2].items())
    assert all(torch.equal(tensor, weights(stopped)[name]) for name, tensor in weights(whole).items())
    report = (whole / "report.html").read_text()
    assert "steps skipped, not finite" in report


def test_skipping_has_a_ceiling_that_a_resumed_run_remembers(poisoned):
    path, _ = poisoned(1, 9)
    skip = ["train.non_finite=skip", "train.max_skipped_steps=1"]
    with pytest.raises(RunError, match=r"step 3: .*; 1 steps were skipped before, as many as train.max_skipped_steps"):
        train(path, "out=run", *skip)
    with pytest.raises(RunError, match=r"step 3: .*; 1 steps were skipped before"):
        train(path, "out=run", *skip)
    folder, _ = train(path, "out=run", *skip[:1], "train.max_skipped_steps=2")
    state = read_state(complete_checkpoints(folder / "checkpoints")[-1])
    assert [one.step for one in state.skipped] == [1, 3]


def test_bisecting_names_the_samples(poisoned):
    path, (first, second) = poisoned(5, 6)
    with pytest.raises(RunError) as caught:
        train(path, "out=run", "train.non_finite=bisect", "train.global_batch_size=8", "train.freeze=full")
    assert str(caught.value) == (
        f"step 1: the loss is inf (no weight was changed); by themselves these samples give it: {first}, {second}"
    )


def test_weights_at_fault_are_told_from_samples(poisoned):
    path, _ = poisoned()
    with pytest.raises(RunError, match=r"each of its 4 samples gives it by itself: look at the learning rate"):
        train(path, "out=run", "train.non_finite=bisect", "train.optimizer=sgd", "train.learning_rate=1e30")


@pytest.mark.parametrize("seed", range(4))
def test_a_part_of_a_batch_is_what_packing_the_part_gives(tiny_model, tiny_step, seed):
    examples, tiles = tiny_step(7, seed)
    batch = pack(examples, [one for own in tiles for one in own])
    chosen = sorted(np.random.default_rng(seed).choice(7, 3, replace=False).tolist())
    wanted = pack([examples[i] for i in chosen], [one for i in chosen for one in tiles[i]])
    found = part_of(batch, chosen, tiny_model())
    assert found.ids == wanted.ids
    for name in ("input_ids", "labels", "position_ids", "cu_seqlens"):
        assert torch.equal(getattr(found, name), getattr(wanted, name)), name
        assert getattr(found, name).dtype == getattr(wanted, name).dtype
    assert found.images.keys() == wanted.images.keys()
    for name, pixels in wanted.images.items():
        for kind in ("tiles", "tiles_per_image", "sizes"):
            assert torch.equal(getattr(found.images[name], kind), getattr(pixels, kind)), kind


@pytest.mark.slow
def test_two_processes_find_and_skip_the_same(poisoned, tmp_path):
    path, ids = poisoned(5, 6, 14)
    jobs = []
    for engine in ("ddp", "fsdp"):
        common = [*COMMON, f"run.engine={engine}", "train.freeze=full"]
        skip, bisect = [[*common, f"train.non_finite={what}"] for what in ("skip", "bisect")]
        jobs += [
            Job(path, [*bisect, "train.global_batch_size=8", f"out={engine}-bisect"]),
            Job(path, [*skip, f"out={engine}"]),
            Job(path, [*skip, f"out={engine}-on"], resume=f"{engine}/checkpoints/step-000002"),
        ]
    said = run_together(jobs, tmp_path)
    for engine, (bisected, skipped, _) in {"ddp": said[:3], "fsdp": said[3:]}.items():
        for one in bisected:
            assert set(one["message"].rpartition("give it: ")[2].split(", ")) == set(ids[:2]), engine
        assert skipped[0]["step"] == skipped[1]["step"] == 4
        rows = read_metrics(tmp_path / engine / "metrics.jsonl")
        assert [row["step"] for row in rows if "skipped" in row] == [2, 4]
        assert learned(tmp_path / f"{engine}-on") == learned(tmp_path / engine)[2:]
