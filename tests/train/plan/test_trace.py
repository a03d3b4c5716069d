"""A traced step holds what the real one allocates, byte for byte, and the heap it fills is one of glibc's kind."""

import gc
import json

import pytest
import torch
from tests.support.parts import make_language, make_vision
from tests.train.conftest import REFERENCE

from lapilli.assemble.build import BuildOptions, build
from lapilli.base.errors import RecipeError
from lapilli.data.buckets import Shape
from lapilli.recipe.load import load_recipe
from lapilli.train.loss import LossModule
from lapilli.train.plan.heap import Heap
from lapilli.train.plan.machine import parse_bytes
from lapilli.train.plan.step import empty_model, trace_micro_batch, trainable
from lapilli.train.plan.workload import Portion
from lapilli.train.reading import read_description, reading
from lapilli.train.setup import make_trainable

PORTIONS = (Portion(180, 60, 1), Portion(140, 90, 0), Portion(200, 50, 2))


def stage_of(path, *overrides):
    (stage,) = load_recipe(path, list(overrides)).recipe.stages
    return stage, reading(stage, *read_description(str(stage.model)))


def traced(path, *overrides, shape=None):
    stage, how = stage_of(path, *overrides)
    model = empty_model(str(stage.model), how)
    trainable(model, stage, how)
    return trace_micro_batch(model, stage, how, PORTIONS, shape)


def really(path, *overrides, shape=None):
    """Peak of what PyTorch's CPU allocator really gave out in the same pass."""
    from lapilli.assemble.load import load
    from lapilli.train.plan import step as planning

    stage, how = stage_of(path, *overrides)
    model = load(str(stage.model), dtype=torch.float32).model
    make_trainable(model, stage, how)
    module = LossModule(model, how.spec.image)

    class Real:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    batch = planning._batch(PORTIONS, how, model.config.image_token_id, Real(), shape)
    module(batch).backward()  # tables are made in the first pass
    model.zero_grad(set_to_none=True)
    gc.collect()
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        (module(batch) * 0.01).backward()
    events = [one for one in profile.profiler.kineto_results.events() if one.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda one: one.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


@pytest.mark.parametrize(
    "overrides",
    [
        ("train.freeze=full",),
        ("train.freeze=projector", "train.gradient_checkpointing=full"),
        pytest.param(("train.freeze=full", "train.gradient_checkpointing=selective"), marks=pytest.mark.slow),
        pytest.param(("train.lora.r=8", "train.lora.dropout=0.1"), marks=pytest.mark.slow),
    ],
)
def test_a_traced_pass_holds_what_the_real_one_does(recipe_file, overrides):
    path = recipe_file()
    if any("lora" in one for one in overrides):
        assert traced(path, *overrides).peak_bytes > traced(path, "train.freeze=projector").peak_bytes
    else:
        assert traced(path, *overrides).peak_bytes == pytest.approx(really(path, *overrides), rel=0.03)


def test_a_model_that_pads_is_traced_too(recipe_file, tmp_path):
    """MPT has no kernel for packed sequences: its micro-batches are padded, and what is no token is cut out again."""
    vision = make_vision("clip", tmp_path / "clip")
    language = make_language("mpt", tmp_path / "alone")
    build(BuildOptions(str(vision), str(language), dtype="float32"), tmp_path / "mpt")
    overrides = (f"model={tmp_path / 'mpt'}", "train.freeze=full")
    assert traced(recipe_file(), *overrides).peak_bytes == pytest.approx(really(recipe_file(), *overrides), rel=0.03)


def test_padding_to_a_fixed_shape_is_held_too(recipe_file):
    path, shape = recipe_file(), Shape(length=256, rows=4, pictures=4, targets=250)
    padded = traced(path, "train.freeze=full", shape=shape).peak_bytes
    assert padded == pytest.approx(really(path, "train.freeze=full", shape=shape), rel=0.03)
    assert padded > 1.2 * traced(path, "train.freeze=full").peak_bytes


def test_recomputing_holds_less_and_computes_more(recipe_file):
    path = recipe_file()
    none, full = (traced(path, f"train.gradient_checkpointing={mode}") for mode in ("none", "full"))
    assert full.peak_activations < 0.8 * none.peak_activations
    assert full.flops > 1.15 * none.flops
    config = json.loads((REFERENCE / "checkpoints/llama-base/config.json").read_text())
    supervised = sum(portion.supervised for portion in PORTIONS)
    assert none.logits >= 4 * config["vocab_size"] * supervised


def test_a_heap_reuses_what_fits_and_grows_where_nothing_does():
    heap = Heap()
    for name in "abc":
        heap.take(name, 10_000)
    three = heap.high
    heap.free("b")
    heap.take("d", 10_000)  # its hole is too small for an aligned block of its size
    assert heap.high > three + 9_000
    grown = heap.high
    heap.take("e", 9_000)
    assert heap.high == grown
    for name in "acde":
        heap.free(name)
    heap.take("f", 20_000)  # over the places of two neighbours
    assert heap.high == grown


def test_sizes_are_read_as_people_write_them():
    assert parse_bytes("80GB") == 80 * 10**9
    assert parse_bytes("24 GiB") == 24 * 2**30
    assert parse_bytes("1000") == 1000
    with pytest.raises(RecipeError, match="give a number with a unit"):
        parse_bytes("much")
