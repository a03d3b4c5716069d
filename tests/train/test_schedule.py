"""The schedule is the original's, shifted: the reference logs the learning rate after each step."""

import json
from pathlib import Path

import pytest

from lapilli.recipe.schema import Train
from lapilli.train.schedule import factor, warmup_steps

REFERENCE = Path(__file__).parents[1] / "reference" / "training"


@pytest.mark.parametrize("name", ["pretrain", "finetune"])
def test_cosine_equals_the_recorded_learning_rates(name):
    recorded = json.loads((REFERENCE / f"{name}.json").read_text())
    steps = [s["learning_rate"] for s in recorded["steps"]]
    train = Train(learning_rate=recorded["arguments"]["learning_rate"], warmup_ratio=0.03)
    ours = [train.learning_rate * factor(k, len(steps), train) for k in range(1, len(steps) + 2)]
    assert ours[0] == 0
    assert ours[1:] == pytest.approx(steps, rel=1e-12, abs=1e-15)


def test_warmup_rounds_up_and_every_schedule_starts_at_its_peak():
    assert warmup_steps(100, 0.03) == 3
    assert warmup_steps(10, 0.03) == 1
    for kind in ("cosine", "linear", "constant"):
        train = Train(schedule=kind, warmup_ratio=0.03, min_learning_rate_ratio=0.1)
        assert [factor(k, 100, train) for k in (1, 2, 3, 4)] == pytest.approx([0, 1 / 3, 2 / 3, 1])
        end = 1 if kind == "constant" else 0.1
        assert factor(101, 100, train) == pytest.approx(end)


def test_no_warmup_starts_at_the_peak():
    assert factor(1, 10, Train(warmup_ratio=0)) == 1
