"""Checkpoints are written while training goes on, kept by count and by validation loss, and survive a full disk."""

import json
import os
import resource
import subprocess
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.support.processes import Job, run_together
from tests.support.runs import assert_learned_the_same

from lapilli.base.errors import RecipeError, RunError
from lapilli.recipe.load import load_recipe
from lapilli.recipe.schema import Train
from lapilli.train import checkpoints as room
from lapilli.train.checkpoints import Checkpoints, prune
from lapilli.train.device.cpu import Cpu
from lapilli.train.loss import LossModule
from lapilli.train.metrics import read_metrics
from lapilli.train.parallel.single import Single
from lapilli.train.run import train_stage
from lapilli.train.state import State, checkpoint_folder, complete_checkpoints, read_state
from lapilli.train.tensors import Saved


def train(path, *overrides, resume="auto", said=None):
    (stage,) = load_recipe(path, list(overrides)).recipe.stages
    said = [] if said is None else said
    with open(os.devnull, "w") as stream:
        train_stage(stage, {}, resume=resume, say=said.append, stream=stream)
    return Path(str(stage.out)), "\n".join(said)


@pytest.fixture
def engine(tiny_model, image_spec):
    return Single(LossModule(tiny_model(), image_spec))


def kept(place):
    return [read_state(folder).step for folder in complete_checkpoints(place)]


def tensors(folder, kind):
    return {name: tensor for file in (folder / kind).iterdir() for name, tensor in load_file(file).items()}


def test_a_save_holds_the_moment_and_the_next_one_waits_for_it(engine, tmp_path, monkeypatch):
    """The weights change while the thread is held up; a checkpoint of the moment when it was asked for comes out."""
    held, write = threading.Event(), room.write

    def slowly(*given):
        assert held.wait(30)
        write(*given)

    monkeypatch.setattr(room, "write", slowly)
    optimizer = engine.optimizer(Train())
    name, parameter = next(engine.trained())
    before = parameter.detach().clone()
    with Checkpoints(tmp_path, engine, optimizer, Cpu(), keep=2) as checkpoints:
        checkpoints.save(State(1, {}))
        with torch.no_grad():
            parameter.fill_(7)
        checkpoints.check()
        assert kept(tmp_path) == []
        threading.Timer(0.2, held.set).start()
        assert checkpoints.save(State(2, {})) > 0.15
        assert kept(tmp_path)[0] == 1
        checkpoints.wait()
        assert checkpoints.saved == 2
    assert torch.equal(Saved(checkpoint_folder(tmp_path, 1)).whole("weights", name), before)
    assert torch.equal(Saved(checkpoint_folder(tmp_path, 2)).whole("weights", name), torch.full_like(before, 7))


def test_a_save_in_the_foreground_is_done_when_it_returns(engine, tmp_path):
    with Checkpoints(tmp_path, engine, engine.optimizer(Train()), Cpu(), background=False) as checkpoints:
        checkpoints.save(State(1, {}))
        assert kept(tmp_path) == [1]


def test_the_newest_and_the_best_are_kept(engine, tmp_path):
    losses = {1: 3.0, 2: 1.0, 3: None, 4: 1.5, 5: float("nan"), 6: 2.0, 7: None}
    with Checkpoints(tmp_path, engine, engine.optimizer(Train()), Cpu(), keep=1, keep_best=2) as checkpoints:
        for step, loss in losses.items():
            checkpoints.save(State(step, {}, validation_loss=loss))
        assert [checkpoints.would_keep(loss) for loss in (1.2, 1.5, 4.0, float("nan"))] == [True, False, False, False]
    assert kept(tmp_path) == [2, 4, 7]
    assert json.loads((tmp_path / "best.json").read_text()) == {
        "folder": "step-000002", "step": 2, "validation_loss": 1.0,
    }  # fmt: skip
    prune(tmp_path, keep=1)
    assert kept(tmp_path) == [7]


def test_numbers_of_an_optimiser_come_back_as_numbers(engine, tmp_path):
    """As bitsandbytes keeps them: a count as an int, and states of other shapes than the weight's."""
    optimizer = engine.optimizer(Train())
    _, parameter = next(engine.trained())
    given = {"step": 3, "rate": 0.1, "state1": torch.arange(6, dtype=torch.uint8), "absmax": torch.rand(2)}
    optimizer.state[parameter] = dict(given)
    with Checkpoints(tmp_path, engine, optimizer, Cpu()) as checkpoints:
        checkpoints.save(State(1, {}))
    other = engine.optimizer(Train())
    engine.load_state(Saved(checkpoint_folder(tmp_path, 1)), other)
    found = other.state[parameter]
    assert (found["step"], found["rate"]) == (3, 0.1)
    assert type(found["step"]) is int
    assert all(torch.equal(found[key], given[key]) for key in ("state1", "absmax"))


@contextmanager
def small_disk(place, size_bytes):
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size_bytes}", "tmpfs", str(place)]
    if os.geteuid() or subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def bytes_of(folder):
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def test_a_full_disk_names_the_checkpoint_and_leaves_the_last_one(engine, tmp_path):
    optimizer = engine.optimizer(Train())
    with Checkpoints(tmp_path / "measured", engine, optimizer, Cpu()) as checkpoints:
        checkpoints.save(State(1, {}))
    place = tmp_path / "full"
    with (
        small_disk(place, int(1.5 * bytes_of(tmp_path / "measured"))),
        Checkpoints(place, engine, optimizer, Cpu(), keep=9) as checkpoints,
    ):
        checkpoints.save(State(1, {}))
        checkpoints.wait()
        checkpoints.save(State(2, {}))
        with pytest.raises(RunError, match=r"step-000002: the checkpoint can't be written: .*No space left"):
            checkpoints.wait()
        assert [p.name for p in place.iterdir()] == ["step-000001"]
        engine.load_state(Saved(place / "step-000001"), optimizer)


def check_for_a_while(checkpoints):
    for _ in range(1000):
        checkpoints.check()
        time.sleep(0.01)


def test_a_file_that_may_not_grow_is_told_at_the_next_step(engine, tmp_path):
    optimizer = engine.optimizer(Train())
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Checkpoints(tmp_path, engine, optimizer, Cpu()) as checkpoints:
        checkpoints.save(State(1, {}))
        checkpoints.wait()
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, before[1]))
        try:
            checkpoints.save(State(2, {}))
            with pytest.raises(RunError, match=r"step-000002: the checkpoint can't be written: .*too large"):
                check_for_a_while(checkpoints)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert [p.name for p in tmp_path.iterdir()] == ["step-000001"]
        checkpoints.save(State(2, {}))
    assert kept(tmp_path) == [2]


KEEP = [
    "train.save_every=1", "train.keep_checkpoints=9", "train.keep_best=1", "train.validate_every=1",
    "data.validation=held-out.json", "train.average_decay=0.2", "train.epochs=2",
]  # fmt: skip


def test_the_average_is_exported_and_goes_on_bit_for_bit(recipe_file, base):
    path = recipe_file()
    folder, said = train(path, *KEEP, "train.export=average", "out=averaged", "train.freeze=projector")
    assert "model/ holds the moving average of the weights (decay 0.2)" in said
    steps = complete_checkpoints(folder / "checkpoints")
    weights = [tensors(one, "weights") for one in steps]
    exported = load_file(folder / "model/model.safetensors")
    begun = load_file(base / "model.safetensors")
    compared = 0
    for name in weights[0]:
        start = exported_name(name, begun)
        average = begun[start].double()
        for step, one in enumerate(weights, start=1):
            decay = min(0.2, (1 + step) / (10 + step))
            average = decay * average + (1 - decay) * one[name].double()
        torch.testing.assert_close(exported[start].double(), average, rtol=1e-6, atol=1e-8)
        assert not torch.equal(exported[start], weights[-1][name])
        compared += 1
    assert compared == 4
    again, _ = train(
        path, *KEEP, "train.export=average", "out=again", "train.freeze=projector", resume=str(steps[2]),
    )  # fmt: skip
    last = [tensors(one / "checkpoints" / steps[-1].name, "average") for one in (folder, again)]
    assert all(torch.equal(tensor, last[1][name]) for name, tensor in last[0].items())


def exported_name(name, there):
    (found,) = [one for one in there if one.endswith(f"projector.{name.removeprefix('projector.')}")]
    return found


def test_the_best_is_exported(recipe_file):
    path = recipe_file()
    given = [*KEEP, "train.keep_checkpoints=1", "train.learning_rate=0.1", "train.schedule=constant"]
    folder, said = train(path, *given, "train.export=best", "out=best")
    losses = {row["step"]: row["validation_loss"] for row in read_metrics(folder / "metrics.jsonl")}
    step = min(losses, key=losses.__getitem__)
    assert step != max(losses), "the last one is the best, which proves nothing"
    assert kept(folder / "checkpoints") == [step, max(losses)]
    assert f"model/ holds the weights of step {step}" in said
    exported = load_file(folder / "model/model.safetensors")
    saved = tensors(checkpoint_folder(folder / "checkpoints", step), "weights")
    for name in [one for one in saved if one.startswith("projector.")]:
        assert torch.equal(exported[exported_name(name, exported)], saved[name])


@pytest.mark.slow
def test_split_and_whole_weights_have_one_average_and_one_best(recipe_file, tmp_path):
    """Two processes, whose weights are whole or split, one going on from the other's checkpoint."""
    path = recipe_file()
    given = [
        *KEEP,
        "train.learning_rate=0.01",
        "train.schedule=constant",
        "train.warmup_ratio=0",
        "train.optimizer=sgd",
    ]
    jobs = []
    for engine in ("ddp", "fsdp"):
        own = [*given, f"run.engine={engine}"]
        jobs.append(Job(path, [*own, "train.export=average", f"out={engine}"]))
        jobs.append(Job(path, [*own, "train.export=best", f"out={engine}-best"]))
    for engine, origin in (("ddp", "fsdp"), ("fsdp", "ddp")):
        own = [*given, f"run.engine={engine}", "train.export=average"]
        jobs.append(Job(path, [*own, f"out={engine}-on"], resume=f"{origin}/checkpoints/step-000003"))
    said = run_together(jobs, tmp_path)
    assert all(one[0]["step"] == 8 for one in said), said
    average, _ = train(path, *given, "train.export=average", "out=alone")
    best, _ = train(path, *given, "train.export=best", "out=alone-best")
    for engine in ("ddp", "fsdp"):
        assert_learned_the_same(average, tmp_path / engine)
        assert_learned_the_same(best, tmp_path / f"{engine}-best")
        assert_learned_the_same(average, tmp_path / f"{engine}-on", after=3)


@pytest.mark.slow
def test_a_run_whose_disk_was_full_goes_on_when_there_is_room(recipe_file, tmp_path):
    path, given = recipe_file(), ["train.save_every=1", "train.keep_checkpoints=9"]
    whole, _ = train(path, *given, "out=whole")
    size, before = bytes_of(whole / "checkpoints/step-000001"), []
    with small_disk(tmp_path / "small", int(2.5 * size)):
        with pytest.raises(RunError, match=r"step-00000\d: the checkpoint can't be written: .*No space left"):
            train(path, *given, "out=small/run", said=before)
        assert not any("which is saved" in line for line in before)
        done = kept(tmp_path / "small/run/checkpoints")
        assert done
        assert done == list(range(1, len(done) + 1))
        subprocess.run(["mount", "-o", "remount,size=100m", str(tmp_path / "small")], check=True)
        folder, said = train(path, *given, "out=small/run")
        assert f"going on after step {done[-1]} " in said
        steps = [[(row["step"], row["loss"]) for row in read_metrics(one / "metrics.jsonl")] for one in (whole, folder)]
        assert steps[0] == steps[1]
        models = [load_file(one / "model/model.safetensors") for one in (whole, folder)]
        assert all(torch.equal(tensor, models[1][name]) for name, tensor in models[0].items())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["train.export=best"], "export: best needs keep_best"),
        (["train.export=average"], "export: average needs average_decay"),
        (["train.keep_best=1"], "train.keep_best needs data.validation"),
    ],
)
def test_keys_that_need_others_say_so(recipe_file, wrong, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe(recipe_file(), wrong)
