"""Optimisers that hold less: how close they are to AdamW, what they hold, and that they go on bit for bit."""

import importlib.util

import pytest
import torch

from lapilli.base.errors import RunError
from lapilli.recipe.schema import Train
from lapilli.train import adamw_bf16
from lapilli.train.adamw_bf16 import AdamWBf16
from lapilli.train.optimizer import (
    build_optimizer,
    check_optimizer,
    parameter_groups,
    set_learning_rate,
    state_bytes_per_parameter,
)
from lapilli.train.parallel.single import Single

CPU = torch.device("cpu")
NAMES = ("adamw", "adamw_bf16", "adamw_8bit", "sgd")
needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="the extra `quantise` is not installed"
)


def learn(name, steps=60, size=(96, 64), **train):
    """Fit a matrix to a noisy linear map; return the matrix, the losses and the optimiser."""
    torch.manual_seed(0)
    truth, inputs = torch.randn(size), torch.randn(256, size[1])
    targets = inputs @ truth.T + 0.1 * torch.randn(256, size[0])
    weight = torch.nn.Parameter(torch.zeros(size))
    made = Train(optimizer=name, learning_rate=0.02, weight_decay=0.01, **train)
    optimizer = build_optimizer(parameter_groups([("language_model.weight", weight)], made), made)
    losses = []
    for step in range(steps):
        set_learning_rate(optimizer, 1 - step / steps)
        picked = torch.arange(step * 32, step * 32 + 32) % 256
        loss = (inputs[picked] @ weight.T - targets[picked]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return weight.detach(), losses, optimizer


@pytest.mark.parametrize(
    ("name", "near"), [("adamw_bf16", 0.01), pytest.param("adamw_8bit", 0.03, marks=needs_bitsandbytes)]
)
def test_they_learn_what_adamw_learns(name, near):
    exact, losses, _ = learn("adamw")
    weight, others, optimizer = learn(name)
    assert losses[-1] < 0.6 * losses[0]
    assert (weight - exact).norm() < near * exact.norm()
    assert others[-1] == pytest.approx(losses[-1], rel=near)
    assert "peak" in optimizer.param_groups[0]


@needs_bitsandbytes
@pytest.mark.parametrize("name", NAMES)
def test_what_the_state_takes_is_what_is_said(name):
    weight, _, optimizer = learn(name, 1, (1024, 256), momentum=0.9)
    (state,) = optimizer.state.values()
    # Tables of what the 8 bits mean are shared by all parameters.
    held = [t for key, t in state.items() if isinstance(t, torch.Tensor) and not key.startswith("qmap")]
    taken = sum(t.numel() * t.element_size() for t in held) / weight.numel()
    said = state_bytes_per_parameter(Train(optimizer=name, momentum=0.9))
    assert taken == pytest.approx(said, rel=1e-3)
    assert state_bytes_per_parameter(Train(optimizer="sgd")) == 0


def test_averages_in_bf16_do_not_stand_still():
    """After large gradients come small ones: rounded to the nearest, the average of squares would stay where it was."""
    weight = torch.nn.Parameter(torch.zeros(4096))
    optimizer = AdamWBf16([weight], lr=0.0)
    weight.grad = torch.ones(4096)
    optimizer.step()
    weight.grad = torch.zeros(4096)
    for _ in range(1000):
        optimizer.step()
    average = optimizer.state[weight]["exp_avg_sq"]
    assert average.dtype == torch.bfloat16
    assert float(average.float().mean()) == pytest.approx(0.001 * 0.999**1000, rel=0.01)
    assert torch.tensor(1.0).bfloat16() * 0.999 == 1  # what would have happened


def test_rounding_by_chance_is_right_in_the_mean_and_keeps_what_is_exact():
    chance = torch.Generator().manual_seed(0)
    exact = torch.tensor([1.0, -3.5, 0.0, 2.0**-100])
    assert torch.equal(adamw_bf16._rounded(exact, chance), exact)
    between = torch.full((200_000,), -1.001)
    rounded = adamw_bf16._rounded(between, chance)
    assert set(rounded.tolist()) == {-1.0, -1.0078125}
    assert torch.equal(rounded.bfloat16().float(), rounded)
    assert float(rounded.mean()) == pytest.approx(-1.001, abs=5e-5)


def test_pieces_are_views_of_whatever_is_contiguous(monkeypatch):
    whole, _, _ = learn("adamw_bf16", 3)
    monkeypatch.setattr(adamw_bf16, "_PIECE", 1000)
    pieces, _, _ = learn("adamw_bf16", 3)
    assert torch.allclose(pieces, whole, atol=2e-3)  # other pieces draw other numbers
    flipped = torch.nn.Parameter(torch.ones(4, 3).T)
    optimizer = AdamWBf16([flipped], lr=0.1)
    flipped.grad = torch.ones(3, 4)
    optimizer.step()
    assert float(flipped.detach().max()) < 0.95


@needs_bitsandbytes
@pytest.mark.parametrize("name", NAMES)
def test_the_state_goes_on_bit_for_bit(tiny_model, image_spec, tmp_path, name):
    """Through a checkpoint's own tensors: counters that are plain numbers come back as such."""
    from lapilli.train.loss import LossModule

    def make():
        model = tiny_model()
        train = Train(optimizer=name, learning_rate=0.01, momentum=0.9)
        engine = Single(LossModule(model, image_spec))
        return engine, engine.optimizer(train)

    def step(engine, optimizer, seed):
        torch.manual_seed(seed)
        for _, parameter in engine.trained():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()

    one, first = make()
    step(one, first, 1)
    kept = {(kind, key): tensor.clone() for kind, key, tensor in one.state(first)}
    step(one, first, 2)
    other, second = make()
    owners = dict(other.trained())
    with torch.no_grad():
        for (kind, key), tensor in kept.items():
            if kind == "weights":
                owners[key].copy_(tensor)
            else:
                owner, _, entry = key.rpartition(".")
                number = tensor.ndim == 0 and tensor.dtype == torch.int64
                second.state[owners[owner]][entry] = tensor.item() if number else tensor
    step(other, second, 2)
    for (name_one, a), (_, b) in zip(one.trained(), other.trained(), strict=True):
        assert torch.equal(a, b), name_one


def test_what_can_not_be_had_is_refused_with_the_reason(monkeypatch):
    check_optimizer(Train(optimizer="adamw_bf16"), "fsdp", CPU)
    with pytest.raises(RunError, match=r"adamw_bf16 is not for run.engine: deepspeed"):
        check_optimizer(Train(optimizer="adamw_bf16"), "deepspeed", CPU)
    eight = Train(optimizer="adamw_8bit")
    with pytest.raises(RunError, match=r"run.engine: fsdp splits them; use adamw_bf16"):
        check_optimizer(eight, "fsdp", CPU)
    if importlib.util.find_spec("bitsandbytes") is not None:
        check_optimizer(eight, "ddp", CPU)
        with pytest.raises(RunError, match=r"bitsandbytes [\d.]+ has no such optimiser for mps"):
            check_optimizer(eight, "ddp", torch.device("mps"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RunError, match=r"not installed: pip install 'lapilli\[quantise\]'"):
        check_optimizer(eight, "single", CPU)
