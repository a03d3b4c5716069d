"""Batches of fixed shapes teach what packed ones teach, and a device that compiles sees no more shapes than those."""

import json
import os
from collections import defaultdict
from contextlib import nullcontext
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.support.processes import Job, run_together
from tests.support.runs import assert_learned_the_same, make_workshop, train_alone
from tests.train.conftest import IMAGE_TOKEN, LAYOUT, VOCABULARY
from transformers import AutoModelForCausalLM as Causal
from transformers import (
    BloomConfig,
    CLIPVisionConfig,
    CLIPVisionModel,
    Gemma2Config,
    LlamaConfig,
)

from lapilli.base.errors import RecipeError
from lapilli.data.buckets import choose_shapes, plan_shapes
from lapilli.data.rows import fill_rows
from lapilli.model.config import LapilliConfig
from lapilli.model.language import probe_language
from lapilli.model.vlm import VisionLanguageModel
from lapilli.recipe.load import load_recipe
from lapilli.train.device.cpu import Cpu
from lapilli.train.loss import LossModule
from lapilli.train.metrics import read_metrics
from lapilli.train.parallel.single import Single
from lapilli.train.recompute import compile_layers
from lapilli.train.run import train_stage
from lapilli.train.step import accumulate
from lapilli.train.validate import validate_stage

CPU = torch.device("cpu")
SMALL = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False,
}  # fmt: skip
TEXTS = {
    "llama": LlamaConfig(**SMALL),
    # Caps its logits (so its own forward pass makes them), softcaps attention, slides a window in every other layer.
    "gemma2": Gemma2Config(**SMALL, head_dim=8, sliding_window=6, attention_dropout=0.0),
    # Does not take packed sequences.
    "bloom": BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4, hidden_dropout=0.0),
}


def make_model(name):
    text = deepcopy(TEXTS[name])  # models write into theirs
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    traits = probe_language(text)
    config = LapilliConfig(
        vision_config=vision, text_config=text, layout=LAYOUT.model_dump(), image_token_id=IMAGE_TOKEN,
        packing=traits.packing, head=traits.head,
    )  # fmt: skip
    model = VisionLanguageModel(config, CLIPVisionModel(vision), Causal.from_config(text)).float()
    return model.train(), traits


def fixed(examples, tiles, count=2, budget=96):
    """The Examples of a step in batches of at most `count` shapes."""
    columns = [[one.length for one in examples], [len(one.images) for one in examples]]
    columns.append([one.supervised for one in examples])
    shapes = choose_shapes(*columns, budget, count, multiple=4)
    return [
        fill_rows(
            [examples[i] for i in batch.positions], [t for i in batch.positions for t in tiles[i]], batch.shape,
            tile_size=(8, 8), tokens_per_picture=4,
        )
        for batch in plan_shapes(*columns, shapes)
    ], shapes  # fmt: skip


def gradients(model, image_spec, batches):
    model.zero_grad()
    losses = accumulate(Single(LossModule(model, image_spec)), batches, "tokens", CPU, nullcontext())
    return sum(losses), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("recompute", [False, True])
def test_losses_and_gradients_are_those_of_packed_batches(tiny_step, split, image_spec, name, recompute):
    model, traits = make_model(name)
    assert {"llama": ("varlen", "direct"), "gemma2": ("varlen", "forward"), "bloom": ("padded", "direct")}[name] == (
        traits.packing, traits.head,
    )  # fmt: skip
    if recompute:
        model.language_model.activation_checkpointing_enable({"use_reentrant": False})
    examples, tiles = tiny_step(9)
    loss, packed = gradients(model, image_spec, split(examples, tiles, 2))
    batches, shapes = fixed(examples, tiles)
    assert len(batches) > len(shapes) == 2
    fixed_loss, other = gradients(model, image_spec, batches)
    assert fixed_loss == pytest.approx(loss, rel=1e-5)
    assert packed.keys() == other.keys()
    for name, gradient in packed.items():
        assert (other[name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-9, name


def test_padding_teaches_nothing_whatever_it_holds(tiny_model, tiny_step, image_spec):
    model, (examples, tiles) = tiny_model(), tiny_step(5)
    batches, _ = fixed(examples, tiles)
    loss, before = gradients(model, image_spec, batches)
    for batch in batches:
        filled = torch.zeros(len(batch.input_ids), dtype=torch.bool)
        for row, name in enumerate(batch.ids):
            start = int(batch.cu_seqlens[row])
            filled[start : start + next(e.length for e in examples if e.id == name)] = True
        batch.input_ids[~filled] = torch.randint(2, VOCABULARY, (int((~filled).sum()),))
        for pixels in batch.images.values():
            unused = 4 * len(pixels.tiles) - int((batch.places.features < len(filled)).sum())
            if unused:
                pixels.tiles[-unused // 4 :] = 255
    again, after = gradients(model, image_spec, batches)
    assert again == loss
    assert all(torch.equal(gradient, after[name]) for name, gradient in before.items())


class Shapes:
    """Every combination of input shapes that the parts of a model are called with."""

    def __init__(self, module):
        self.seen = defaultdict(set)
        for name, part in module.named_modules():
            part.register_forward_pre_hook(self._noting(name), with_kwargs=True)

    def _noting(self, name):
        def note(_module, args, kwargs):
            given = [*args, *(kwargs[key] for key in sorted(kwargs))]
            self.seen[name].add(tuple((x.shape, x.dtype) for x in given if isinstance(x, torch.Tensor)))

        return note


@pytest.mark.parametrize("name", TEXTS)
def test_every_part_sees_no_more_shapes_than_there_are(tiny_step, image_spec, name):
    model, _ = make_model(name)
    module = LossModule(model, image_spec)
    examples, tiles = tiny_step(40)
    batches, shapes = fixed(examples, tiles, count=3)
    assert len(batches) > 5
    shapes_seen = Shapes(module)
    for batch in batches:
        module(batch).backward()
    assert len(shapes) == 3
    assert {n: len(seen) for n, seen in shapes_seen.seen.items() if len(seen) > 3} == {}


def run(path, *overrides):
    loaded = load_recipe(path, list(overrides))
    (stage,) = loaded.recipe.stages
    said: list[str] = []
    with open(os.devnull, "w") as stream:
        train_stage(stage, loaded.stage_origins(stage.name), say=said.append, stream=stream)
    folder = Path(str(stage.out))
    return read_metrics(folder / "metrics.jsonl"), load_file(folder / "model/model.safetensors"), "\n".join(said)


@pytest.mark.slow
def test_a_run_in_fixed_shapes_learns_what_a_packed_one_does(recipe_file, monkeypatch):
    path = recipe_file("")
    given = ("data.validation=held-out.json", "train.optimizer=sgd", "train.validate_every=2", "train.max_steps=4")
    packed, weights, said = run(path, *given)
    assert "fixed shapes" not in said
    seen = set()
    forward = LossModule.forward

    def noting(self, batch, *more):
        places = batch.places
        pictures = tuple(len(pixels.tiles) for pixels in batch.images.values())
        seen.add((len(batch.input_ids), places.rows, len(places.targets), len(places.features), pictures))
        return forward(self, batch, *more)

    monkeypatch.setattr(LossModule, "forward", noting)
    fixed, others, said = run(path, *given, "run.static_shapes=2", "out=fixed", "train.tokens_per_micro_batch=1024")
    assert "batches of 2 fixed shapes, rows x tokens: " in said
    assert len(seen) == 2
    for one, other in zip(packed, fixed, strict=True):
        assert one.keys() == other.keys()
        for key in {"loss", "grad_norm", "validation_loss"} & one.keys():
            assert other[key] == pytest.approx(one[key], rel=1e-5), key
        assert {k: other[k] for k in ("tokens", "supervised_tokens", "samples")} == {
            k: one[k] for k in ("tokens", "supervised_tokens", "samples")
        }
        assert one["padding"] == 0 < other["padding"] < 1
    for name, weight in weights.items():
        assert torch.allclose(others[name], weight, rtol=1e-5, atol=1e-6), name


def test_shapes_that_can_not_be_are_refused(recipe_file):
    path = recipe_file("")
    mean = ("train.loss_reduction=microbatch_mean", "train.micro_batch_size=2")
    with pytest.raises(RecipeError, match=r"run.static_shapes \(2 on cpu\) and .* exclude each other"):
        run(path, "run.static_shapes=2", *mean)
    with pytest.raises(RecipeError, match="more than tokens_per_micro_batch 300"):
        run(path, "run.static_shapes=2", "train.tokens_per_micro_batch=300")


@pytest.mark.slow
def test_compiled_layers_are_compiled_once_for_each_shape(tiny_step, image_spec):
    compiled = []

    class Counting(Cpu):
        def compile_options(self):
            return {"backend": lambda graph, _inputs: compiled.append(graph) or graph.forward, "dynamic": False}

    model, _ = make_model("llama")
    examples, tiles = tiny_step(40)
    batches, shapes = fixed(examples, tiles, count=3)
    loss, plain = gradients(model, image_spec, batches)
    torch._dynamo.reset()
    assert compile_layers(model, Counting()) == 3
    compiled.clear()  # what was compiled to see whether anything can be
    for _ in range(2):
        again, made = gradients(model, image_spec, batches)
        assert again == pytest.approx(loss, rel=1e-5)
        for name, gradient in plain.items():
            assert torch.allclose(made[name], gradient, rtol=1e-4, atol=1e-6), name
    # One program for each shape of the encoder's layer, and one for each of the language model's.
    assert 0 < len(compiled) <= 2 * len(shapes) == 6
    torch._dynamo.reset()


@pytest.mark.slow
def test_two_processes_in_fixed_shapes_learn_what_one_does_packed(base, tmp_path):
    path = str(make_workshop(tmp_path, base) / "recipe.yaml")
    given = (
        f"data.validation={tmp_path}/held-out.json", "train.validate_every=2", "train.max_steps=4", "train.freeze=full",
        "train.optimizer=sgd", "train.learning_rate=0.1",
    )  # fmt: skip
    alone = train_alone(path, *given, out=str(tmp_path / "alone"))
    shapes = ("run.static_shapes=3", "train.tokens_per_micro_batch=1024")
    engines = ("ddp", "fsdp")
    jobs = [Job(path, [*given, *shapes, f"run.engine={engine}", f"out={tmp_path / engine}"]) for engine in engines]
    for said in run_together(jobs, tmp_path):
        assert [one["stopped_by"] for one in said] == [None, None]
    for engine in engines:
        assert json.loads((tmp_path / engine / "run.json").read_text())["engine"] == engine
        assert_learned_the_same(tmp_path / engine, alone)


@pytest.mark.slow
def test_a_model_is_validated_in_fixed_shapes_too(recipe_file):
    given = ["data.validation=held-out.json", "train.tokens_per_micro_batch=1024"]
    losses = []
    for more in ([], ["run.static_shapes=2"]):
        (stage,) = load_recipe(recipe_file(""), given + more).recipe.stages
        with open(os.devnull, "w") as stream:
            losses.append(validate_stage(stage, str(stage.model), stream=stream).loss)
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
