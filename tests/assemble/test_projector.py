"""Projectors out of every layout and into models: same numbers, with what belongs to them."""

import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.support.llava import REFERENCE, edit_config, restore, restore_piece, tensors_of
from tests.support.tiny import build_tiny

from lapilli.assemble.adapter import save_adapter
from lapilli.assemble.attach import attach, options_for
from lapilli.assemble.load import load
from lapilli.assemble.projector import extract
from lapilli.base.errors import ModelError, RunError
from lapilli.model.adapter import add_lora

PARTS = REFERENCE / "checkpoints"
MARKS = "model.embed_tokens.weight"


def projector_of(name: str) -> dict[str, torch.Tensor]:
    return {key: value for key, value in tensors_of(name).items() if "mm_projector" in key}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return set(one) == set(other) and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("end", ["safetensors", "bin"])
def test_llavas_projector_comes_out_with_its_token_rows(tmp_path, end):
    name = "tiny-llava-v1-im-start-end"
    folder = restore(name, tmp_path)
    out = tmp_path / f"out.{end}"
    found = extract(folder, out)
    made = load_file(out) if end == "safetensors" else torch.load(out, weights_only=True)
    tensors = tensors_of(name)
    assert torch.equal(made.pop(MARKS), tensors[MARKS][-2:])
    assert same(made, projector_of(name))
    assert (found.weights.kind, found.origin.feature_layers) == ("linear", (-2,))
    assert out.stat().st_size < 30_000  # nothing of the file that it was mapped from
    with pytest.raises(RunError, match="exists already"):
        extract(folder, out)


def test_pieces_and_files_give_the_same_projector(tmp_path):
    lora, pretrain = restore_piece("tiny-llava-lora", tmp_path), restore_piece("tiny-llava-pretrain", tmp_path)
    extract(pretrain, tmp_path / "one.safetensors")
    extract(pretrain / "mm_projector.bin", tmp_path / "two.safetensors")
    wanted = torch.load(pretrain / "mm_projector.bin", weights_only=True)
    assert same(load_file(tmp_path / "one.safetensors"), wanted)
    assert same(load_file(tmp_path / "two.safetensors"), wanted)
    extract(lora, tmp_path / "lora.safetensors")
    beside = torch.load(lora / "non_lora_trainables.bin", weights_only=True)
    wanted = {key.removeprefix("base_model.model."): value for key, value in beside.items()}
    assert same(load_file(tmp_path / "lora.safetensors"), wanted)


@pytest.mark.parametrize("projector", ["mlp2x_gelu", "linear"])  # transformers' layout, and our own
def test_ours_come_out_with_newline_and_rows_and_go_back_in(tmp_path, projector):
    model = build_tiny(tmp_path / "model", projector=projector, image_mode="anyres", im_start_end=True, dtype="float32")
    extract(model, tmp_path / "out.bin")
    tower = {"vision_encoder": str(PARTS / "vision-tower"), "image_mode": "anyres", "dtype": "float32", "seed": 1}
    before = load(model)
    rows = before.tokenizer.convert_tokens_to_ids(["<im_start>", "<im_end>"])
    written = torch.load(tmp_path / "out.bin", weights_only=True)
    assert torch.equal(written[MARKS], before.model.get_input_embeddings().weight[rows])
    written[MARKS] += 1  # as trained: rows that no new model starts with
    torch.save(written, tmp_path / "trained.bin")
    options = options_for(str(PARTS / "llama-base"), tmp_path / "trained.bin", tower)
    assert (options.projector, options.im_start_end) == (projector, True)
    attach(options, tmp_path / "again")
    after = load(tmp_path / "again")
    assert same(before.model.projector.state_dict(), after.model.projector.state_dict())
    assert torch.equal(before.model.image_newline, after.model.image_newline)
    rows = after.tokenizer.convert_tokens_to_ids(["<im_start>", "<im_end>"])
    assert torch.equal(after.model.get_input_embeddings().weight[rows], written[MARKS])


def test_attaching_takes_what_the_projectors_folder_says(tmp_path):
    folder = restore("tiny-llava-v1.6-anyres", tmp_path)
    options = options_for(str(PARTS / "llama-base"), folder, {})
    assert options.image_mode == "anyres"
    assert options.vision_encoder.endswith("vision-tower")
    report = attach(options, tmp_path / "model")
    made = load(tmp_path / "model").model
    wanted = tensors_of("tiny-llava-v1.6-anyres")
    assert torch.equal(made.image_newline, wanted["model.image_newline"])
    assert torch.equal(made.projector[2].bias, wanted["model.mm_projector.2.bias"])
    assert not any("random" in note for note in report.notes)
    extract(folder, tmp_path / "bare.safetensors")
    bare = load_file(tmp_path / "bare.safetensors")
    del bare["model.image_newline"]
    save_file(bare, tmp_path / "bare2.safetensors")
    chosen = {"vision_encoder": options.vision_encoder, "image_mode": "anyres"}
    report = attach(options_for(str(PARTS / "llama-base"), tmp_path / "bare2.safetensors", chosen), tmp_path / "bare")
    assert any("no image_newline" in note for note in report.notes)


def test_adapters_of_ours_give_theirs_with_the_rows_of_their_base(tmp_path):
    base = build_tiny(tmp_path / "model", im_start_end=True, dtype="float32")
    loaded = load(base)
    add_lora(loaded.model, r=2, alpha=2, dropout=0.0)
    with torch.no_grad():
        loaded.model.projector[0].weight.fill_(0.5)
    save_adapter(loaded.model, loaded.tokenizer, loaded.spec, base, tmp_path / "adapter")
    found = extract(tmp_path / "adapter", tmp_path / "out.safetensors")
    made = load_file(tmp_path / "out.safetensors")
    assert (made["model.mm_projector.0.weight"] == 0.5).all()
    rows = loaded.tokenizer.convert_tokens_to_ids(["<im_start>", "<im_end>"])
    assert torch.equal(made[MARKS], load(base).model.get_input_embeddings().weight[rows])
    assert found.origin.image_mode == "pad"
    shutil.move(base, tmp_path / "moved")
    with pytest.raises(ModelError, match="model: no such file or folder"):
        extract(tmp_path / "adapter", tmp_path / "no.safetensors")
    extract(tmp_path / "adapter", tmp_path / "again.safetensors", tmp_path / "moved")
    assert same(load_file(tmp_path / "again.safetensors"), made)


def test_what_is_no_projector_is_refused_by_name(tmp_path):
    def refused(words: str, path, out="out.safetensors", **chosen) -> None:
        with pytest.raises(ModelError, match=words):
            extract(path, tmp_path / out) if not chosen else options_for(str(PARTS / "llama-base"), path, chosen)
        assert not (tmp_path / out).exists()

    refused("holds no projector", PARTS / "llama-base")
    refused("no such file or folder", tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    refused("empty: no projector here", tmp_path / "empty")
    refused("ends in .safetensors, or in .bin", PARTS / "tiny-llava-pretrain", out="out.pt")
    odd = tmp_path / "odd.safetensors"
    save_file({"model.mm_projector.proj_in.weight": torch.zeros(2, 2)}, odd)
    refused("odd.safetensors: its projector is neither linear nor mlpNx_gelu: proj_in.weight", odd)
    (tmp_path / "evil.bin").write_bytes(pickle.dumps({"model.mm_projector.weight": print}, protocol=2))
    refused("evil.bin: can't be read", tmp_path / "evil.bin")
    save_file({"model.mm_projector.weight": torch.zeros(64, 48)}, tmp_path / "wide.safetensors")
    tower = {"vision_encoder": str(PARTS / "vision-tower")}
    refused(
        "a projector for 48 numbers, but the features of .*vision-tower have 32", tmp_path / "wide.safetensors", **tower
    )
    refused("does not say which vision encoder", tmp_path / "wide.safetensors", image_mode="pad")
    lost = restore("tiny-llava-v1-im-start-end", tmp_path)
    edit_config(lost, vocab_size=2000)
    tensors = torch.load(lost / "pytorch_model.bin", weights_only=True)
    torch.save(tensors | {MARKS: tensors[MARKS][:2000]}, lost / "pytorch_model.bin")
    refused("<im_start> and <im_end>, but its tokenizer has no such tokens among the 2000 rows", lost)
