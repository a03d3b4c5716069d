"""A checkpoint is whole or absent, holds no pickle, and brings a run back bit for bit."""

import copy
from contextlib import nullcontext

import pytest
import torch

from lapilli.base import atomic
from lapilli.base.errors import RunError
from lapilli.recipe.schema import Train
from lapilli.train import state, tensors
from lapilli.train.device.cpu import Cpu
from lapilli.train.loss import LossModule
from lapilli.train.optimizer import build_optimizer, parameter_groups
from lapilli.train.parallel.single import Single
from lapilli.train.step import train_step


def start(model, image_spec, train):
    engine = Single(LossModule(model, image_spec))
    return engine, build_optimizer(parameter_groups(engine.trained(), train), train)


@pytest.mark.parametrize("train", [Train(learning_rate=1e-2), Train(optimizer="sgd", momentum=0.9, learning_rate=0.1)])
def test_going_on_from_a_checkpoint_equals_never_stopping(
    tiny_model, tiny_step, split, image_spec, tmp_path, monkeypatch, train
):
    monkeypatch.setattr(tensors, "FILE_BYTES", 20_000)  # several files
    steps = [split(*tiny_step(4, seed), 2) for seed in range(4)]
    engine, optimizer = start(tiny_model(), image_spec, train)
    for batches in steps[:2]:
        train_step(engine, optimizer, batches, train, Cpu.device, autocast=nullcontext())
    folder = state.checkpoint_folder(tmp_path, 2)
    state.save_state(folder, state.State(2, {"a": 1}), engine, optimizer, Cpu())
    drawn = torch.rand(3)
    assert len(list(folder.glob("weights-*.safetensors"))) > 1
    assert {p.suffix for p in folder.iterdir()} <= {".safetensors", ".json", ""}

    other, other_optimizer = start(tiny_model(seed=5), image_spec, train)
    assert state.read_state(folder) == state.State(2, {"a": 1})
    state.load_tensors(folder, other, other_optimizer, Cpu())
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
    engine, optimizer = start(tiny_model(), image_spec, Train())
    for step in (1, 2, 10):
        state.save_state(state.checkpoint_folder(tmp_path, step), state.State(step, {}), engine, optimizer, Cpu())
    (state.checkpoint_folder(tmp_path, 10) / atomic.MARKER).unlink()
    assert [p.name for p in state.complete_checkpoints(tmp_path)] == ["step-000001", "step-000002"]
    with pytest.raises(RunError, match="not a complete checkpoint"):
        state.read_state(state.checkpoint_folder(tmp_path, 10))
    state.prune(tmp_path, keep=1)
    assert [p.name for p in state.complete_checkpoints(tmp_path)] == ["step-000002"]


def test_a_checkpoint_of_another_model_is_refused(tiny_model, image_spec, tmp_path):
    engine, optimizer = start(tiny_model(), image_spec, Train())
    state.save_state(tmp_path / "step-000001", state.State(1, {}), engine, optimizer, Cpu())
    frozen = copy.deepcopy(engine.module.model)
    frozen.vision_encoder.requires_grad_(False)
    with pytest.raises(RunError, match=r"vision_encoder.* does not fit this run's model"):
        state.load_tensors(tmp_path / "step-000001", *start(frozen, image_spec, Train()), Cpu())


def test_a_full_disk_names_the_checkpoint_and_leaves_the_last_one(tiny_model, image_spec, tmp_path, monkeypatch):
    engine, optimizer = start(tiny_model(), image_spec, Train())
    state.save_state(tmp_path / "step-000001", state.State(1, {}), engine, optimizer, Cpu())

    def full(*_args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(state, "write_tensors", full)
    with pytest.raises(RunError, match=r"step-000002: the checkpoint can't be written.*No space left"):
        state.save_state(tmp_path / "step-000002", state.State(2, {}), engine, optimizer, Cpu())
    assert [p.name for p in tmp_path.iterdir()] == ["step-000001"]
