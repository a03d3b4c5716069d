"""Deltas: the original's numbers bit for bit, and the wrong base told from the right one."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tests.support.llava import REFERENCE
from typer.testing import CliRunner

from lapilli.base.errors import LapilliError, ModelError, RunError
from lapilli.checkpoint.delta import apply_delta, make_delta
from lapilli.checkpoint.stream import open_folder
from lapilli.cli.delta import app

CHECKPOINTS = REFERENCE / "checkpoints"
TABLES = ("model.embed_tokens.weight", "lm_head.weight")
ROWS = 40
"""Of the base's vocabulary; the trimmed delta and target have these and the three that the base lacks."""


def write(folder: Path, tensors: dict[str, torch.Tensor], **config) -> Path:
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "torch_dtype": "float32"} | config))
    return folder


def read(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor.read() for name, tensor in open_folder(folder).items()}


@pytest.fixture
def original(tmp_path) -> dict[str, Path]:
    """Base, delta and target as the original made them, with one layer of two and few rows of the vocabulary."""
    base = {k: v for k, v in load_file(CHECKPOINTS / "llama-base" / "model.safetensors").items() if ".1." not in k}
    base |= {table: base[table][:ROWS].clone() for table in TABLES}
    made = {"base": write(tmp_path / "base", base)}
    for name in ("delta", "delta-target"):
        made[name] = tmp_path / name
        made[name].mkdir()
        shutil.copyfile(CHECKPOINTS / name / "config.json", made[name] / "config.json")
        torch.save(load_file(CHECKPOINTS / name / "trimmed.safetensors"), made[name] / "pytorch_model.bin")
    return made


def test_make_is_the_originals_bit_for_bit(original, tmp_path):
    report = make_delta(original["base"], original["delta-target"], tmp_path / "made")
    made, wanted = read(tmp_path / "made"), read(original["delta"])
    assert set(made) == set(wanted)
    assert all(torch.equal(made[name], wanted[name]) for name in wanted)
    assert report.grown == dict.fromkeys(TABLES, 3)
    assert sorted(report.whole) == ["model.mm_projector.bias", "model.mm_projector.weight"]
    assert any("no tokenizer" in note for note in report.notes)


def test_apply_is_the_originals_bit_for_bit(original, tmp_path):
    report = apply_delta(original["base"], original["delta"], tmp_path / "made", shard_bytes=30_000)
    assert (tmp_path / "made" / "model.safetensors.index.json").is_file()
    made, delta, base, target = (
        read(folder) for folder in (tmp_path / "made", original["delta"], original["base"], original["delta-target"])
    )
    for name, wanted in delta.items():
        if name in base:
            wanted[: len(base[name])] += base[name]
        assert torch.equal(made[name], wanted)
        assert torch.allclose(made[name].float(), target[name].float(), atol=7e-5)
    assert not report.warning
    assert json.loads((tmp_path / "made" / "config.json").read_text())["torch_dtype"] == "float16"


def test_the_originals_flags_are_taken(original, tmp_path):
    flags = ("--base-model-path", original["base"], "--delta", original["delta"], "--target-model-path")
    made = CliRunner().invoke(app, ["apply", *map(str, flags), str(tmp_path / "one")], catch_exceptions=False)
    assert made.exit_code == 0, made.output
    places = [str(original["base"]), str(original["delta"]), str(tmp_path / "two")]
    assert CliRunner().invoke(app, ["apply", *places]).exit_code == 0
    one, two = (tmp_path / name / "model.safetensors" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
    missing = CliRunner().invoke(app, ["apply", places[0]])
    assert isinstance(missing.exception, LapilliError)
    assert "DELTA is missing" in str(missing.exception)


@settings(max_examples=15, deadline=None)
@given(
    layers=st.integers(1, 3),
    grown=st.integers(0, 5),
    projector=st.integers(1, 3),
    dtype=st.sampled_from(["float16", "bfloat16", "float32"]),
    tied=st.booleans(),
    pickled=st.booleans(),
)
def test_any_model_comes_back_within_rounding(tmp_path_factory, layers, grown, projector, dtype, tied, pickled):
    folder = tmp_path_factory.mktemp("random")
    base, target = random_pair(layers, grown, projector, getattr(torch, dtype), tied)
    base["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    write(folder / "base", base, tie_word_embeddings=tied)
    write(folder / "target", target, tie_word_embeddings=tied)
    if pickled:
        torch.save(base, folder / "base" / "pytorch_model.bin")
        (folder / "base" / "model.safetensors").unlink()
    (folder / "target" / "tokenizer.model").write_bytes(b"pieces")
    make_delta(folder / "base", folder / "target", folder / "delta")
    report = apply_delta(folder / "base", folder / "delta", folder / "back")
    assert "fingerprint" in report.base_checked
    back = read(folder / "back")
    assert set(back) == set(target)
    for name, value in target.items():
        assert back[name].dtype == torch.float16
        assert torch.allclose(back[name].float(), value.float(), rtol=2e-3, atol=2e-4), name
    assert (folder / "back" / "tokenizer.model").read_bytes() == b"pieces"


def random_pair(
    layers: int, grown: int, projector: int, dtype: torch.dtype, tied: bool
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A base, and what a fine-tune with a projector makes of it."""
    shapes = {"model.embed_tokens.weight": (50, 16), "model.norm.weight": (16,)}
    shapes |= {f"model.layers.{i}.mlp.up_proj.weight": (32, 16) for i in range(layers)}
    shapes |= {} if tied else {"lm_head.weight": (50, 16)}
    random = torch.Generator().manual_seed(layers * 100 + grown)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random) * 0.02

    base = {name: draw(*shape) for name, shape in shapes.items()}
    target = {name: value + 0.05 * draw(*value.shape) for name, value in base.items()}
    for table in set(TABLES) & set(target):
        target[table] = torch.cat([target[table], draw(grown, 16)])
    target |= {f"model.mm_projector.{2 * i}.weight": draw(16, 16) for i in range(projector)}
    return ({k: v.to(dtype) for k, v in side.items()} for side in (base, target))  # type: ignore[return-value]


# ---- the wrong base ---------------------------------------------------------------------------------------------


def test_another_base_is_told_by_its_fingerprint(original, tmp_path):
    make_delta(original["base"], original["delta-target"], tmp_path / "ours")
    other = read(original["base"])
    other["model.norm.weight"] = other["model.norm.weight"] * 1.01
    write(tmp_path / "other", other)
    with pytest.raises(ModelError, match=r"not the base that .* 1 of 12 tensors are others \(model.norm.weight\)"):
        apply_delta(tmp_path / "other", tmp_path / "ours", tmp_path / "made")
    assert not (tmp_path / "made").exists()
    # Only the numbers count, not how they are stored.
    write(tmp_path / "wide", {name: value.float() for name, value in read(original["base"]).items()})
    apply_delta(tmp_path / "wide", tmp_path / "ours", tmp_path / "made")


@pytest.mark.parametrize("share", [0.02, 0.3, 1.0])
def test_a_wrong_base_is_told_from_the_right_one_by_statistics(tmp_path, share):
    random = torch.Generator().manual_seed(1)

    def draw() -> dict[str, torch.Tensor]:
        return {f"model.layers.{i}.weight": torch.randn(128, 256, generator=random).mul(0.02).half() for i in range(3)}

    base, wrong, change = draw(), draw(), draw()
    target = {name: (value + share * change[name]).half() for name, value in base.items()}
    for name, tensors in (("base", base), ("wrong", wrong), ("target", target)):
        write(tmp_path / name, tensors)
    make_delta(tmp_path / "base", tmp_path / "target", tmp_path / "delta")
    (tmp_path / "delta" / "delta.json").unlink()  # as the published ones
    warned: list[str] = []
    apply_delta(tmp_path / "base", tmp_path / "delta", tmp_path / "on-base", warn=warned.append)
    assert not warned
    apply_delta(tmp_path / "wrong", tmp_path / "delta", tmp_path / "on-wrong", warn=warned.append)
    # A whole model in the delta's place is no delta either.
    apply_delta(tmp_path / "base", tmp_path / "target", tmp_path / "no-delta", warn=warned.append)
    assert len(warned) == 2
    assert all("probably not the base" in line for line in warned)


def test_what_does_not_fit_is_refused_by_name(original, tmp_path):
    base, delta = read(original["base"]), original["delta"]

    def refused(name: str, tensors: dict[str, torch.Tensor], words: str) -> None:
        with pytest.raises(ModelError, match=words):
            apply_delta(write(tmp_path / name, tensors), delta, tmp_path / "made")
        assert not (tmp_path / "made").exists()

    wide = base | {"model.norm.weight": torch.ones(80)}
    refused("wide", wide, r"model.norm.weight: has shape \(64,\), but in the base .* \(80,\)")
    long = base | {TABLES[0]: torch.zeros(50, 64)}
    refused("long", long, r"embed_tokens.weight: has shape \(43, 64\), but in the base .* \(50, 64\)")
    deep = base | {"model.layers.1.mlp.up_proj.weight": torch.zeros(2, 2)}
    refused("deep", deep, r"1 tensors of the base .* are not there: model.layers.1.mlp.up_proj.weight")
    broken = base | {"model.norm.weight": torch.full((64,), torch.inf)}
    refused("broken", broken, r"model.norm.weight: .* not finite")
    with pytest.raises(RunError, match="exists already"):
        apply_delta(original["base"], delta, original["base"])
    (delta / "delta.json").write_text('{"base": ["no"]}')
    with pytest.raises(ModelError, match=r"delta.json: `base`"):
        apply_delta(original["base"], delta, tmp_path / "made")
