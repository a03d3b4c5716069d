"""Several processes learn what one does, step by step, and end together whatever happens to one of them."""

import json
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.support.processes import Job, free_port, run_together, start_alone
from tests.support.runs import assert_learned_the_same, train_alone

from lapilli.base.errors import LapilliError, RunError
from lapilli.data.pack import plan_step
from lapilli.train.metrics import read_metrics
from lapilli.train.parallel.choose import engine_name
from lapilli.train.parallel.world import ALONE, World, first_host, read_launch
from lapilli.train.step import StepTotals, loss_weights

REFERENCE = Path(__file__).parents[1] / "reference"
TORCHRUN = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
SLURM = {
    "SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "4711", "SLURM_STEP_ID": "0",
    "SLURM_JOB_NODELIST": "gpu[03-04],fat1",
}  # fmt: skip


def test_variables_of_torchrun_say_how_a_run_was_started():
    launch = read_launch(TORCHRUN | SLURM)
    assert launch is not None
    assert (launch.rank, launch.size, launch.local_rank, launch.address) == (3, 8, 1, "10.0.0.1:29500")
    assert read_launch({}) is None
    assert read_launch({"WORLD_SIZE": "1"} | SLURM) is None
    with pytest.raises(RunError, match="WORLD_SIZE is 8, but RANK, MASTER_PORT not set"):
        read_launch({"WORLD_SIZE": "8", "MASTER_ADDR": "x"})
    with pytest.raises(RunError, match="RANK is x; a process of a run needs its number"):
        read_launch(TORCHRUN | {"RANK": "x"})
    with pytest.raises(RunError, match="number 8 of 8"):
        read_launch(TORCHRUN | {"RANK": "8"})


def test_variables_of_slurm_say_how_a_run_was_started():
    launch = read_launch(SLURM)
    assert launch is not None
    assert (launch.rank, launch.size, launch.local_rank) == (5, 8, 1)
    host, _, port = launch.address.partition(":")
    assert host == "gpu03"
    assert 20_000 <= int(port) < 32_000
    for rank in range(8):
        other = read_launch(SLURM | {"SLURM_PROCID": str(rank)})
        assert other is not None
        assert other.address == launch.address
    given = read_launch(SLURM | {"MASTER_ADDR": "fat1", "MASTER_PORT": "5000"})
    assert given is not None
    assert given.address == "fat1:5000"
    # A batch script has the variables of its job, but is one process.
    assert read_launch({name: value for name, value in SLURM.items() if name != "SLURM_STEP_ID"}) is None
    assert read_launch(SLURM | {"SLURM_STEP_NUM_TASKS": "1"}) is None


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("node7", "node7"),
        ("a,b", "a"),
        ("rack1-[07-09,12],rack2-[01-04]", "rack1-07"),
        ("r[2,4]n[10-11]-ib,x", "r2n10-ib"),
        ("", ""),
    ],
)
def test_the_first_host_of_a_node_list(nodes, host):
    assert first_host(nodes) == host


def test_engines_by_name():
    several = World(rank=1, size=2)
    assert [engine_name("auto", ALONE), engine_name("auto", several), engine_name("ddp", ALONE)] == [
        "single", "ddp", "ddp",
    ]  # fmt: skip
    with pytest.raises(RunError, match="single is for one process, but 2 were started"):
        engine_name("single", several)


@pytest.mark.parametrize("reduction", ["tokens", "microbatch_mean"])
def test_a_part_of_a_step_weighs_as_in_the_whole(reduction):
    counts = [3.0, 0.0, 1.0, 6.0]
    whole = StepTotals.sum(StepTotals(micro_batches=1, weight=count) for count in counts)
    parts = [loss_weights(part, reduction, whole) for part in (counts[:1], [], counts[1:])]
    assert [w for part in parts for w in part] == loss_weights(counts, reduction)


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
    "text_beside_pictures": ["train.global_batch_size=2", "data.order=sequential"],
    "nothing_for_one": ["train.global_batch_size=1", "train.max_steps=4"],
}
EVERY = [
    "train.optimizer=sgd", "train.learning_rate=0.05", "train.validate_every=2", "train.save_every=2",
    "train.keep_checkpoints=9", "data.validation=held-out.json", "train.lora=null",
]  # fmt: skip


@pytest.fixture(scope="module")
def together(workshop):
    """What two processes say of all the jobs below: they are started once."""
    path = str(workshop / "recipe.yaml")
    train_alone(path, *EVERY, out="one")
    shutil.copytree(REFERENCE / "training/images", workshop / "pictures")
    broken = next(r["image"] for r in json.loads((workshop / "chat.json").read_text()) if "image" in r)
    good = (workshop / "pictures" / broken).read_bytes()
    middle = len(good) // 2
    (workshop / "pictures" / broken).write_bytes(good[:middle] + bytes(40) + good[middle + 40 :])
    damaged = [*EVERY, "data.validation=[]", f"data.images={workshop}/pictures"]
    jobs = {kind: Job(path, [*EVERY, *more, f"out=two-{kind}"]) for kind, more in KINDS.items()}
    jobs["from one"] = Job(path, [*EVERY, "out=from-one"], resume="one/checkpoints/step-000002")
    dropout = [*EVERY, "train.lora={r: 4, dropout: 0.3}", "train.optimizer=adamw"]
    jobs["dropout"] = Job(path, [*dropout, "out=dropout"])
    jobs["dropout, from two"] = Job(path, [*dropout, "out=dropout-on"], resume="dropout/checkpoints/step-000002")
    jobs["stopped"] = Job(path, [*EVERY, "train.epochs=6", "out=stopped"], signal=signal.SIGTERM, after=2)
    jobs["not finite"] = Job(path, [*EVERY, "train.learning_rate=1e30", "out=broken"])
    jobs["bad picture"] = Job(path, [*damaged, "out=bad"])
    jobs["quarantine"] = Job(
        path, [*damaged, "data.bad_records=quarantine", "data.max_bad_ratio=0.1", "out=quarantine"]
    )
    jobs["no model"] = Job(path, ["model=nowhere", "out=none"])
    return dict(zip(jobs, run_together(list(jobs.values()), workshop), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_learn_what_one_does(workshop, together, kind):
    assert together[kind][0] == together[kind][1]
    assert together[kind][0]["stopped_by"] is None
    manifest = json.loads((workshop / f"two-{kind}/run.json").read_text())
    assert (manifest["engine"], manifest["processes"]) == ("ddp", 2)
    path = str(workshop / "recipe.yaml")
    alone = train_alone(path, *EVERY, *KINDS[kind], out=f"one-{kind}")
    assert json.loads((alone / "run.json").read_text())["engine"] == "single"
    assert_learned_the_same(alone, workshop / f"two-{kind}")


def test_the_steps_of_two_have_text_beside_pictures():
    """What the run above is for: two samples, one of each kind, never share a process."""
    assert plan_step([50, 300], 700, multiple=2) == [[0], [1]]


@pytest.mark.slow
def test_a_run_goes_on_in_another_number_of_processes(workshop, together):
    path = str(workshop / "recipe.yaml")
    assert_learned_the_same(workshop / "one", workshop / "from-one", after=2)
    two = workshop / "two-freeze_vision"
    back = train_alone(path, *EVERY, resume=str(two / "checkpoints/step-000002"), out="from-two")
    assert_learned_the_same(two, back, after=2)
    checkpoint = str(workshop / "two-adamw/checkpoints/step-000002")
    back = train_alone(path, *EVERY, *KINDS["adamw"], resume=checkpoint, out="adamw-from-two")
    assert_learned_the_same(workshop / "two-adamw", back, after=2)


@pytest.mark.slow
def test_two_processes_go_on_bit_for_bit(workshop, together):
    """Each draws its own dropout, and goes on with its own random state."""
    assert together["dropout, from two"][0]["step"] == 3
    whole, rest = (read_metrics(workshop / name / "metrics.jsonl") for name in ("dropout", "dropout-on"))
    assert [(row["loss"], row["grad_norm"]) for row in whole[2:]] == [(row["loss"], row["grad_norm"]) for row in rest]
    states = load_file(workshop / "dropout/checkpoints/step-000002/random.safetensors")
    assert set(states) == {"cpu", "process-1.cpu"}
    assert not torch.equal(states["cpu"], states["process-1.cpu"])
    for name in ("adapter_model.safetensors", "projector.safetensors"):
        a, b = (load_file(workshop / folder / "model" / name) for folder in ("dropout", "dropout-on"))
        assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.slow
def test_a_wish_to_one_stops_both_after_the_same_step(workshop, together):
    first, second = together["stopped"]
    assert first == second
    assert first["stopped_by"] == "SIGTERM"
    step = first["step"]
    assert 2 <= step < 18
    assert [row["step"] for row in read_metrics(workshop / "stopped/metrics.jsonl")] == list(range(1, step + 1))
    path = str(workshop / "recipe.yaml")
    more = [*EVERY, "train.epochs=6"]
    whole = train_alone(path, *more, out="unstopped")
    assert_learned_the_same(whole, train_alone(path, *more, out="stopped"))


@pytest.mark.slow
def test_an_error_of_one_ends_both(workshop, together):
    path = str(workshop / "recipe.yaml")
    for one in together["not finite"]:
        assert one["error"] == "RunError"
        assert re.search(
            r"step \d+: the (loss|gradient norm) is \S+ \(no weight was changed\); samples: \w", one["message"]
        )
    assert together["not finite"][0] == together["not finite"][1]
    found = {one["error"]: one["message"] for one in together["bad picture"]}
    assert set(found) == {"DataError", "EndedElsewhere"}
    assert "damaged" in found["DataError"]
    assert found["DataError"].splitlines()[0] in found["EndedElsewhere"]
    assert all("nowhere" in one["message"] for one in together["no model"])
    assert not (workshop / "none").exists()
    overrides = [*EVERY, "data.validation=[]", f"data.images={workshop}/pictures"]
    with pytest.raises(LapilliError, match="damaged"):
        train_alone(path, *overrides, out="bad-alone")
    saved = [sorted(p.name for p in (workshop / f / "checkpoints").iterdir()) for f in ("bad", "bad-alone")]
    assert saved[0] == saved[1]


@pytest.mark.slow
def test_bad_records_count_for_all(workshop, together):
    assert together["quarantine"][0] == together["quarantine"][1]
    overrides = [*EVERY, "data.validation=[]", f"data.images={workshop}/pictures"]
    more = ["data.bad_records=quarantine", "data.max_bad_ratio=0.1"]
    alone = train_alone(str(workshop / "recipe.yaml"), *overrides, *more, out="quarantine-alone")
    assert_learned_the_same(alone, workshop / "quarantine")
    listed = [(folder / "left_out.jsonl").read_text() for folder in (alone, workshop / "quarantine")]
    assert listed[0] == listed[1]


@pytest.mark.slow
def test_a_process_that_is_killed_ends_the_other(workshop):
    path = str(workshop / "recipe.yaml")
    port = free_port()
    job = Job(path, [*EVERY, "train.epochs=60", "data.workers=1", "out=killed"], signal=signal.SIGKILL, after=2)
    first, second = (start_alone(job, workshop, rank, 2, port) for rank in range(2))
    try:
        assert second.wait(timeout=300) == -signal.SIGKILL
        began = time.monotonic()
        _, said = first.communicate(timeout=60)
        assert time.monotonic() - began < 60
    finally:
        for process in (first, second):
            process.kill()
            process.wait()
    assert first.returncode == 1
    assert "ProcessLost: process 0 of 2: another process of this run is gone" in said.replace("lapilli.", "")
