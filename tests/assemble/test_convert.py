"""Conversion there and back: every bit, every setting, and nothing but whole folders."""

import json
import os
import shutil
import signal
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tests.support.llava import REFERENCE, VISION, edit_config, restore, tensors_of
from tests.support.tiny import build_tiny
from transformers import LlamaConfig, LlamaForCausalLM

import lapilli
from lapilli.assemble.convert import convert
from lapilli.assemble.kept import CONVERSION, TOKENIZER_FILES
from lapilli.base.errors import ModelError, RecipeError, RunError
from lapilli.train.reading import read_description

V15 = "tiny-llava-v1.5"
BOTH_HOLD = (V15, "tiny-llava-v1.6-anyres", "tiny-llava-gqa")
OURS_ALONE = {"tiny-llava-mlp3x-cls": "mlp3x_gelu", "tiny-llava-v1-im-start-end": "linear"}


def _go(src, dst, to, **options):
    return convert(src, dst, to, **({"verify": "none", "template": "vicuna_v1"} | options))


def _weights(folder):
    made = {}
    for file in folder.glob("*.safetensors"):
        made |= load_file(file)
    return made


def _same(first, second):
    return first.keys() == second.keys() and all(
        first[name].dtype == second[name].dtype and torch.equal(first[name], second[name]) for name in first
    )


def _fields(folder):
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize(
    "name", [BOTH_HOLD[1], *(pytest.param(n, marks=pytest.mark.slow) for n in (*BOTH_HOLD[::2], *OURS_ALONE))]
)
def test_there_and_back_is_every_bit(name, tmp_path):
    source = restore(name, tmp_path)
    between = "lapilli" if name in OURS_ALONE else "hf"
    _go(source, tmp_path / "there", between)
    moved = shutil.copytree(tmp_path / "there", tmp_path / "else" / "where")
    shutil.rmtree(tmp_path / "there")
    shutil.rmtree(tmp_path / "vision-tower")
    back = tmp_path / "back"
    made = _go(moved, back, "llava")
    assert made.conversion.dropped_rows == (1 if between == "hf" else 0)
    assert _same(_weights(back), tensors_of(name))
    assert _fields(back) == _fields(source) | {"mm_vision_tower": "vision_tower"}
    tower = torch.load(REFERENCE / "checkpoints" / "vision-tower" / "pytorch_model.bin", weights_only=True)
    assert _same(_weights(back / "vision_tower"), tower)
    for file in (*TOKENIZER_FILES, "generation_config.json"):
        assert (back / file).exists() == (source / file).exists()
        assert not (back / file).exists() or (back / file).read_bytes() == (source / file).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(("name", "projector"), OURS_ALONE.items())
def test_what_transformers_can_t_hold_is_refused_by_name(name, projector, tmp_path):
    source = restore(name, tmp_path)
    with pytest.raises(ModelError, match=rf"two-layer projector, not {projector}\. Our own type can: --to lapilli"):
        _go(source, tmp_path / "out", "hf")
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def v15(tmp_path_factory):
    root = tmp_path_factory.mktemp("v15")
    source = restore(V15, root)
    return source, _go(source, root / "hf", "hf", verify="sample")


def test_the_proof_stands_beside_it(v15):
    source, made = v15
    written = json.loads((made.folder / CONVERSION).read_text())
    assert (written["source"], written["target"], written["added_rows"]) == ("llava", "hf", 1)
    assert written["verification"]["logits_difference"] == 0
    entry = next(e for e in written["tensors"] if e["source"] == "model.mm_projector.2.weight")
    assert (entry["target"], entry["target_file"]) == ("multi_modal_projector.linear_2.weight", "model.safetensors")
    assert len(entry["sha256"]) == 64
    sources = {e["source"] for e in written["tensors"]}
    assert sources == {n.removeprefix(VISION) for n in tensors_of(V15)}
    for file in ("conversion.json", "lapilli.json", "config.json", "processor_config.json"):
        assert str(source.parent) not in (made.folder / file).read_text()


def test_the_added_row_never_wins(v15):
    _, made = v15
    weights = _weights(made.folder)
    for name in ("language_model.lm_head.weight", "language_model.model.embed_tokens.weight"):
        table = weights[name]
        assert table.shape[0] == 2001
        assert torch.allclose(table[-1], table[:-1].mean(0), atol=1e-6)
    logits = torch.randn(50, 64) @ weights["language_model.lm_head.weight"].T
    assert (logits.argmax(-1) < 2000).all()
    assert json.loads((made.folder / "generation_config.json").read_text())["suppress_tokens"] == [2000]


@pytest.mark.slow
def test_built_models_keep_their_rows(tmp_path):
    source = build_tiny(tmp_path / "hf", image_mode="anyres")
    _go(source, tmp_path / "llava", "llava", template=None)
    _go(tmp_path / "llava", tmp_path / "back", "hf", template=None)
    fields = _fields(tmp_path / "llava")
    assert (fields["vocab_size"], fields["mm_vision_tower"]) == (2001, "vision_tower")
    assert (fields["mm_patch_merge_type"], fields["image_aspect_ratio"]) == ("spatial_unpad", "anyres")
    assert _same(_weights(tmp_path / "back"), _weights(source))
    assert _fields(tmp_path / "back") == _fields(source)


@pytest.mark.slow
def test_a_template_goes_along(tmp_path):
    source = build_tiny(tmp_path / "own", template="llava_llama_2", projector="linear", keep_vocabulary=True)
    _go(source, tmp_path / "llava", "llava", template=None)
    assert lapilli.load(tmp_path / "llava").template == lapilli.load(source).template
    spec, tokenizer = read_description(str(tmp_path / "llava"))
    assert spec.template == lapilli.load(source).template
    assert spec.image_token in tokenizer.get_vocab()


@pytest.mark.slow
def test_an_encoder_on_the_hub_stays_there(tmp_path, monkeypatch, caplog):
    """A name that is no folder beside the checkpoint; from here it happens to lead to one."""
    monkeypatch.chdir(tmp_path)
    source = restore(V15, tmp_path)
    (tmp_path / "openai").mkdir()
    (tmp_path / "vision-tower").rename(tmp_path / "openai" / "clip")
    edit_config(source, mm_vision_tower="openai/clip")
    own = {n: t for n, t in tensors_of(V15).items() if not n.startswith(VISION)}
    save_file(own, source / "model.safetensors")
    _go(source, tmp_path / "hf", "hf")
    _go(tmp_path / "hf", tmp_path / "back", "llava")
    assert _fields(tmp_path / "back") == _fields(source)
    assert not (tmp_path / "back" / "vision_tower").exists()
    assert _same(_weights(tmp_path / "back"), own)

    weights = _weights(tmp_path / "hf")
    trained = {n: t * 1.5 if n.startswith("vision_tower.") else t for n, t in weights.items()}
    save_file(trained, tmp_path / "hf" / "model.safetensors", metadata={"format": "pt"})
    made = _go(tmp_path / "hf", tmp_path / "other", "llava")
    assert "no longer the one" in made.conversion.notes[0]
    assert _fields(tmp_path / "other")["mm_vision_tower"] == "vision_tower"
    name = "vision_model.embeddings.class_embedding"
    assert torch.equal(_weights(tmp_path / "other" / "vision_tower")[name], tensors_of(V15)[VISION + name] * 1.5)


@pytest.mark.slow
def test_an_edited_folder_is_meant(v15, tmp_path, caplog):
    edited = shutil.copytree(v15[1].folder, tmp_path / "hf")
    fields = _fields(edited)
    fields["text_config"]["rope_parameters"]["rope_theta"] = 5000.0
    (edited / "config.json").write_text(json.dumps(fields))
    _go(edited, tmp_path / "back", "llava", template=None)
    assert "was changed after the conversion" in caplog.text
    assert _fields(tmp_path / "back")["rope_theta"] == 5000.0


@pytest.mark.slow
def test_shards_and_dtype(v15, tmp_path):
    made = _go(v15[0], tmp_path / "hf", "hf", dtype="bfloat16", shard_size="300KB", verify="sample")
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    assert {t.dtype for t in _weights(tmp_path / "hf").values()} == {torch.bfloat16}
    assert _fields(tmp_path / "hf")["dtype"] == "bfloat16"
    assert made.verification.cast
    _go(tmp_path / "hf", tmp_path / "back", "llava")
    assert _fields(tmp_path / "back")["torch_dtype"] == "bfloat16"


@pytest.mark.slow
def test_numbers_that_would_become_infinite_are_refused(v15, tmp_path):
    source = shutil.copytree(v15[0], tmp_path / "large")
    shutil.copytree(v15[0].parent / "vision-tower", tmp_path / "vision-tower")
    tensors = tensors_of(V15)
    tensors["model.norm.weight"][3] = 1e6
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(ModelError, match=r"too large.*language\.model\.norm\.weight"):
        _go(source, tmp_path / "out", "hf", dtype="float16", verify="sample")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"to": "hff"}, RecipeError, r'unknown --to "hff" \(did you mean "hf"'),
        ({"dtype": "fp16"}, RecipeError, 'unknown --dtype "fp16"'),
        ({"verify": "all"}, RecipeError, 'unknown --verify "all"'),
        ({"shard_size": "large"}, ModelError, '"large" is no size'),
        ({"base": "x"}, ModelError, "takes no base"),
        ({"src": "nowhere"}, ModelError, "nowhere: no such folder"),
    ],
)
def test_refused(options, error, message, v15, tmp_path):
    chosen = {"src": v15[0], "dst": tmp_path / "out", "to": "hf"} | options
    with pytest.raises(error, match=message):
        _go(**chosen)
    assert not list(tmp_path.iterdir())


def test_a_destination_that_exists_is_left_alone(v15, tmp_path):
    (tmp_path / "mine").write_text("precious")
    with pytest.raises(RunError, match="exists already"):
        _go(v15[0], tmp_path, "hf")
    assert (tmp_path / "mine").read_text() == "precious"


def test_a_disk_without_room(v15, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: shutil._ntuple_diskusage(10**9, 10**9, 10**6))
    with pytest.raises(RunError, match=r"needs 0\.1 GB and the disk has 0\.0 GB free"):
        _go(v15[0], tmp_path / "out", "hf")
    assert not list(tmp_path.iterdir())


def _killed(step, *arguments, **options):
    """Convert in a process that is killed, without a chance to clean up, when it says that it begins `step`."""

    def say(line):
        if line.startswith(step):
            os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        _go(*arguments, say=say, **options)
        os._exit(0)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("step", ["comparing every tensor", pytest.param("writing", marks=pytest.mark.slow)])
def test_killed_and_run_again(step, v15, tmp_path):
    out = tmp_path / "out"
    _killed(step, v15[0], out, "hf", verify="sample")
    assert not out.exists()
    assert len(list(tmp_path.iterdir())) == 1
    _go(v15[0], out, "hf")
    assert list(tmp_path.iterdir()) == [out]
    assert _same(_weights(out), _weights(v15[1].folder))


def test_an_interrupt_leaves_nothing(v15, tmp_path):
    def say(line):
        if line.startswith("comparing"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _go(v15[0], tmp_path / "out", "hf", verify="sample", say=say)
    assert not list(tmp_path.iterdir())


@st.composite
def _checkpoints(draw):
    """Small LLaVA checkpoints: config.json and tensors."""
    heads = draw(st.sampled_from([2, 4]))
    grouped = draw(st.sampled_from([n for n in (1, 2, 4) if heads % n == 0]))
    width = heads * draw(st.sampled_from([8, 16]))
    mode = draw(st.sampled_from(["square", "pad", "anyres"]))
    depth = draw(st.integers(0, 3))
    fields = {
        "hidden_size": width,
        "intermediate_size": draw(st.sampled_from([24, 40])),
        "num_hidden_layers": draw(st.integers(1, 3)),
        "num_attention_heads": heads,
        "num_key_value_heads": grouped,
        "vocab_size": 2000 + draw(st.sampled_from([0, 0, 1, 64])),
        "tie_word_embeddings": draw(st.booleans()),
        "rope_theta": draw(st.sampled_from([10000.0, 5e5])),
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    dtype = draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
    model = LlamaForCausalLM(LlamaConfig(**fields))
    shapes = {n: p.shape for n, p in model.named_parameters()}
    layers = [32, *[width] * max(depth, 1)]
    for i, (a, b) in enumerate(pairwise(layers)):
        head = f"model.mm_projector.{2 * i}." if depth else "model.mm_projector."
        shapes |= {head + "weight": (b, a), head + "bias": (b,)}
    if mode == "anyres":
        shapes["model.image_newline"] = (width,)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 9)))
    tensors = {n: torch.randn(s, generator=generator).mul(0.1).to(dtype) for n, s in shapes.items()}
    fields |= {
        "model_type": draw(st.sampled_from(["llava", "llava_llama"])),
        "mm_vision_tower": "../vision-tower",
        "mm_projector_type": f"mlp{depth}x_gelu" if depth else "linear",
        "mm_vision_select_layer": draw(st.sampled_from([-2, -1, 1])),
        "mm_vision_select_feature": "patch" if mode == "anyres" else draw(st.sampled_from(["patch", "cls_patch"])),
        "mm_patch_merge_type": "spatial_unpad" if mode == "anyres" else "flat",
        "image_aspect_ratio": mode,
        "image_grid_pinpoints": [[56, 112], [112, 56]] if mode == "anyres" else None,
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "tokenizer_model_max_length": draw(st.sampled_from([512, 4096])),
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    return fields, tensors


@settings(max_examples=2, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(checkpoint=_checkpoints())
def test_random_checkpoints_there_and_back(checkpoint, tmp_path_factory):
    _round_trip(*checkpoint, tmp_path_factory.mktemp("random"))


@pytest.mark.slow
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(checkpoint=_checkpoints())
def test_many_random_checkpoints_there_and_back(checkpoint, tmp_path_factory):
    _round_trip(*checkpoint, tmp_path_factory.mktemp("random"))


def _round_trip(fields, tensors, root: Path):
    source = restore(V15, root)
    (source / "config.json").write_text(json.dumps(fields))
    save_file(tensors, source / "model.safetensors")
    to = "hf" if fields["mm_projector_type"] == "mlp2x_gelu" else "lapilli"
    made = _go(source, root / "there", to)
    assert made.conversion.added_rows == (1 if to == "hf" and fields["vocab_size"] == 2000 else 0)
    _go(root / "there", root / "back", "llava")
    assert _same(_weights(root / "back"), tensors)
    assert _fields(root / "back") == fields | {"mm_vision_tower": "vision_tower"}


@pytest.mark.slow
@pytest.mark.parametrize(("to", "form"), [("cerebras", "mdl"), ("cerebras-2.3", "tensors"), ("cerebras-2.4", "tree")])
def test_through_cerebras_and_back(to, form, tmp_path):
    source = restore(V15, tmp_path)
    _go(source, tmp_path / "there", to, cerebras_form=form, template="llava_v1")
    assert lapilli.load(tmp_path / "there").template.name == "llava_v1"
    _go(tmp_path / "there", tmp_path / "back", "llava", template=None)
    assert _same(_weights(tmp_path / "back"), tensors_of(V15))
    assert _fields(tmp_path / "back") == _fields(source) | {"mm_vision_tower": "vision_tower"}


@pytest.mark.slow
def test_from_transformers_through_cerebras_and_back(v15, tmp_path):
    source = v15[1].folder
    _go(source, tmp_path / "there", "cerebras", verify="sample")
    _go(tmp_path / "there", tmp_path / "back", "hf", template=None)
    assert _same(_weights(tmp_path / "back"), _weights(source))
    assert _fields(tmp_path / "back") == _fields(source)
