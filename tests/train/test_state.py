"""A checkpoint is whole or absent, holds no pickle, and brings a run back bit for bit."""

import copy
import json
import pickle
from contextlib import nullcontext

import pytest
import torch

from lapilli.base import atomic
from lapilli.base.errors import RunError
from lapilli.recipe.schema import Train
from lapilli.train import state, tensors
from lapilli.train.checkpoints import Checkpoints, prune
from lapilli.train.device.cpu import Cpu
from lapilli.train.loss import LossModule
from lapilli.train.optimizer import build_optimizer, parameter_groups
from lapilli.train.parallel.single import Single
from lapilli.train.step import train_step


def start(model, image_spec, train):
    engine = Single(LossModule(model, image_spec))
    return engine, build_optimizer(parameter_groups(engine.trained(), train), train)


def save(place, engine, optimizer, *states):
    with Checkpoints(place, engine, optimizer, Cpu(), keep=9) as checkpoints:
        for one in states:
            checkpoints.save(one)
        checkpoints.wait()
    return state.checkpoint_folder(place, states[-1].step)


def load(folder, engine, optimizer):
    read = state.read_state(folder)
    engine.load_state(tensors.Saved(folder), optimizer)
    state.set_random(folder, 0, Cpu())
    return read


@pytest.mark.parametrize("train", [Train(learning_rate=1e-2), Train(optimizer="sgd", momentum=0.9, learning_rate=0.1)])
def test_going_on_from_a_checkpoint_equals_never_stopping(
    tiny_model, tiny_step, split, image_spec, tmp_path, monkeypatch, train
):
    monkeypatch.setattr(tensors, "FILE_BYTES", 20_000)  # several files
    steps = [split(*tiny_step(4, seed), 2) for seed in range(4)]
    engine, optimizer = start(tiny_model(), image_spec, train)
    for batches in steps[:2]:
        train_step(engine, optimizer, batches, train, Cpu.device, autocast=nullcontext())
    folder = save(tmp_path, engine, optimizer, state.State(2, {"a": 1}))
    drawn = torch.rand(3)
    assert len(list(folder.glob("weights/*.safetensors"))) > 1
    assert {p.suffix for p in folder.rglob("*") if p.is_file()} <= {".safetensors", ".json", ""}

    other, other_optimizer = start(tiny_model(seed=5), image_spec, train)
    assert load(folder, other, other_optimizer) == state.State(2, {"a": 1})
    assert torch.equal(torch.rand(3), drawn)
    with torch.no_grad():  # frozen and trained alike come from the run's own model, trained ones from the checkpoint
        for (name, p), (_, q) in zip(engine.trained(), other.trained(), strict=True):
            assert torch.equal(p, q), name
    for batches in steps[2:]:
        one = train_step(engine, optimizer, batches, train, Cpu.device, autocast=nullcontext())
        two = train_step(other, other_optimizer, batches, train, Cpu.device, autocast=nullcontext())
        assert one == two
    for (name, p), (_, q) in zip(engine.trained(), other.trained(), strict=True):
        assert torch.equal(p, q), name


def test_a_folder_without_its_marker_is_never_loaded(tiny_model, image_spec, tmp_path):
    save(tmp_path, *start(tiny_model(), image_spec, Train()), *(state.State(step, {}) for step in (1, 2, 10)))
    (state.checkpoint_folder(tmp_path, 10) / atomic.MARKER).unlink()
    assert [p.name for p in state.complete_checkpoints(tmp_path)] == ["step-000001", "step-000002"]
    with pytest.raises(RunError, match="not a complete checkpoint"):
        state.read_state(state.checkpoint_folder(tmp_path, 10))
    prune(tmp_path, keep=1)
    assert [p.name for p in state.complete_checkpoints(tmp_path)] == ["step-000002"]


def test_a_checkpoint_of_another_model_is_refused(tiny_model, image_spec, tmp_path):
    engine, optimizer = start(tiny_model(), image_spec, Train())
    folder = save(tmp_path, engine, optimizer, state.State(1, {}))
    frozen = copy.deepcopy(engine.module.model)
    frozen.vision_encoder.requires_grad_(False)
    with pytest.raises(RunError, match=r"vision_encoder.* does not fit this run's model"):
        load(folder, *start(frozen, image_spec, Train()))
    wider = copy.deepcopy(engine.module.model)
    wider.projector[0].bias = torch.nn.Parameter(torch.zeros(99))
    with pytest.raises(RunError, match=r"projector.0.bias \(\d+,\) in weights does not fit .* \(99,\)"):
        load(folder, *start(wider, image_spec, Train()))


class Opened:
    """A pickle that tells when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_a_planted_pickle_is_never_opened(tiny_model, image_spec, tmp_path):
    train = Train(optimizer="sgd", momentum=0.9)
    engine, optimizer = start(tiny_model(), image_spec, train)
    folder = save(tmp_path, engine, optimizer, state.State(1, {}))
    evil = pickle.dumps(Opened(tmp_path / "opened"))
    for place in (folder, folder / "weights"):
        for name in (".metadata", "__0_.metadata", "__0_0.distcp", "optimizer.pt", "weights-00001.bin"):
            (place / name).write_bytes(evil)
    load(folder, *start(tiny_model(seed=1), image_spec, train))
    prune(tmp_path, keep=1, keep_best=1)
    assert not (tmp_path / "opened").exists()
    pickle.loads(evil)
    assert (tmp_path / "opened").exists(), "the pickle would not have told"


def test_a_damaged_or_older_checkpoint_is_named(tiny_model, image_spec, tmp_path):
    folder = save(tmp_path, *start(tiny_model(), image_spec, Train()), state.State(1, {}))
    file = next(folder.glob("weights/*.safetensors"))
    whole = file.read_bytes()
    file.write_bytes(whole[:-10])
    with pytest.raises(RunError, match=f"{file.name}: missing or cut short"):
        state.read_state(folder)
    file.write_bytes(b"\xff" * len(whole))
    with pytest.raises(RunError, match=r"step-000001/weights: can't be read"):
        load(folder, *start(tiny_model(), image_spec, Train()))
    file.write_bytes(whole)
    content = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps(content | {"format": 1}))
    with pytest.raises(RunError, match=r"format 1, and this version reads format 2; go on with the version that wrote"):
        state.read_state(folder)


def test_random_states_of_more_processes_than_before_are_new(tiny_model, image_spec, tmp_path):
    folder = save(tmp_path, *start(tiny_model(), image_spec, Train()), state.State(1, {}))
    drawn = []
    for rank in (0, 1, 2, 2):
        state.set_random(folder, rank, Cpu())
        drawn.append(float(torch.rand(())))
    assert len(set(drawn)) == 3
    assert drawn[2] == drawn[3]
