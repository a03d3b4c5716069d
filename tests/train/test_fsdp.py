"""Weights split over two processes learn what one process does, and end together whatever happens to one of them."""

import json
import subprocess
import sys
import time

import pytest
from tests.support import processes
from tests.support.processes import Job, run_together
from tests.support.runs import assert_learned_the_same, make_workshop, train_alone

from lapilli.base.errors import RunError
from lapilli.recipe.schema import Fsdp, Run
from lapilli.train.parallel.fsdp import check_fsdp
from lapilli.train.parallel.world import ALONE, World

EVERY = [
    "train.optimizer=sgd", "train.learning_rate=0.05", "train.validate_every=2", "train.save_every=2",
    "train.keep_checkpoints=9", "data.validation=held-out.json",
]  # fmt: skip
FSDP = "run.engine=fsdp"
KINDS = {
    "projector": ["train.freeze=projector"],
    "freeze_vision": ["data.workers=1"],
    "full": ["train.freeze=full"],
    "lora": ["train.lora={r: 4, dropout: 0.0}"],
    "adamw": ["train.optimizer=adamw", "train.learning_rate=1e-4"],
    "microbatch_mean": [
        "train.loss_reduction=microbatch_mean",
        "train.micro_batch_size=1",
        "train.global_batch_size=3",
    ],
    "text_beside_pictures": ["train.freeze=full", "train.global_batch_size=2", "data.order=sequential"],
    "nothing_for_one": ["train.freeze=full", "train.global_batch_size=1", "train.max_steps=4"],
}
SPLIT = {
    "projector, frozen split": [*KINDS["projector"], "run.fsdp.frozen=shard"],
    "lora, frozen split": [*KINDS["lora"], "run.fsdp.frozen=shard"],
    "full, kept gathered": [*KINDS["full"], "run.fsdp.reshard=false"],
    "full, recomputed": [*KINDS["full"], "train.gradient_checkpointing=full"],
    "text_beside_pictures, offloaded": [*KINDS["text_beside_pictures"], "run.fsdp.offload=true"],
}


def alike(kind):
    """The kind of run, on one process, that a run on two is compared with."""
    return kind.partition(", ")[0]


@pytest.mark.parametrize(
    ("size", "reshard", "message"),
    [(1, True, "and one was started"), (4, 3, "part of 4"), (4, 4, "part of 4"), (4, 1, "part of 4")],
)
def test_what_this_number_of_processes_can_not_have_is_refused(size, reshard, message):
    with pytest.raises(RunError, match=message):
        check_fsdp(Run(engine="fsdp", fsdp=Fsdp(reshard=reshard)), World(size=size) if size > 1 else ALONE)
    check_fsdp(Run(engine="fsdp", fsdp=Fsdp(reshard=2)), World(size=4))


@pytest.fixture(scope="module")
def workshop(base, tmp_path_factory):
    folder = make_workshop(tmp_path_factory.mktemp("fsdp"), base)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder


@pytest.fixture(scope="module")
def alone(workshop):
    """The runs of one process, each made once."""
    made = {}

    def run(kind):
        if kind not in made:
            made[kind] = train_alone(str(workshop / "recipe.yaml"), *EVERY, *KINDS[kind], out=f"one-{kind}")
        return made[kind]

    return run


@pytest.fixture(scope="module")
def together(workshop, alone):
    """What two processes say of all the jobs below: they are started once."""
    path = str(workshop / "recipe.yaml")
    jobs = {kind: Job(path, [*EVERY, FSDP, *more, f"out={kind}"]) for kind, more in (KINDS | SPLIT).items()}
    return dict(zip(jobs, run_together(list(jobs.values()), workshop), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*KINDS, *SPLIT])
def test_two_processes_learn_what_one_does(workshop, alone, together, kind):
    assert together[kind][0] == together[kind][1]
    assert together[kind][0]["stopped_by"] is None
    manifest = json.loads((workshop / kind / "run.json").read_text())
    assert (manifest["engine"], manifest["processes"]) == ("fsdp", 2)
    assert_learned_the_same(alone(alike(kind)), workshop / kind)
