"""Weights split over two processes learn what one process does, and end together whatever happens to one of them."""

import json
import time

import pytest
import torch
from tests.support.parts import make_language, make_vision
from tests.support.processes import Job, Watcher, run_together
from tests.support.runs import assert_learned_the_same, train_alone

from lapilli.assemble.build import BuildOptions, build
from lapilli.base.errors import RunError
from lapilli.recipe.schema import Evaluation, Fsdp, Run, Stage, Train
from lapilli.train.metrics import read_metrics
from lapilli.train.parallel.choose import check_engine
from lapilli.train.parallel.fsdp import check_fsdp, unsplit
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
    "averaged": ["train.average_decay=0.9", "train.export=average"],
    "thin adapters": ["train.lora={r: 1, dropout: 0.0}", "train.optimizer=adamw", "train.learning_rate=1e-3"],
    "tied embeddings": ["train.freeze=full", "model=qwen2"],
    "padded": ["train.freeze=full", "model=mpt"],
    "asked": ["train.evaluate=[{task: any, every: 2}]", "train.save_every=null"],
    "nothing_for_one": ["train.freeze=full", "train.global_batch_size=1", "train.max_steps=4"],
}
SPLIT = {
    "projector, frozen split": [*KINDS["projector"], "run.fsdp.frozen=shard"],
    "lora, frozen split": [*KINDS["lora"], "run.fsdp.frozen=shard"],
    "full, kept gathered": [*KINDS["full"], "run.fsdp.reshard=false"],
    "full, recomputed": [*KINDS["full"], "train.gradient_checkpointing=full"],
    "full, partly recomputed": [*KINDS["full"], "train.gradient_checkpointing=selective"],
    "text_beside_pictures, offloaded": [*KINDS["text_beside_pictures"], "run.fsdp.offload=true"],
}
BF16 = {
    "bf16 full, ddp": ("ddp", KINDS["full"]),
    "bf16 full": ("fsdp", KINDS["full"]),
    "bf16 full, sums in bf16": ("fsdp", [*KINDS["full"], "run.fsdp.reduce=bf16"]),
    "bf16 lora, ddp": ("ddp", KINDS["lora"]),
    "bf16 lora": ("fsdp", KINDS["lora"]),
    "bf16 lora, frozen split": ("fsdp", [*KINDS["lora"], "run.fsdp.frozen=shard"]),
}
GOING_ON = {
    "fsdp from ddp": ("adamw", "fsdp", "ddp"),
    "ddp from fsdp": ("adamw", "ddp", "adamw"),
    "fsdp from one": ("adamw", "fsdp", "one-adamw"),
    "fsdp from fsdp": ("thin adapters", "fsdp", "thin adapters"),
    "average from average": ("averaged", "fsdp", "averaged"),
}
"""Kind of run, engine that goes on, and the run it goes on from."""
LANGUAGE = 3
"""Units: the two layers of the language model, and the rest; where the vision encoder trains, two of its layers too."""
UNITS = {
    "projector": 1, "tied embeddings": 5, "padded": 5, "full": 5, "text_beside_pictures": 5, "nothing_for_one": 5,
    "projector, frozen split": 6, "lora, frozen split": 6,
}  # fmt: skip


def alike(kind):
    """The kind of run, on one process, that a run on two is compared with."""
    return kind.partition(", ")[0]


@pytest.mark.parametrize(
    ("size", "reshard", "message"),
    [(1, True, "and one was started"), (4, 3, "part of 4"), (4, 4, "part of 4"), (4, 1, "part of 4")],
)
def test_what_this_number_of_processes_can_not_have_is_refused(size, reshard, message):
    stage = Stage(run=Run(engine="fsdp", fsdp=Fsdp(reshard=reshard)))
    with pytest.raises(RunError, match=message):
        check_fsdp(stage, World(size=size) if size > 1 else ALONE)


def test_settings_that_exclude_each_other_are_refused_or_said():
    stage = Stage(run=Run(engine="fsdp", fsdp=Fsdp(reshard=2)))
    check_fsdp(stage, World(size=4))
    asked = stage.model_copy(update={"train": Train(evaluate=(Evaluation(task="pope"),))})
    with pytest.raises(RunError, match=r"can't be gathered for train\.evaluate"):
        check_fsdp(asked, World(size=4))
    said = check_engine("ddp", stage, World(size=4), torch.device("cpu"))
    assert said == ("run.fsdp has no effect: run.engine is ddp",)
    assert check_engine("fsdp", stage, World(size=4), torch.device("cpu")) == ()


def test_what_can_not_be_split_is_named(tiny_model):
    model = tiny_model()
    model.projector.scale = torch.nn.Parameter(torch.tensor(1.0))
    with pytest.raises(RunError, match=r"can't split projector\.scale, a single number"):
        unsplit(model, Run())
    model.projector.scale.requires_grad_(False)
    assert unsplit(model, Run(fsdp=Fsdp(frozen="shard"))) == {model.projector.scale}


@pytest.fixture(scope="module")
def workshop(workshop):
    vision = make_vision("clip", workshop / "clip")
    for name in ("qwen2", "mpt"):
        language = make_language(name, workshop / f"{name}-alone")
        build(BuildOptions(str(vision), str(language), dtype="float32"), workshop / name)
    return workshop


@pytest.fixture(scope="module")
def alone(workshop):
    """The runs of one process, each made once."""
    made = {}

    def run(kind):
        if kind not in made:
            more = [*EVERY, *KINDS[kind]]
            evaluate = Watcher(Job("", ask=True)) if kind == "asked" else None
            made[kind] = train_alone(str(workshop / "recipe.yaml"), *more, out=f"one-{kind}", evaluate=evaluate)
        return made[kind]

    return run


@pytest.fixture(scope="module")
def together(workshop, alone):
    """What two processes say of all the jobs below: they are started once."""
    path = str(workshop / "recipe.yaml")
    alone("adamw")
    jobs = {
        kind: Job(path, [*EVERY, FSDP, *more, f"out={kind}"], ask=kind == "asked")
        for kind, more in (KINDS | SPLIT).items()
    }
    jobs["ddp"] = Job(path, [*EVERY, *KINDS["adamw"], "run.engine=ddp", "out=ddp"])
    for name, (kind, engine, origin) in GOING_ON.items():
        more = [*EVERY, *KINDS[kind], f"run.engine={engine}", f"out={name}"]
        jobs[name] = Job(path, more, resume=f"{origin}/checkpoints/step-000002")
    for name, (engine, more) in BF16.items():
        jobs[name] = Job(path, [*EVERY, *more, "run.precision=bf16", f"run.engine={engine}", f"out={name}"])
    jobs["not finite"] = Job(path, [*EVERY, FSDP, "train.learning_rate=1e30", "train.non_finite=bisect", "out=broken"])
    return dict(zip(jobs, run_together(list(jobs.values()), workshop), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*KINDS, *SPLIT])
def test_two_processes_learn_what_one_does(workshop, alone, together, kind):
    assert together[kind][0] == together[kind][1]
    assert together[kind][0]["stopped_by"] is None
    manifest = json.loads((workshop / kind / "run.json").read_text())
    assert (manifest["engine"], manifest["processes"]) == ("fsdp", 2)
    assert_learned_the_same(alone(alike(kind)), workshop / kind)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*KINDS, *SPLIT])
def test_each_process_has_its_rows_only(workshop, together, kind):
    engine = json.loads((workshop / kind / "engine.json").read_text())
    assert engine["kinds"] == ["DTensor"]
    if kind == "thin adapters":  # a matrix of one row is in one process, and nothing of it in the other
        assert engine["trained"] < engine["trained here"] * 2 < engine["trained"] * 1.5
    else:
        assert engine["trained here"] * 2 == pytest.approx(engine["trained"], rel=0.01)
    assert engine["units"] == UNITS.get(kind, UNITS.get(alike(kind), LANGUAGE))
    frozen = sum(json.loads((workshop / alike(kind) / "engine.json").read_text())[k] for k in ("frozen here",))
    if "frozen split" in kind:
        assert engine["frozen here"] * 2 == pytest.approx(frozen, rel=0.01)
    else:
        assert engine["frozen here"] == frozen


@pytest.mark.slow
def test_compiled_layers_that_are_split_learn_what_plain_ones_do(workshop):
    own = [*EVERY, FSDP, *KINDS["full"], "run.deterministic=false"]
    names = {"plain": "false", "compiled": "true"}
    jobs = [Job(str(workshop / "recipe.yaml"), [*own, f"run.compile={on}", f"out={out}"]) for out, on in names.items()]
    for first, second in run_together(jobs, workshop):
        assert (first["step"], second["step"]) == (3, 3)
    plain, compiled = (json.loads((workshop / name / "engine.json").read_text()) for name in names)
    assert compiled["graphs"] > plain["graphs"] == 0
    assert compiled["units"] == plain["units"] == UNITS["full"]
    assert_learned_the_same(workshop / "plain", workshop / "compiled")


@pytest.mark.slow
def test_the_first_process_asks_the_whole_model(workshop, alone, together):
    rows, others = (read_metrics(folder / "metrics.jsonl") for folder in (alone("asked"), workshop / "asked"))
    answers = [row["evaluation"] for row in rows if "evaluation" in row]
    assert len(answers) == 2
    found = [row["evaluation"] for row in others if "evaluation" in row]
    assert len({answer["logits"] for answer in answers}) == 2
    assert [answer["said"] for answer in found] == [answer["said"] for answer in answers]
    for answer, one in zip(found, answers, strict=True):
        assert answer["logits"] == pytest.approx(one["logits"], rel=1e-5)


@pytest.mark.slow
def test_a_run_goes_on_with_another_engine(workshop, alone, together):
    for name, (kind, _, _) in GOING_ON.items():
        assert together[name][0]["step"] == 3, together[name]
        assert_learned_the_same(alone(kind), workshop / name, after=2)
    path, checkpoint = str(workshop / "recipe.yaml"), str(workshop / "adamw/checkpoints/step-000002")
    back = train_alone(path, *EVERY, *KINDS["adamw"], resume=checkpoint, out="one-from-fsdp")
    assert_learned_the_same(alone("adamw"), back, after=2)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in BF16 if "ddp" not in name])
def test_bf16_is_computed_and_fp32_kept(workshop, together, name):
    assert together[name][0]["step"] == 3, together[name]
    engine = json.loads((workshop / name / "engine.json").read_text())
    assert engine["dtypes"] == ["torch.float32"]
    like = f"bf16 {alike(name).split()[1]}, ddp"
    rows, others = (read_metrics(workshop / folder / "metrics.jsonl") for folder in (like, name))
    for row, other in zip(rows, others, strict=True):
        assert other["loss"] == pytest.approx(row["loss"], rel=5e-3)
        assert other["grad_norm"] == pytest.approx(row["grad_norm"], rel=5e-2)


@pytest.mark.slow
def test_what_is_not_finite_ends_both_with_the_samples(together):
    first, second = together["not finite"]
    assert first == second
    assert "no weight was changed" in first["message"]


@pytest.mark.slow
def test_four_processes_keep_weights_in_pairs(workshop, alone, together):
    path = str(workshop / "recipe.yaml")
    pairs = Job(path, [*EVERY, FSDP, *KINDS["full"], "run.fsdp.reshard=2", "out=pairs"])
    more = [*EVERY, FSDP, *KINDS["adamw"], "out=four"]
    four = Job(path, more, resume="adamw/checkpoints/step-000002")
    said = run_together([pairs, four], workshop, processes=4)
    assert [[one.get("step") for one in job] for job in said] == [[3] * 4] * 2, said
    assert_learned_the_same(alone("full"), workshop / "pairs")
    assert_learned_the_same(alone("adamw"), workshop / "four", after=2)


@pytest.mark.slow
def test_an_error_in_a_layer_of_one_ends_both(workshop, together):
    """The other one waits for its weights at the time, in the same layer."""
    job = Job(
        str(workshop / "recipe.yaml"), [*EVERY, FSDP, "train.epochs=20", "out=failed"], after=2, fail="a layer broke"
    )
    with pytest.raises(AssertionError, match="RuntimeError: a layer broke"):
        run_together([job], workshop)
    assert time.time() - (workshop / "failed/metrics.jsonl").stat().st_mtime < 60
    (other,) = json.loads((workshop / "jobs.json.1").read_text())
    assert other["error"] == "EndedElsewhere"
    assert other["message"] == "process 1 of 2 ends, because process 0 did: RuntimeError: a layer broke"
    saved = sorted(p.name for p in (workshop / "failed/checkpoints").iterdir())
    assert "step-000002" in saved
