"""What is kept for the backward pass: less and less, and the same gradients; and layers that are compiled."""

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from lapilli.base.errors import RunError
from lapilli.model.freeze import apply_freeze
from lapilli.recipe.schema import Lora, Run, Stage, Train
from lapilli.train.device.cpu import Cpu
from lapilli.train.loss import LossModule
from lapilli.train.recompute import check_compile, compile_layers, keep_for_backward
from lapilli.train.setup import training_mode


class Kept(TorchDispatchMode):
    """Counts the bytes that operations made and somebody still holds."""

    def __init__(self):
        super().__init__()
        self._made = {}
        self.products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.products += func.name().startswith(("aten::mm", "aten::addmm"))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self._made[storage.data_ptr()] = (StorageWeakRef(storage), storage.nbytes())
        return result

    def bytes(self):
        return sum(size for reference, size in self._made.values() if not reference.expired())


def learn(model, image_spec, batches):
    """Losses and gradients."""
    losses = []
    for batch in batches:
        loss = LossModule(model, image_spec)(batch)
        loss.backward()
        losses.append(float(loss.detach()))
    return losses, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def cost(model, image_spec, batch):
    """Bytes that the forward pass keeps, and matrix products of the backward pass."""
    with Kept() as forward:
        loss = LossModule(model, image_spec)(batch)
        kept = forward.bytes()
    with Kept() as backward:
        loss.backward()
    return kept, backward.products


def trainable(model, freeze="full", mode="none"):
    apply_freeze(model, freeze)
    training_mode(model)
    keep_for_backward(model, mode)
    return model


@pytest.mark.parametrize("attention", ["auto", "eager"])
def test_less_is_kept_and_the_same_is_learned(tiny_model, tiny_step, split, image_spec, attention):
    batches = [split(*tiny_step(8, seed), 1)[0] for seed in range(2)]
    learned, kept, products = {}, {}, {}
    for mode in ("none", "selective", "full"):
        model = trainable(tiny_model(), mode=mode)
        model.attention_kernel = attention
        learned[mode] = learn(model, image_spec, batches)
        kept[mode], products[mode] = cost(model, image_spec, batches[0])
    losses, gradients = learned["none"]
    for mode in ("selective", "full"):
        assert learned[mode][0] == losses
        assert learned[mode][1].keys() == gradients.keys()
        for name, gradient in gradients.items():
            assert torch.allclose(learned[mode][1][name], gradient, rtol=1e-5, atol=1e-8), (mode, name)
    # Matrix products are run again under `full` alone: all of three layers' but those that nothing needs.
    assert products["selective"] == products["none"]
    assert products["full"] > products["none"] + 10
    assert kept["full"] < 0.6 * kept["selective"] < 0.6 * 0.7 * kept["none"]


def test_layers_of_frozen_parts_keep_nothing_anyway(tiny_model):
    model = trainable(tiny_model(), "freeze_vision", "selective")
    flags = [m.gradient_checkpointing for m in model.modules() if hasattr(m, "gradient_checkpointing")]
    assert any(flags)
    assert not any(getattr(m, "gradient_checkpointing", False) for m in model.vision_encoder.modules())


def stage(checkpointing="none", lora=None, **run):
    return Stage(train=Train(lora=lora, gradient_checkpointing=checkpointing), run=Run(compile=True, **run))


def test_what_does_not_go_with_compiling_is_refused():
    check_compile(stage(), "ddp")
    check_compile(stage(), "fsdp")
    with pytest.raises(RunError, match=r"would not repeat bit for bit; leave one of them out"):
        check_compile(stage(deterministic=True), "single")
    with pytest.raises(RunError, match=r"use none or full"):
        check_compile(stage(checkpointing="selective"), "single")
    with pytest.raises(RunError, match=r"bitsandbytes' layers can't be compiled"):
        check_compile(stage(lora=Lora(quantise="nf4")), "single")
    with pytest.raises(RunError, match=r"run.engine: deepspeed is not tested; use single, ddp or fsdp"):
        check_compile(stage(), "deepspeed")


@pytest.mark.slow
def test_without_a_compiler_the_remedy_is_named(tiny_model):
    from torch._inductor import config

    torch._dynamo.reset()
    absent = config.patch({"cpp.cxx": (None, "no-such-compiler")})
    words = r"(?s)nothing can be compiled for cpu here; it needs a C\+\+ compiler.*no-such-compiler"
    with absent, torch.compiler.config.patch(force_disable_caches=True), pytest.raises(RunError, match=words):
        compile_layers(tiny_model(), Cpu())


@pytest.mark.slow
def test_compiled_layers_learn_the_same_whatever_the_lengths(tiny_model, tiny_step, split, image_spec):
    """One program for all layers of a part and all lengths; what is run again does not change it."""
    batches = [split(*tiny_step(2 + seed, seed), 1)[0] for seed in range(5)]
    losses, gradients = learn(trainable(tiny_model()), image_spec, batches)
    torch._dynamo.reset()
    counted = torch._dynamo.utils.counters["stats"]
    for mode in ("none", "full"):
        model = trainable(tiny_model(), mode=mode)
        assert compile_layers(model, Cpu()) == 3
        got, _ = learn(model, image_spec, batches[:3])
        programs = counted["unique_graphs"]
        rest, made = learn(model, image_spec, batches[3:])
        assert counted["unique_graphs"] == programs, "lengths that were not seen before"
        assert got + rest == pytest.approx(losses, rel=1e-5)
        for name, gradient in gradients.items():
            assert (made[name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-7, (mode, name)
