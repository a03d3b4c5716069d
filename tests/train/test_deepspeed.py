"""DeepSpeed's ZeRO in two processes learns what one process does, and its state goes to other engines and back.

Each test starts its processes once, for all of its runs.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.support.processes import Job, Watcher, run_together, start_alone
from tests.support.runs import assert_learned_the_same, train_alone
from torch.distributed import TCPStore

from lapilli.train.metrics import read_metrics

pytestmark = pytest.mark.slow
ORIGINALS = Path(__file__).parents[1] / "reference/deepspeed"
EVERY = [
    "train.optimizer=sgd", "train.learning_rate=0.05", "train.validate_every=2", "train.save_every=2",
    "train.keep_checkpoints=9", "data.validation=held-out.json",
]  # fmt: skip
ADAMW = ["train.optimizer=adamw", "train.learning_rate=1e-4"]
KINDS = {
    "projector": ["train.freeze=projector"],
    "freeze_vision": ["train.projector_learning_rate=0.02"],
    "full": ["train.freeze=full"],
    "lora": ["train.lora={r: 4, dropout: 0.0}"],
    "text_beside_pictures": ["train.freeze=full", "train.global_batch_size=2", "data.order=sequential"],
    "nothing_for_one": ["train.freeze=full", "train.global_batch_size=1", "train.max_steps=4"],
    "adamw": [*ADAMW, "train.weight_decay=0.1"],
    "microbatch_mean": [
        "train.loss_reduction=microbatch_mean", "train.micro_batch_size=1", "train.global_batch_size=3",
    ],
    "asked": ["train.evaluate=[{task: any, every: 2}]", "train.save_every=null"],
}  # fmt: skip
FIRST = list(KINDS)[:6]
ZERO = {
    "zero1": ["run.deepspeed.zero=1"],
    "zero2": ["run.deepspeed.config=zero2.json"],
    "zero2 offload": ["run.deepspeed={zero: 2, offload_optimizer: true}"],
    "zero3": ["run.deepspeed.config=zero3.json"],
    "zero3 small": ["run.deepspeed.config=small.json"],
    "zero3 offload": ["run.deepspeed={zero: 3, offload_optimizer: true, offload_parameters: true}"],
    "zero3 offload.json": ["run.deepspeed.config=zero3_offload.json"],
}
TOGETHER = [
    [*[("zero2", kind) for kind in FIRST], ("zero1", "full"), ("zero1", "lora")],
    [*[("zero3", kind) for kind in FIRST], ("zero3", "microbatch_mean"), ("zero3", "asked")],
    [
        *[("zero3 offload", kind) for kind in FIRST[:4]], ("zero3 offload.json", "adamw"),
        ("zero3 small", "text_beside_pictures"), ("zero2 offload", "text_beside_pictures"), ("zero2 offload", "adamw"),
    ],
]  # fmt: skip
THERE, LAST = "checkpoints/step-000002", "checkpoints/step-000003"


def job(path, zero, *more, out, **how):
    return Job(path, [*EVERY, "run.engine=deepspeed", *ZERO[zero], *more, f"out={out}"], **how)


@pytest.fixture(scope="module")
def workshop(workshop):
    for file in ORIGINALS.glob("*.json"):
        shutil.copy(file, workshop)
    small = json.loads((ORIGINALS / "zero3.json").read_text())
    # Several buckets, several groups of the optimiser's, no weight that stays whole, and DeepSpeed's own checks.
    small["zero_optimization"] |= {
        "reduce_bucket_size": 20_000, "sub_group_size": 30_000, "stage3_param_persistence_threshold": 0,
        "stage3_max_live_parameters": 10_000, "stage3_max_reuse_distance": 10_000, "enable_sanity_checks": True,
    }  # fmt: skip
    (workshop / "small.json").write_text(json.dumps(small))
    return workshop


@pytest.fixture(scope="module")
def path(workshop):
    return str(workshop / "recipe.yaml")


@pytest.fixture(scope="module")
def alone(path):
    """The runs of one process, each made once."""
    made = {}

    def run(kind):
        if kind not in made:
            evaluate = Watcher(Job("", ask=True)) if kind == "asked" else None
            made[kind] = train_alone(path, *EVERY, *KINDS[kind], out=f"one-{kind}", evaluate=evaluate)
        return made[kind]

    return run


@pytest.mark.parametrize("runs", TOGETHER, ids=["zero2", "zero3", "offloaded"])
def test_two_processes_learn_what_one_does(workshop, path, alone, runs):
    jobs = [job(path, zero, *KINDS[kind], out=f"{zero}-{kind}", ask=kind == "asked") for zero, kind in runs]
    said = run_together(jobs, workshop)
    for (zero, kind), (first, second) in zip(runs, said, strict=True):
        assert first == second
        assert first.get("stopped_by", "failed") is None, (zero, kind, first)
        folder = workshop / f"{zero}-{kind}"
        manifest = json.loads((folder / "run.json").read_text())
        assert (manifest["engine"], manifest["processes"]) == ("deepspeed", 2)
        assert_learned_the_same(alone(kind), folder)
        if kind == "asked":
            assert_answered_the_same(alone(kind), folder)
        else:
            assert_has_its_part_only(json.loads((folder / "engine.json").read_text()), zero)


def test_a_moving_average_is_kept_of_what_each_process_steps(workshop, path):
    """With each way of splitting, and from and to a run whose weights are whole."""
    own, on = [*KINDS["freeze_vision"], "train.average_decay=0.9", "train.export=average"], "averaged zero3 small"
    jobs = [
        job(path, zero, *own, out=f"averaged {zero}") for zero in ("zero1", "zero2", "zero3 small", "zero3 offload")
    ]
    jobs.append(Job(path, [*EVERY, *own, "run.engine=ddp", "out=averaged ddp"], resume=f"{on}/{THERE}"))
    jobs.append(job(path, "zero2", *own, out="averaged again", resume=f"averaged ddp/{LAST}"))
    said = run_together(jobs, workshop)
    assert all(one["step"] == 3 for both in said for one in both), said
    alone = train_alone(path, *EVERY, *own, out="averaged")
    plain = train_alone(path, *EVERY, *KINDS["freeze_vision"], out="not averaged")
    with pytest.raises(AssertionError):
        assert_learned_the_same(alone, plain)
    for zero in ("zero1", "zero2", "zero3 small", "zero3 offload"):
        assert_learned_the_same(alone, workshop / f"averaged {zero}")
    assert_learned_the_same(alone, workshop / "averaged ddp", after=2)
    a, b = (load_file(one / "model/model.safetensors") for one in (alone, workshop / "averaged again"))
    assert all(torch.allclose(tensor, b[name], rtol=1e-5, atol=1e-6) for name, tensor in a.items())


def assert_has_its_part_only(engine, zero):
    """Of the optimiser's weights always; of the model's, frozen ones included, with ZeRO-3."""
    stage = int(zero[4])
    optimizer = "DeepSpeedZeroOptimizer_Stage3" if stage == 3 else "DeepSpeedZeroOptimizer"
    assert (engine["engine"], engine["stage"], engine["optimizer"]) == ("DeepSpeedEngine", stage, optimizer)
    assert engine["split gradients"] == (stage > 1)
    assert engine["offloaded"] == ("offload" in zero)
    assert engine["stepped here"] * 2 == pytest.approx(engine["trained"], rel=0.02)
    processes = 2 if stage == 3 else 1
    assert engine["trained here"] * processes == pytest.approx(engine["trained"], rel=0.02)
    assert engine["frozen here"] * processes == pytest.approx(engine["frozen"], rel=0.02)
    if zero == "zero3 small":
        assert engine["groups"] > 4


def assert_answered_the_same(one, two):
    """The whole model was there when the first process asked it."""
    rows, others = (read_metrics(folder / "metrics.jsonl") for folder in (one, two))
    answers, found = ([row["evaluation"] for row in some if "evaluation" in row] for some in (rows, others))
    assert len(answers) == 2
    for answer, other in zip(answers, found, strict=True):
        assert other["said"] == answer["said"]
        assert other["logits"] == pytest.approx(answer["logits"], rel=1e-5)


def test_a_run_goes_on_with_another_engine(workshop, path, alone):
    adamw = KINDS["adamw"]
    jobs = {
        "ddp": Job(path, [*EVERY, *adamw, "out=ddp"]),
        "fsdp": Job(path, [*EVERY, *adamw, "run.engine=fsdp", "out=fsdp"]),
        "zero3": job(path, "zero3 small", *adamw, out="zero3"),
        "zero3 from ddp": job(path, "zero3", *adamw, out="zero3-from-ddp", resume=f"ddp/{THERE}"),
        "zero3 from fsdp": job(path, "zero3 offload", *adamw, out="zero3-from-fsdp", resume=f"fsdp/{THERE}"),
        "ddp from zero3": Job(path, [*EVERY, *adamw, "out=ddp-from-zero3"], resume=f"zero3/{THERE}"),
        "zero2 from zero3": job(path, "zero2 offload", *adamw, out="zero2-from-zero3", resume=f"zero3/{THERE}"),
    }
    said = dict(zip(jobs, run_together(list(jobs.values()), workshop), strict=True))
    for name, results in said.items():
        assert [one.get("step") for one in results] == [3, 3], (name, results)
        assert_learned_the_same(alone("adamw"), workshop / name.replace(" ", "-"), after=2 if "from" in name else 0)
    back = train_alone(path, *EVERY, *adamw, resume=str(workshop / "zero3" / THERE), out="one-from-zero3")
    assert_learned_the_same(alone("adamw"), back, after=2)


def test_runs_go_on_bit_for_bit_and_bf16_learns_fp32_weights(workshop, path):
    dropout = ["train.lora={r: 4, dropout: 0.3}", *ADAMW]
    bf16 = [*KINDS["adamw"], "run.precision=bf16"]
    runs = {"dropout": ("zero3", dropout), **{f"bf16-{zero}": (zero, bf16) for zero in ("zero1", "zero2", "zero3")}}
    jobs = [Job(path, [*EVERY, *bf16, "out=bf16-ddp"])]
    for name, (zero, more) in runs.items():
        jobs.append(job(path, zero, *more, out=name))
        jobs.append(job(path, zero, *more, out=f"{name}-on", resume=f"{name}/{THERE}"))
    for results in run_together(jobs, workshop):
        assert [one.get("step") for one in results] == [3, 3], results
    for name in runs:
        whole, rest = (read_metrics(workshop / one / "metrics.jsonl") for one in (name, f"{name}-on"))
        assert [(r["loss"], r["grad_norm"]) for r in whole[2:]] == [(r["loss"], r["grad_norm"]) for r in rest], name
        for file in (workshop / name / "model").glob("*.safetensors"):
            a, b = (load_file(workshop / folder / "model" / file.name) for folder in (name, f"{name}-on"))
            assert all((a[key] == b[key]).all() for key in a), name
    for name in list(runs)[1:]:
        rows, others = (read_metrics(workshop / one / "metrics.jsonl") for one in ("bf16-ddp", name))
        for row, other in zip(rows, others, strict=True):
            assert other["loss"] == pytest.approx(row["loss"], rel=1e-3)
            assert other["grad_norm"] == pytest.approx(row["grad_norm"], rel=1e-2)
        saved = [load_file(file) for file in (workshop / name / THERE / "weights").iterdir()]
        finer = [(t != t.bfloat16().float()).any().item() for tensors in saved for t in tensors.values()]
        assert sum(finer) > len(finer) / 2, name  # finer than bf16 holds


def test_what_is_not_finite_changes_no_weight(workshop, path):
    bad = ["train.learning_rate=1e30", "train.non_finite=bisect"]
    jobs = [job(path, zero, *bad, out=f"broken-{zero}") for zero in ("zero2", "zero3 offload")]
    for first, second in run_together(jobs, workshop):
        assert first == second
        assert "no weight was changed" in first["message"]
        assert "each of its 4 samples gives it by itself" in first["message"]


def test_one_process_may_use_it_too(workshop, path, alone):
    (said,) = run_together([job(path, "zero3 offload", *KINDS["full"], out="single")], workshop, processes=1)
    assert said == [{"step": 3, "stopped_by": None}]
    assert_learned_the_same(alone("full"), workshop / "single")


def test_an_error_in_a_layer_of_one_ends_both(workshop, path):
    """The other one waits for its weights at the time, in the same layer."""
    failing = job(path, "zero3", "train.epochs=20", out="failed", after=2, fail="a layer broke")
    # In torchrun's place, which would end the other process before it had said why it ends.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    first, second = (start_alone(failing, workshop, rank, 2, store.port, meet_elsewhere=True) for rank in range(2))
    try:
        _, said = first.communicate(timeout=300)
        _, also = second.communicate(timeout=60)
    finally:
        for process in (first, second):
            process.kill()
            process.wait()
    assert first.returncode == 1
    assert "RuntimeError: a layer broke" in said
    assert second.returncode == 0, also
    (other,) = json.loads((workshop / "jobs.json.1").read_text())
    assert other["error"] == "EndedElsewhere"
    assert other["message"] == "process 1 of 2 ends, because process 0 did: RuntimeError: a layer broke"
