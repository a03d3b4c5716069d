import pytest
import torch
import transformers as hf
from tests.support.parts import LANGUAGE, make_language, make_vision

import lapilli
from lapilli.assemble.build import BuildOptions, build
from lapilli.generate.decoding import Decoding
from lapilli.generate.padding import why_not_padded

IDS = {"vocab_size": 400, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


@pytest.mark.parametrize("name", LANGUAGE)
def test_the_architectures_of_the_matrix_allow_padding(name):
    assert why_not_padded(LANGUAGE[name](IDS)) == ""


def test_a_model_whose_state_runs_through_padding_does_not():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    assert "padding changes its logits" in why_not_padded(hf.RwkvConfig(hidden_size=64, num_hidden_layers=2, **IDS))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.slow
@pytest.mark.parametrize("name", LANGUAGE)
def test_greedy_answers_are_the_same_alone_and_together(name, tmp_path, picture):
    """The real model, with pictures; MPT's ALiBi among them."""
    vision, language = make_vision("clip", tmp_path / "v"), make_language(name, tmp_path / "l")
    build(BuildOptions(vision_encoder=str(vision), language_model=str(language)), tmp_path / "m")
    assistant = lapilli.load(tmp_path / "m")
    chats = [("hi", None), ("<image> what is this? " * 2, [picture] * 2), ("a red dog and a blue bird?", [picture])]
    prompts = [assistant.processor.prompt(*chat) for chat in chats]
    alone = [assistant.engine.generate([p], Decoding(12))[0] for p in prompts]
    together = assistant.engine.generate(prompts, Decoding(12), batch_size=3)
    assert alone == together
    assert len({a.token_ids for a in alone}) > 1
