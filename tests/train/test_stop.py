"""A run that is asked to stop while it validates or evaluates: it stops then, and nothing is missing afterwards."""

import json
import signal
import time
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from tests.support.processes import Job, Watcher, run_together
from tests.support.runs import assert_learned_the_same, train_alone

from lapilli.base.interrupt import StopWish
from lapilli.recipe.load import load_recipe
from lapilli.train.metrics import read_metrics
from lapilli.train.parallel.asked import AskedTogether
from lapilli.train.run import train_stage
from lapilli.train.state import complete_checkpoints, read_state

LORA = [
    "data.validation=chat.json", "train.validate_every=2", "train.keep_best=1", "train.save_every=3",
    "train.keep_checkpoints=9", "train.lora={r: 4, dropout: 0.3}", "train.average_decay=0.9", "data.workers=1",
]  # fmt: skip
EVERY = [
    "train.optimizer=sgd", "train.learning_rate=0.05", "train.validate_every=2", "train.keep_checkpoints=9",
    "data.validation=held-out.json", "train.epochs=2",
]  # fmt: skip


def train(path, *overrides, evaluate=None):
    loaded = load_recipe(path, list(overrides))
    (stage,) = loaded.recipe.stages
    with open("/dev/null", "w") as stream:
        return train_stage(stage, {}, stream=stream, evaluate=evaluate)


@pytest.mark.parametrize("step", [2, 4])
def test_a_stop_in_a_validation_leaves_it_to_the_run_that_goes_on(recipe_file, tmp_path, step):
    path = recipe_file()
    whole = train_alone(path, *LORA, out="whole")
    folder = tmp_path / "stopped"
    outcome = train(path, *LORA, f"out={folder}", evaluate=Watcher(Job("", stop_validation=step)))
    assert (outcome.step, outcome.stopped_by, outcome.finished) == (step, "SIGTERM", False)
    assert not (folder / "model").exists()
    assert "validation_loss" not in read_metrics(folder / "metrics.jsonl")[-1]
    outcome = train(path, *LORA, f"out={folder}")
    assert (outcome.step, outcome.stopped_by, outcome.finished) == (4, None, True)
    kept = ("step", "loss", "grad_norm", "validation_loss")
    rows, others = (read_metrics(one / "metrics.jsonl") for one in (whole, folder))
    assert [[row.get(key) for key in kept] for row in rows] == [[row.get(key) for key in kept] for row in others]
    assert [row["step"] for row in rows if "validation_loss" in row] == [2, 4]
    best, again = (json.loads((one / "checkpoints/best.json").read_text()) for one in (whole, folder))
    assert best == again
    assert all(read_state(one).judged for one in complete_checkpoints(folder / "checkpoints"))
    for name in ("adapter_model.safetensors", "projector.safetensors"):
        a, b = (load_file(one / "model" / name) for one in (whole, folder))
        assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.fixture(scope="module")
def together(workshop):
    path = str(workshop / "recipe.yaml")
    jobs = {}
    for engine in ("ddp", "fsdp"):
        more = [*EVERY, f"run.engine={engine}"]
        jobs[f"{engine} stops"] = Job(path, [*more, f"out={engine}"], stop_validation=4)
        jobs[f"{engine} goes on"] = Job(path, [*more, f"out={engine}"])
        asked = [*more, "train.evaluate=[{task: pope, every: 3, data: x}]", f"out={engine}-asked"]
        jobs[f"{engine} stops asking"] = Job(path, asked, signal=signal.SIGTERM, wait=True)
        jobs[f"{engine} asks on"] = Job(path, asked, ask=True)
    return dict(zip(jobs, run_together(list(jobs.values()), workshop), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_two_processes_give_a_validation_up_together(workshop, together, engine):
    for one in together[f"{engine} stops"]:
        assert (one["step"], one["stopped_by"]) == (4, "SIGTERM")
    for one in together[f"{engine} goes on"]:
        assert (one["step"], one["stopped_by"]) == (6, None)
    whole = train_alone(str(workshop / "recipe.yaml"), *EVERY, out=f"whole-{engine}")
    assert_learned_the_same(whole, workshop / engine)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_an_evaluation_in_one_process_hears_what_the_other_is_asked(workshop, together, engine):
    for one in together[f"{engine} stops asking"]:
        assert (one["step"], one["stopped_by"]) == (3, "SIGTERM")
    rows = read_metrics(workshop / f"{engine}-asked/metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    answers = {row["step"]: row["evaluation"] for row in rows if "evaluation" in row}
    more = [*EVERY, "train.evaluate=[{task: pope, every: 3, data: x}]"]
    alone = train_alone(
        str(workshop / "recipe.yaml"), *more, out=f"asked-{engine}", evaluate=Watcher(Job("", ask=True))
    )
    expected = {row["step"]: row["evaluation"] for row in read_metrics(alone / "metrics.jsonl") if "evaluation" in row}
    assert list(answers) == list(expected) == [3, 6]
    for step, said in expected.items():
        assert answers[step] == pytest.approx(said, rel=1e-4)


def test_processes_ask_each_other_about_every_two_seconds_and_not_after_every_batch():
    """Slow batches: after each. Quick ones: after 16."""

    def batches_between(seconds):
        asked, now = [], [0.0]
        exchange = lambda value: asked.append(now[0]) or [value, [None, value[1] * 2]]  # noqa: E731
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(time, "monotonic", lambda: now[0])
            together = AskedTogether(SimpleNamespace(size=2, exchange=exchange), StopWish())  # type: ignore[arg-type]
            for _ in range(100):
                now[0] += seconds
                assert not together.after_a_piece()
        return round((asked[-1] - asked[-2]) / seconds)

    assert [batches_between(seconds) for seconds in (3.0, 0.25, 0.001)] == [1, 4, 16]
