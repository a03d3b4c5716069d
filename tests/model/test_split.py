"""Layers on several devices. There are none here: plans are numbers, hooks run on one device, and two that can't be
mixed are pretended, so that a tensor that was not moved is an error."""

import pytest
import torch
from tests.support.adapters import make_adapter
from tests.support.parts import make_language
from tests.support.tiny import build_tiny
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM

from lapilli.assemble.load import load
from lapilli.assemble.shared import Holding, load_several
from lapilli.base.errors import ModelError
from lapilli.generate import slots
from lapilli.generate.assistant import Assistant, load_together
from lapilli.generate.slots_probe import _in_slots
from lapilli.model import split
from lapilli.model.split import plan_split

GB = 10**9


@pytest.mark.parametrize(
    ("blocks", "beside", "free", "placed"),
    [
        ([1] * 4, 0, [10, 10], [0, 0, 1, 1]),
        ([1] * 6, 2, [10, 10], [0, 0, 1, 1, 1, 1]),  # the first holds the rest too
        ([1] * 6, 0, [10, 5], [0, 0, 0, 0, 1, 1]),
        ([1] * 6, 0, [5, 10], [0, 0, 1, 1, 1, 1]),
        ([1] * 3, 0, [10, 10], [0, 0, 1]),
        ([1] * 3, 4, [10, 10, 10], [1, 1, 2]),  # the first is full without any
        ([3, 1, 3], 0, [4, 4, 4], [0, 1, 2]),
        ([1], 0, [10, 10], [0]),
    ],
)
def test_blocks_are_dealt_out_evenly_and_in_order(blocks, beside, free, placed):
    made = plan_split([b * GB for b in blocks], beside * GB, [f * GB for f in free])
    assert made == placed


@pytest.mark.parametrize(
    ("blocks", "beside", "free"),
    [([1] * 9, 8, [10, 10]), ([1], 9, [10, 10]), ([9], 0, [10, 10]), ([5, 5, 5], 0, [8, 8])],
)
def test_what_does_not_fit_is_refused_with_numbers(blocks, beside, free):
    with pytest.raises(
        ModelError, match=rf"weights take {beside + sum(blocks)}\.0 GB, {beside}\.0 of them on the first"
    ):
        plan_split([b * GB for b in blocks], beside * GB, [f * GB for f in free])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("split")
    build_tiny(made / "base", dtype="float32")
    make_adapter(made / "base", made / "med")
    return made


def test_more_gpus_than_there_are(folder):
    with pytest.raises(ModelError, match=rf"99 GPUs are asked for, this machine has {torch.cuda.device_count()}"):
        load_together({"base": folder / "base"}, gpus=99)


def test_answers_are_those_of_one_device(folder):
    """Everything moved and hooked, on a CPU that stands for both."""
    cpu = torch.device("cpu")
    how = Holding(cpu, torch.float32, split=(cpu, cpu))
    together = load_several({"base": folder / "base", "med": folder / "med"}, how)
    questions = [("What is it?", None), ("How many red dogs?", None)]
    for name, loaded in together.items():
        hooks = [len(b._forward_pre_hooks) for b in split.blocks_of(loaded.model.language_model)]
        assert hooks == [1] * len(hooks)
        alone = Assistant(**vars(load(folder / name)))
        made = Assistant(**vars(loaded))
        assert made.generate_batch(questions, max_new_tokens=9) == alone.generate_batch(questions, max_new_tokens=9)


@pytest.mark.parametrize(
    "kind", ["llama", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("mistral", "gemma", "gpt_neox"))]
)
def test_nothing_of_one_device_meets_another(kind, tmp_path):
    """Prefixes, rests and single tokens through slots, with the later blocks on another device."""
    config = AutoConfig.from_pretrained(make_language(kind, tmp_path))
    config.num_hidden_layers, config.layer_types = 6, None
    slots.register()
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        model = AutoModelForCausalLM.from_config(config).eval()
        devices = [torch.device("cpu"), torch.device("meta")]
        joined = torch.nn.Module()
        joined.language_model, joined.get_input_embeddings = model, model.get_input_embeddings
        blocks = split.blocks_of(model)
        split.place(joined, devices, [1 << 40, 1 << 40])
        assert {p.device.type for p in blocks[0].parameters()} == {"cpu"}
        assert {p.device.type for p in blocks[-1].parameters()} == {"meta"}
        assert (
            model.get_input_embeddings().weight.device.type == model.get_output_embeddings().weight.device.type == "cpu"
        )
        parts = split.shares(joined)
        assert list(parts) == devices
        assert sum(parts.values()) == 1
        texts = [torch.randn(13, 64), torch.randn(16, 64)]
        with pytest.raises((RuntimeError, NotImplementedError), match=r"same device|meta"):
            _in_slots(model, texts, 7)
        split.connect(joined)
        for shared in (7, 0):
            for logits in _in_slots(model, texts, shared):
                assert logits.device.type == "cpu"
