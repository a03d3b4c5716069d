"""The loss of a finished model is the one its run recorded, whoever computes it and in however many processes."""

import json
import subprocess
import sys

import pytest
from tests.support.runs import train_alone

from lapilli.base.errors import RecipeError
from lapilli.recipe.load import load_recipe
from lapilli.train.metrics import read_metrics
from lapilli.train.validate import validate_stage

MORE = ("data.validation=held-out.json", "train.validate_every=2", "train.save_every=2", "train.keep_checkpoints=2")


def recorded(folder):
    return {r["step"]: r["validation_loss"] for r in read_metrics(folder / "metrics.jsonl") if "validation_loss" in r}


def test_model_and_checkpoint_give_the_losses_of_their_run(recipe_file):
    path = recipe_file()
    folder = train_alone(path, *MORE)
    (stage,) = load_recipe(path, [*MORE]).recipe.stages
    with open("/dev/null", "w") as stream:
        found = validate_stage(stage, str(folder), stream=stream)
        before = validate_stage(stage, str(folder / "checkpoints/step-000002"), stream=stream)
    assert found.loss == pytest.approx(recorded(folder)[4], rel=1e-6)
    assert before.loss == pytest.approx(recorded(folder)[2], rel=1e-6)
    assert (before.step, found.step, found.samples) == (2, None, 4)
    assert before.loss != pytest.approx(found.loss, rel=1e-4)


def test_without_held_out_data_there_is_nothing_to_say(recipe_file, base):
    (stage,) = load_recipe(recipe_file(), []).recipe.stages
    with pytest.raises(RecipeError, match=r"data\.validation names nothing"):
        validate_stage(stage, str(base))


@pytest.mark.slow
def test_two_processes_share_the_data_and_agree_with_one(recipe_file, base, tmp_path):
    arguments = ["-m", "lapilli.cli", "validate", recipe_file(), "data.validation=held-out.json", "--model", str(base)]
    arguments += ["--out", str(tmp_path / "found.json")]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    losses = []
    for command in (arguments, [*torchrun, *arguments]):
        made = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=300, check=False)
        assert made.returncode == 0, made.stderr[-3000:]
        assert made.stdout.count("perplexity") == 1
        losses.append(json.loads((tmp_path / "found.json").read_text()))
    assert [one["processes"] for one in losses] == [1, 2]
    assert losses[1]["loss"] == pytest.approx(losses[0]["loss"], rel=1e-5)
    assert losses[1]["supervised_tokens"] == losses[0]["supervised_tokens"]
