"""QLoRA: what is quantised and what is not, that it learns, goes on, and merges exactly; adapters on the encoder."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lapilli.assemble.load import load
from lapilli.assemble.merge import merge
from lapilli.assemble.qlora import load_quantised
from lapilli.assemble.quantise import quantise
from lapilli.assemble.source import materialise, open_model
from lapilli.base.errors import LapilliError, RecipeError, RunError
from lapilli.checkpoint.stream import open_folder
from lapilli.model.held import held_as, held_bytes, numel
from lapilli.recipe.load import load_recipe
from lapilli.recipe.schema import Train
from lapilli.train.metrics import read_metrics
from lapilli.train.run import train_stage
from lapilli.train.weights import check_weights

pytest.importorskip("bitsandbytes", reason="the extra `quantise` is not installed")

CPU = torch.device("cpu")


def train(path, *overrides, resume="auto"):
    loaded = load_recipe(path, list(overrides))
    (stage,) = loaded.recipe.stages
    said: list[str] = []
    with open(os.devnull, "w") as stream:
        train_stage(stage, loaded.stage_origins(stage.name), resume=resume, say=said.append, stream=stream)
    return Path(str(stage.out)), "\n".join(said)


def losses(folder):
    return [row["loss"] for row in read_metrics(folder / "metrics.jsonl")]


@pytest.mark.parametrize("held", ["nf4", "int8"])
def test_weights_are_those_of_quantise(base, tmp_path, held):
    """The same numbers as `lapilli quantise` writes, in the language model's linear layers alone."""
    quantise(base, tmp_path / "small", 4 if held == "nf4" else 8)
    model = load_quantised(base, held, torch.bfloat16, CPU).model
    wanted = {name: t.read() for name, t in open_folder(tmp_path / "small").items()}
    compared = 0
    for name, module in model.language_model.named_modules():
        key = f"language_model.{name}.weight"
        if held_as(getattr(module, "weight", torch.empty(0))) == held:
            packed = next(t for k, t in wanted.items() if k.endswith(key))
            assert torch.equal(module.weight.data, packed)
            compared += 1
    assert compared == 14
    kinds = {name: held_as(p) for name, p in model.named_parameters()}
    assert {kinds[n] for n in kinds if n.startswith(("projector", "vision_encoder"))} == {"fp32"}
    assert kinds["language_model.lm_head.weight"] == kinds["language_model.model.embed_tokens.weight"] == "bf16"
    layer = model.language_model.model.layers[0].mlp.up_proj.weight
    exact = materialise(open_model(base), torch.float32).language_model.model.layers[0].mlp.up_proj.weight
    assert numel(layer) == exact.numel()
    assert held_bytes(layer) < exact.numel() * (0.6 if held == "nf4" else 1.1)


@pytest.mark.parametrize("held", ["nf4", "int8"])
def test_a_run_learns_and_its_adapters_merge_exactly_into_the_full_weights(recipe_file, base, tmp_path, held):
    path = recipe_file()
    qlora = f"train.lora={{r: 4, dropout: 0.0, quantise: {held}}}"
    plain, _ = train(path, "out=plain", "train.lora={r: 4, dropout: 0.0}", "train.epochs=2")
    folder, said = train(path, f"out={tmp_path / held}", qlora, "train.epochs=2", "run.precision=bf16")
    assert f"{held} " in said
    found, near = losses(folder), losses(plain)
    assert found[-1] < found[0]
    assert found == pytest.approx(near, rel=0.1)
    assert found != near
    projector = load_file(folder / "model/projector.safetensors")
    assert {t.dtype for t in projector.values()} == {torch.float32}
    assert json.loads((folder / "model/base.json").read_text())["trained_over"] == held
    report = merge(folder / "model", tmp_path / "merged")
    assert not report.verification.problems
    merged = load(tmp_path / "merged").model.language_model.state_dict()
    full = load(base).model.language_model.state_dict()
    adapter = load_file(folder / "model/adapter_model.safetensors")
    changed = 0
    for name, weight in full.items():
        parts = [adapter.get(f"base_model.model.{name.removesuffix('.weight')}.lora_{x}.weight") for x in "AB"]
        if parts[0] is not None:
            weight = weight + 16 / 4 * parts[1] @ parts[0]
            changed += 1
        torch.testing.assert_close(merged[name], weight, rtol=0, atol=1e-5)
    assert changed == 14


@pytest.mark.parametrize("held", ["nf4", "int8"])
def test_a_quantised_run_goes_on_bit_for_bit(recipe_file, held):
    path = recipe_file()
    common = [
        f"train.lora={{r: 4, dropout: 0.2, quantise: {held}}}", "train.save_every=2", "train.keep_checkpoints=9",
        "data.validation=held-out.json", "train.validate_every=2", "train.optimizer=adamw_8bit",
    ]  # fmt: skip
    whole, _ = train(path, "out=whole", *common)
    branch, said = train(path, "out=branch", *common, resume=str(whole / "checkpoints/step-000002"))
    assert "going on after step 2" in said
    assert losses(branch) == losses(whole)[2:]
    for file in ("adapter_model.safetensors", "projector.safetensors"):
        a, b = load_file(whole / "model" / file), load_file(branch / "model" / file)
        assert all(torch.equal(a[key], b[key]) for key in a)


def test_adapters_reach_the_encoder_only_when_asked(recipe_file, base):
    path = recipe_file()
    lora = ["train.max_steps=2", "train.learning_rate=0.01"]
    without, _ = train(path, "out=without", *lora, "train.lora={r: 4, dropout: 0.0}")
    names = load_file(without / "model/adapter_model.safetensors")
    assert names
    assert not any("vision" in name for name in names)
    folder, said = train(path, "out=with", *lora, "train.lora={r: 4, dropout: 0.0, vision: true}")
    assert "adapters merged, model/ holds the whole model: the vision encoder was trained" in said
    before, after = (load(where).model.vision_encoder.state_dict() for where in (base, folder))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    # Two layers of three are run: four matrices of attention and two of the rest in each.
    assert len(moved) == 12
    assert all("layers.2." not in name and name.endswith("weight") for name in moved)


def test_what_can_not_be_had_is_refused_before_the_run(recipe_file, base, tmp_path, monkeypatch):
    path = recipe_file()
    with pytest.raises(RecipeError, match=r"quantise: nf4, bias: all"):
        load_recipe(path, ["train.lora={quantise: nf4, bias: all}"])
    for more in ("train.freeze=full", "train.lora.vision=true"):
        with pytest.raises(RecipeError, match=r"quantise: int8: the vision encoder trains too"):
            train(path, "train.lora={quantise: int8}", more)
    quantise(base, tmp_path / "small", 4)
    with pytest.raises(RunError, match=r"start from the model that it was made from, with train.lora.quantise: nf4"):
        train(path, f"model={tmp_path / 'small'}", "train.lora={r: 2}")
    (stage,) = load_recipe(path, ["train.lora={quantise: nf4}"]).recipe.stages
    with pytest.raises(RunError, match=r"run.engine: fsdp can't split"):
        check_weights(stage, "fsdp", CPU)
    with pytest.raises(RunError, match="is for cpu and cuda, not for hpu"):
        check_weights(stage, "ddp", torch.device("hpu"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RunError, match=r"pip install 'lapilli\[quantise\]'"):
        check_weights(stage, "single", CPU)
    assert not (tmp_path / "run").exists()


def test_train_types_are_other_names():
    assert Train(train_type="full").freeze == "full"
    assert Train(train_type="freeze_vision", freeze="freeze_vision").lora is None
    lora = Train(train_type="use_lora")
    assert (lora.freeze, lora.lora and lora.lora.r) == ("freeze_vision", 64)
    assert Train(**lora.model_dump()) == lora
    both = Train.model_validate({"train_type": "use_lora", "lora": {"r": 8}})
    assert both.lora is not None
    assert both.lora.r == 8
    for given, words in (
        ({"train_type": "full", "freeze": "projector"}, "train_type: full contradicts freeze: projector"),
        ({"train_type": "freeze_vision", "lora": {}}, "train_type: freeze_vision contradicts lora; say use_lora"),
        ({"train_type": "use_lora", "freeze": "full"}, "train_type: use_lora contradicts freeze: full"),
    ):
        with pytest.raises(ValueError, match=words):
            Train.model_validate(given)


def test_a_wrong_train_type_names_the_nearest(recipe_file):
    with pytest.raises(LapilliError, match=r"train_type.*use_lora"):
        load_recipe(recipe_file(), ["train.train_type=lora"])
