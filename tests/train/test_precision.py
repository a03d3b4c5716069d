"""What a run computes in: what was asked, what was really multiplied, and which attention did it."""

import io
import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lapilli.base.errors import ModelError, RunError
from lapilli.model.attention import packed_attention
from lapilli.model.freeze import apply_freeze
from lapilli.recipe.load import load_recipe
from lapilli.recipe.schema import Run
from lapilli.train.device.cpu import Cpu
from lapilli.train.loss import LossModule
from lapilli.train.precision import Audit, settle
from lapilli.train.run import train_stage


class Stubborn(nn.Linear):
    """A layer that leaves autocast, as some models' code does."""

    def forward(self, input):
        with torch.autocast("cpu", enabled=False):
            return F.linear(input.float(), self.weight.float()).to(input.dtype)


def forward(model, image_spec, batch, precision):
    with Cpu().autocast(precision):
        return LossModule(model, image_spec)(batch)


@pytest.fixture
def settled(tiny_model, tiny_step, split):
    """A model that trains all but its encoder, settled, what was said of it, and a micro-batch."""

    def make(prepare=lambda model: None, **run):
        model, said = tiny_model(), []
        prepare(model)
        apply_freeze(model, "freeze_vision")
        settle(model, Run(device="cpu", **run), Cpu(), said.append)
        return model, said, split(*tiny_step(4), 1)[0]

    return make


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_was_multiplied_is_told(settled, image_spec, precision):
    model, _, batch = settled(precision=precision)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    frozen = {p.dtype for p in model.parameters() if not p.requires_grad}
    assert frozen == {torch.float32 if precision == "fp32" else torch.bfloat16}
    audit = Audit(model, precision)
    forward(model, image_spec, batch, precision)
    lines = audit.lines()
    assert [line.split(": ")[1] for line in lines] == ["vision_encoder", "projector", "language_model"]
    # Of the encoder's two layers one is never run; the language model has two of seven matrices, and its output.
    for line, first, layers in zip(lines, ("patch_embedding", "projector.0", "q_proj"), (7, 2, 15), strict=True):
        assert f"first matrix product {precision} (" in line
        assert f"{first})" in line
        assert line.endswith(f"layers: {layers} in {precision}")
    forward(model, image_spec, batch, precision)
    assert not audit.lines()


def test_a_part_that_computes_otherwise_ends_the_run(settled, image_spec):
    def spoil(model):
        layer = model.language_model.model.layers[0].self_attn
        layer.q_proj = Stubborn(32, 32, bias=False)

    model, _, batch = settled(spoil, precision="bf16")
    Audit(model, "bf16")
    words = r"first matrix product of the language_model, in language_model\S+q_proj \(Stubborn\), is in fp32"
    with pytest.raises(RunError, match=words):
        forward(model, image_spec, batch, "bf16")
    # Without autocast, as behind an engine that lost it, the encoder's frozen weights are in bf16 and all else is not.
    model, _, batch = settled(precision="bf16")
    Audit(model, "bf16")
    with pytest.raises(RunError, match=r"first matrix product of the projector, .* is in fp32"):
        forward(model, image_spec, batch, "fp32")


def test_a_single_layer_that_computes_otherwise_is_named(settled, image_spec):
    def spoil(model):
        model.language_model.model.layers[1].mlp.gate_proj = Stubborn(32, 48, bias=False)

    model, _, batch = settled(spoil, precision="bf16")
    audit = Audit(model, "bf16")
    forward(model, image_spec, batch, "bf16")
    *_, counted, warning = audit.lines()
    assert counted.endswith("layers: 14 in bf16, 1 in fp32")
    assert "1 layers of the language_model do not compute in bf16: language_model.model.layers.1.mlp.gate" in warning


def test_every_attention_kernel_gives_the_same_loss(settled, image_spec):
    losses = {}
    for kernel in ("auto", "sdpa", "eager"):
        model, _, batch = settled(precision="fp32", attention=kernel)
        with torch.profiler.profile() as profile:
            losses[kernel] = float(forward(model, image_spec, batch, "fp32").detach())
        fused = any("scaled_dot_product" in event.key for event in profile.key_averages())
        assert fused == (kernel != "eager")
        wanted = {"auto": "sdpa"}.get(kernel, kernel)
        assert model.vision_encoder.config._attn_implementation == wanted
    assert losses["sdpa"] == pytest.approx(losses["eager"], rel=1e-6)
    assert losses["auto"] == losses["sdpa"]


def test_kernels_that_can_not_serve_are_refused_with_the_reason(settled):
    with pytest.raises(RunError, match="flash_attention_2 is a kernel for CUDA, and this run is on cpu; use auto"):
        settled(attention="flash_attention_2")
    query = torch.zeros(1, 2, 3, 8)
    bounds = torch.tensor([0, 3])
    with pytest.raises(ModelError, match=r"flash_attention_2 can't serve Linear: it is for half precision on CUDA"):
        packed_attention(nn.Linear(1, 1), query, query, query, None, cu_seq_lens_q=bounds, kernel="flash_attention_2")
    with pytest.raises(ModelError, match="sdpa can't serve Linear: it caps its logits"):
        packed_attention(nn.Linear(1, 1), query, query, query, None, cu_seq_lens_q=bounds, kernel="sdpa", softcap=30.0)


def test_a_wish_without_meaning_is_told(settled):
    _, said, _ = settled(tf32=True)
    assert said == ["run.tf32 means nothing on the CPU: fp32 is fp32"]
    assert not settled()[1]


def test_a_run_prints_what_it_computed_in_after_its_first_step(recipe_file):
    stream, said = io.StringIO(), []
    (stage,) = load_recipe(recipe_file(), ["train.max_steps=2", "run.precision=bf16"]).recipe.stages
    train_stage(stage, {}, say=said.append, stream=stream)
    lines = [line for line in stream.getvalue().splitlines() if "first matrix product" in line]
    assert len(lines) == 3
    assert all("first matrix product bf16" in line for line in lines)
    table = next(text for text in said if "never run" in text).splitlines()
    assert table[0].endswith("memory  held in")
    assert re.search(r"vision_encoder .* bf16 \S+$", table[1])
    assert re.search(r"language_model .* fp32 \S+$", table[3])
