"""What is asked of a Gaudi, and when. No Gaudi is here: a stand-in notes the calls, and the CPU does the work."""

import os
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from lapilli.base.errors import RunError
from lapilli.recipe.load import load_recipe
from lapilli.train.device import hpu
from lapilli.train.device.choose import back_ends, choose_device
from lapilli.train.device.cpu import Cpu
from lapilli.train.device.hpu_mode import settle_mode
from lapilli.train.loss import LossModule
from lapilli.train.metrics import read_metrics
from lapilli.train.parallel.single import Single
from lapilli.train.run import train_stage

STAND_IN = Path(__file__).parents[1] / "support/gaudi"
VARIABLES = ("PT_HPU_LAZY_MODE", "PT_ENABLE_INT64_SUPPORT", "LOCAL_RANK", "HLS_MODULE_ID", "HABANA_VISIBLE_MODULES")


def forget():
    for name in [name for name in sys.modules if name.split(".")[0] == hpu.PACKAGE]:
        del sys.modules[name]


@pytest.fixture
def gaudi(monkeypatch):
    """The stand-in's list of calls."""
    for name in VARIABLES:
        monkeypatch.setenv(name, "")  # so that it is as before after the test
        monkeypatch.delenv(name)
    monkeypatch.syspath_prepend(STAND_IN)
    monkeypatch.setattr(hpu, "KIND", "cpu")
    forget()
    import habana_frameworks

    # As it is before PyTorch: found, but not imported.
    calls = habana_frameworks.calls
    del sys.modules["habana_frameworks"]
    yield lambda: sys.modules["habana_frameworks"].calls if "habana_frameworks" in sys.modules else calls
    forget()


def test_auto_takes_a_gaudi_that_is_there(gaudi, monkeypatch):
    device = choose_device("auto")
    assert device.describe() == "GAUDI2, eager mode"
    assert (os.environ["PT_HPU_LAZY_MODE"], os.environ["PT_ENABLE_INT64_SUPPORT"]) == ("0", "1")
    monkeypatch.setattr(sys.modules["habana_frameworks"], "devices", 0)
    assert isinstance(choose_device("auto"), Cpu)
    with pytest.raises(RunError, match=r"sees no Gaudi; `hl-smi` lists"):
        choose_device("hpu")


def test_without_its_package_there_is_none(monkeypatch):
    monkeypatch.setattr(hpu, "find_spec", lambda _name: None)
    assert isinstance(choose_device("auto"), Cpu) or torch.cuda.is_available()
    assert back_ends(0) == "gloo" or torch.cuda.is_available()
    with pytest.raises(RunError, match=r"habana_frameworks\) is not installed"):
        choose_device("hpu")


@pytest.mark.parametrize(("mode", "value"), [("eager", "0"), ("lazy", "1")])
def test_the_mode_is_said_before_pytorch_is_imported(gaudi, mode, value):
    environment = {"PT_ENABLE_INT64_SUPPORT": "0"}
    settle_mode("cpu", mode, environment)
    settle_mode("cuda", mode, environment)
    assert "PT_HPU_LAZY_MODE" not in environment
    settle_mode("auto", mode, environment)
    assert environment == {"PT_HPU_LAZY_MODE": value, "PT_ENABLE_INT64_SUPPORT": "0"}
    settle_mode("hpu", mode, environment)
    with pytest.raises(RunError, match=f"PT_HPU_LAZY_MODE={value} is set, and means the contrary"):
        settle_mode("hpu", {"eager": "lazy", "lazy": "eager"}[mode], environment)


def test_a_mode_that_pytorch_was_not_imported_in_is_refused(gaudi):
    choose_device("hpu", hpu_mode="lazy")
    with pytest.raises(RunError, match=r"run.hpu_mode is eager, but PyTorch was imported in lazy mode"):
        choose_device("hpu", hpu_mode="eager")


def test_seeds_random_states_memory_and_precision(gaudi):
    device = choose_device("hpu")
    device.seed(3)
    drawn = torch.rand(2)
    device.seed(3)
    assert torch.equal(torch.rand(2), drawn)
    state = device.random_state()
    device.set_random_state(state)
    device.set_random_state({})
    assert gaudi() == [("seed", 3), ("seed", 3), "get_rng_state", ("set_rng_state", [7])]
    assert device.peak_memory_bytes() == 123_456
    with device.autocast("bf16"):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
    with device.autocast("fp32"):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
    assert device.use_tf32(False) == ""
    assert "means nothing on a Gaudi" in device.use_tf32(True)
    assert device.compile_options() == {"backend": "hpu_backend", "dynamic": False}


@pytest.mark.parametrize(
    ("variables", "card"),
    [
        ({"LOCAL_RANK": "2"}, (None, "2")),  # torchrun: HCCL understands it
        ({}, ("2", None)),  # SLURM
        ({"HABANA_VISIBLE_MODULES": "4,5,6"}, ("6", None)),
        ({"HLS_MODULE_ID": "1"}, ("1", None)),
    ],
)
def test_each_process_has_its_card(gaudi, monkeypatch, variables, card):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert back_ends(2) == "cpu:gloo,hpu:hccl"
    assert gaudi() == [("hccl", *card)]


def test_more_processes_than_cards_are_refused(gaudi, monkeypatch):
    monkeypatch.setenv("HABANA_VISIBLE_MODULES", "4,5")
    with pytest.raises(RunError, match="names 2 cards; start one process for each"):
        back_ends(2)


def train(path, *overrides):
    (stage,) = load_recipe(path, list(overrides)).recipe.stages
    with open(os.devnull, "w") as stream:
        train_stage(stage, {}, stream=stream)
    return read_metrics(Path(str(stage.out)) / "metrics.jsonl")


@pytest.mark.parametrize("mode", ["lazy", pytest.param("eager", marks=pytest.mark.slow)])
def test_a_recipe_runs_unchanged_and_graphs_are_cut_in_lazy_mode(gaudi, recipe_file, monkeypatch, mode):
    path = recipe_file("")
    given = ("train.max_steps=3", "train.tokens_per_micro_batch=1024", "data.validation=held-out.json")
    alone = train(path, *given)
    note_order(monkeypatch, gaudi)
    there = train(path, *given, "run.device=hpu", f"run.hpu_mode={mode}", "out=there")
    for one, other in zip(alone, there, strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-5)
        assert other["memory_bytes"] == 123_456
        assert other["padding"] > 0
    assert there[-1]["validation_loss"] == pytest.approx(alone[-1]["validation_loss"], rel=1e-5)
    order = [call for call in gaudi() if call in ("forward", "backward", "update", "mark_step")]
    assert order.count("update") == 3
    if mode == "eager":
        assert "mark_step" not in order
        return
    # After each backward pass, each step of the optimiser, and each forward pass of the validation; nowhere else.
    following = set(pairwise(order))
    assert {pair for pair in following if "mark_step" in pair} == {
        ("backward", "mark_step"), ("update", "mark_step"), ("forward", "mark_step"),
        ("mark_step", "forward"), ("mark_step", "update"),
    }  # fmt: skip
    assert following - {pair for pair in following if "mark_step" in pair} == {("forward", "backward")}
    assert order.count("mark_step") == order.count("forward") + 3


def note_order(monkeypatch, gaudi):
    """Note forward and backward passes and optimiser steps among the stand-in's calls."""

    def noting(owner, name, what):
        before = getattr(owner, name)

        def call(*args, **kwargs):
            result = before(*args, **kwargs)
            gaudi().append(what)
            return result

        monkeypatch.setattr(owner, name, call)

    noting(LossModule, "forward", "forward")
    noting(Single, "backward", "backward")
    noting(Single, "update", "update")
