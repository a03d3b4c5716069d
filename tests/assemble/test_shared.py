"""Models over one another's tensors: the numbers of each alone, and the memory of one."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.support.adapters import make_adapter
from tests.support.llava import REFERENCE, restore_piece
from tests.support.parts import make_language, make_vision
from tests.support.tiny import build_tiny

from lapilli.assemble.build import BuildOptions, build
from lapilli.assemble.load import load
from lapilli.assemble.shared import Holding, held_by, load_several
from lapilli.base.errors import ModelError
from lapilli.model.adapter import Beside

CPU = Holding(torch.device("cpu"), torch.float32)
IDS = torch.tensor([[1, 5, 7, 9, 22, 33, 41]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("shared")
    build_tiny(made / "base", dtype="float32")
    make_adapter(made / "base", made / "med", 1)
    make_adapter(made / "base", made / "ko", 2, r=8, alpha=4, target_modules=["q_proj", "down_proj"])
    return made


def pixels(model):
    return torch.rand(1, 3, *[model.config.vision_config.image_size] * 2, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def numbers(loaded):
    """Logits of a text, and features of a picture."""
    model = loaded.model
    seen = model.encode_images(pixels(model), torch.tensor([1]), torch.tensor([[9, 9]]))
    return model(input_ids=IDS).logits, seen


def assert_as_alone(loaded, alone, tolerance=1e-5):
    for got, wanted in zip(numbers(loaded), numbers(alone), strict=True):
        assert (got - wanted).abs().max() < tolerance * max(1.0, float(wanted.abs().max()))


def places(loaded, part):
    return {p.data_ptr() for p in getattr(loaded.model, part).parameters()}


def beside(loaded):
    return sum(isinstance(m, Beside) for m in loaded.model.modules())


def test_each_gives_its_own_numbers_over_one_copy(folder, caplog):
    paths = {"med": folder / "med", "base": folder / "base", "ko": folder / "ko"}
    with caplog.at_level("INFO"):
        together = load_several(paths, CPU)
    assert list(together) == list(paths)
    alone = {name: load(path) for name, path in paths.items()}
    for name in paths:
        assert_as_alone(together[name], alone[name])
    assert not torch.allclose(numbers(together["med"])[0], numbers(together["base"])[0], atol=1e-2)
    # Every weight of the base is held once; what an adapter adds is its factors and its projector, nothing else.
    base = places(together["base"], "language_model")
    for name, layers in (("med", 14), ("ko", 4)):
        assert base < places(together[name], "language_model")
        assert places(together["base"], "vision_encoder") == places(together[name], "vision_encoder")
        own = sum(
            b for place, b in held_by(together[name].model).items() if place not in held_by(together["base"].model)
        )
        files = [load_file(paths[name] / f) for f in ("adapter_model.safetensors", "projector.safetensors")]
        assert own == sum(t.numel() * 4 for file in files for t in file.values())
        assert beside(together[name]) == layers
    assert "med, base, ko share weights" in caplog.text


def test_answering_leaves_shared_tensors_as_they_are(folder):
    together = load_several({"base": folder / "base", "med": folder / "med"}, CPU)
    shared = {n: (p.data_ptr(), p.clone()) for n, p in together["base"].model.named_parameters()}
    numbers(together["med"])
    together["med"].model.generate(input_ids=IDS, max_new_tokens=3)
    together["med"].model.to(torch.float64)  # even one that is converted leaves the others alone
    for name, parameter in together["base"].model.named_parameters():
        assert parameter.data_ptr() == shared[name][0]
        assert torch.equal(parameter, shared[name][1])
    assert_as_alone(together["base"], load(folder / "base"))


def test_what_has_no_common_weights_is_loaded_alone(folder, tmp_path, caplog):
    """A model trained in full has the shapes of its base, and none of its weights."""
    full = shutil.copytree(folder / "base", tmp_path / "full")
    weights = load_file(full / "model.safetensors")
    save_file({k: v + 0.01 for k, v in weights.items()}, full / "model.safetensors", {"format": "pt"})
    other = build_tiny(tmp_path / "other", projector="linear", dtype="float32")
    make_adapter(other, tmp_path / "of-other")
    paths = {
        "med": folder / "med",
        "full": full,
        "theirs": tmp_path / "of-other",
        "ko": folder / "ko",
        "other": other,
    }
    with caplog.at_level("INFO"):
        together = load_several(paths, CPU)
    for name, path in paths.items():
        assert_as_alone(together[name], load(path))
    lines = [r.message for r in caplog.records if r.name == "lapilli.assemble.shared"]
    assert [line.split(" share")[0] for line in lines] == ["med, ko", "theirs, other", "full"]
    assert "no other model here has its weights in the same files" in lines[2]
    assert not places(together["full"], "language_model") & places(together["med"], "language_model")


def test_a_wrong_base_is_refused_by_name(folder, tmp_path):
    other = build_tiny(tmp_path / "other", dtype="float32", seed=5)
    adapter = shutil.copytree(folder / "med", tmp_path / "moved")
    note = json.loads((adapter / "base.json").read_text())
    (adapter / "base.json").write_text(json.dumps(note | {"base": str(other)}))
    with pytest.raises(ModelError, match=r"moved: the adapter was trained on another model than .*other"):
        load_several({"ko": folder / "ko", "moved": adapter}, CPU)
    together = load_several({"base": folder / "base", "moved": adapter}, CPU, base=folder / "base")
    assert_as_alone(together["moved"], load(folder / "med"))
    with pytest.raises(ModelError, match="whole models, which take no base"):
        load_several({"base": folder / "base", "other": other}, CPU, base=folder / "base")


@pytest.mark.parametrize(
    "language", ["qwen2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("mpt", "gpt_neox"))]
)
def test_tied_tables_biases_and_other_architectures(tmp_path, language):
    """qwen2 has tied tables and biases, gpt_neox one layer for queries, keys and values."""
    language_model, vision = make_language(language, tmp_path / "l"), make_vision("siglip", tmp_path / "v")
    build(BuildOptions(language_model=str(language_model), vision_encoder=str(vision)), tmp_path / "base")
    make_adapter(tmp_path / "base", tmp_path / "one", 1, bias="all")
    make_adapter(tmp_path / "base", tmp_path / "two", 2)
    paths = {name: tmp_path / name for name in ("one", "two", "base")}
    together = load_several(paths, CPU)
    for name, path in paths.items():
        assert_as_alone(together[name], load(path))
        assert bool(beside(together[name])) == (name != "base")
    tied = together["one"].model
    same = tied.get_input_embeddings().weight.data_ptr() == tied.get_output_embeddings().weight.data_ptr()
    assert same == (language in ("qwen2", "mpt"))


def test_code_that_goes_past_a_layer_gets_merged_weights(folder, monkeypatch, caplog):
    """It would miss an adapter beside the weight."""
    from transformers.models.llama.modeling_llama import LlamaMLP

    def forward(self, x):
        gate = torch.nn.functional.silu(x @ self.gate_proj.weight.T)
        return self.down_proj(gate * self.up_proj(x))

    monkeypatch.setattr(LlamaMLP, "forward", forward)
    paths = {"med": folder / "med", "ko": folder / "ko", "base": folder / "base"}
    with caplog.at_level("INFO"):
        together = load_several(paths, CPU)
    for name, path in paths.items():
        assert_as_alone(together[name], load(path))
    assert [beside(together[name]) for name in paths] == [0, 4, 0]  # ko has no adapter there
    assert "ko, base share" in caplog.text
    assert "med shares no weights (its adapters had to be merged: 'Beside' object has no attribute" in caplog.text


def test_an_adapter_over_an_adapter(folder, tmp_path):
    make_adapter(folder / "base", tmp_path / "first", 3)
    shutil.copytree(folder / "med", tmp_path / "second")
    note = {"base": str(tmp_path / "first")}
    (tmp_path / "second" / "base.json").write_text(json.dumps(note))
    paths = {"second": tmp_path / "second", "base": folder / "base"}
    together = load_several(paths, CPU)
    assert beside(together["second"]) == 14
    assert_as_alone(together["second"], load(tmp_path / "second"))
    assert_as_alone(together["base"], load(folder / "base"))


@pytest.mark.parametrize("language_alone", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_llavas_adapters(tmp_path, language_alone):
    """A language model alone could not be served itself; two adapters share it all the same."""
    one = restore_piece("tiny-llava-lora", tmp_path)
    two = shutil.copytree(one, tmp_path / "two-lora")
    weights = torch.load(two / "adapter_model.bin", weights_only=True)
    encoder = "base_model.model.model.vision_tower.vision_tower.vision_model.encoder.layers.0.self_attn.q_proj"
    more = {f"{encoder}.lora_A.weight": torch.randn(8, 32), f"{encoder}.lora_B.weight": torch.randn(32, 8)}
    torch.save({k: v * 1.5 for k, v in weights.items()} | more, two / "adapter_model.bin")
    whole = tmp_path / "tiny-llava-v1.5"
    alone = tmp_path / "language"
    shutil.copytree(REFERENCE / "checkpoints" / "llama-base", alone, ignore=shutil.ignore_patterns("*.bin"))
    tensors = {k: v for k, v in load_file(whole / "model.safetensors").items() if "vision" not in k and "mm_" not in k}
    save_file(tensors, alone / "model.safetensors", {"format": "pt"})
    paths = {"one": one, "two": two} | ({} if language_alone else {"base": whole})
    base = alone if language_alone else None
    together = load_several(paths, CPU, base=base, template="vicuna_v1")
    for name, path in paths.items():
        assert_as_alone(together[name], load(path, base, template="vicuna_v1"))
    shared = set.intersection(*(places(one, "language_model") for one in together.values()))
    assert len(shared) == len(tensors)
    assert not places(together["one"], "vision_encoder") & places(together["two"], "vision_encoder")  # it was trained
    assert not torch.allclose(numbers(together["one"])[0], numbers(together["two"])[0], atol=1e-3)


@pytest.mark.parametrize("held", ["nf4", "int8"])
@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
def test_quantised_weights_are_shared(folder, held):
    """As the adapter was trained over a quantised base, not merged before: held once, and its own scales each."""
    pytest.importorskip("bitsandbytes", reason="the extra `quantise` is not installed")
    how = Holding(torch.device("cpu"), torch.float32, held)
    paths = {"base": folder / "base", "med": folder / "med", "ko": folder / "ko"}
    together = load_several(paths, how)
    from lapilli.assemble.qlora import load_quantised

    alone = load_quantised(folder / "base", held, torch.float32, torch.device("cpu"), rest=torch.float32)
    assert_as_alone(together["base"], alone)
    for name in ("med", "ko"):
        assert places(together["base"], "language_model") < places(together[name], "language_model")
        got, full = numbers(together[name])[0], numbers(load(paths[name]))[0]
        assert (got - full).std() < 0.3 * full.std()
    assert_as_alone(together["base"], alone)  # after the others have answered
