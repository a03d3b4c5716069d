"""OpenCLIP's folders against a small vision transformer written here after its published architecture."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tests.support.parts import make_language
from torch import nn
from torch.nn import functional as F

from lapilli.assemble.build import BuildOptions, build
from lapilli.assemble.load import load
from lapilli.assemble.parts import read_config, read_image_settings, read_vision_encoder
from lapilli.base.errors import ModelError
from lapilli.checkpoint import open_clip

WIDTH, LAYERS, PATCH, EDGE, HEAD = 48, 3, 14, 56, 16


class Block(nn.Module):
    def __init__(self, quick: bool) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn = nn.MultiheadAttention(WIDTH, WIDTH // HEAD, batch_first=True)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(WIDTH, 4 * WIDTH), "c_proj": nn.Linear(4 * WIDTH, WIDTH)})
        self.quick = quick

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed = self.ln_1(x)
        x = x + self.attn(normed, normed, normed, need_weights=False)[0]
        hidden = self.mlp["c_fc"](self.ln_2(x))
        hidden = hidden * torch.sigmoid(1.702 * hidden) if self.quick else F.gelu(hidden)
        return x + self.mlp["c_proj"](hidden)


class Tower(nn.Module):
    """The image side: patches, class token first, positions, a norm before the blocks and one after."""

    def __init__(self, quick: bool) -> None:
        super().__init__()
        self.class_embedding = nn.Parameter(torch.zeros(WIDTH))
        self.positional_embedding = nn.Parameter(torch.zeros((EDGE // PATCH) ** 2 + 1, WIDTH))
        self.proj = nn.Parameter(torch.zeros(WIDTH, 24))
        self.conv1 = nn.Conv2d(3, WIDTH, PATCH, PATCH, bias=False)
        self.ln_pre, self.ln_post = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.transformer = nn.ModuleDict({"resblocks": nn.ModuleList(Block(quick) for _ in range(LAYERS))})

    def forward(self, pixels: torch.Tensor) -> list[torch.Tensor]:
        """Hidden states: before the first block, and after each."""
        patches = self.conv1(pixels).flatten(2).transpose(1, 2)
        first = self.class_embedding.expand(len(pixels), 1, -1)
        states = [self.ln_pre(torch.cat([first, patches], dim=1) + self.positional_embedding)]
        for block in self.transformer["resblocks"]:
            states.append(block(states[-1]))
        return states


def write(
    folder: Path, *, quick: bool = False, pickled: bool = True, preprocess: dict | None = None, **vision
) -> Tower:
    """An OpenCLIP folder: a random dual encoder with its configuration."""
    torch.manual_seed(0)
    tower = Tower(quick)
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.normal_(std=0.3)
    sizes = {"image_size": EDGE, "layers": LAYERS, "width": WIDTH, "head_width": HEAD, "patch_size": PATCH}
    model = {"embed_dim": 24, "vision_cfg": sizes | vision, "text_cfg": {"layers": 1}} | (
        {"quick_gelu": True} if quick else {}
    )
    folder.mkdir(parents=True, exist_ok=True)
    config = {"model_cfg": model, "preprocess_cfg": preprocess or {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]}}
    (folder / open_clip.FILE).write_text(json.dumps(config))
    tensors = {f"visual.{name}": value.detach().clone() for name, value in tower.state_dict().items()}
    tensors |= {"logit_scale": torch.tensor(1.0), "token_embedding.weight": torch.zeros(5, 8)}
    tensors |= {"transformer.resblocks.0.ln_1.weight": torch.zeros(8)}
    if pickled:
        torch.save(tensors, folder / "open_clip_pytorch_model.bin")
    else:
        save_file(tensors, folder / "open_clip_model.safetensors")
    return tower.eval()


@pytest.mark.parametrize(("quick", "pickled"), [(True, True), (False, False)])
def test_every_hidden_state_is_the_towers_own(tmp_path, quick, pickled):
    tower = write(tmp_path / "any", quick=quick, pickled=pickled)
    encoder = read_vision_encoder(str(tmp_path / "any"), "auto")
    pixels = torch.rand(2, 3, EDGE, EDGE, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = tower(pixels)
        out = encoder(pixel_values=pixels, output_hidden_states=True)
        other = read_vision_encoder(str(tmp_path / "any"), torch.float32)
    assert len(out.hidden_states) == len(expected) == LAYERS + 1
    for ours, theirs in zip(out.hidden_states, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out.pooler_output, tower.ln_post(expected[-1][:, 0]), atol=1e-5, rtol=1e-5)
    assert other.dtype == torch.float32


def test_the_activation_matters(tmp_path):
    """The comparison above could not be passed by chance."""
    tower = write(tmp_path / "quick", quick=True)
    file = tmp_path / "quick" / open_clip.FILE
    file.write_text(file.read_text().replace('"quick_gelu": true', '"quick_gelu": false'))
    pixels = torch.rand(1, 3, EDGE, EDGE)
    with torch.no_grad():
        states = read_vision_encoder(str(tmp_path / "quick"), "auto")(pixels, output_hidden_states=True).hidden_states
        assert (states[-1] - tower(pixels)[-1]).abs().max() > 1e-3


def test_a_model_is_built_with_it(tmp_path):
    write(tmp_path / "encoder", quick=True)
    language = make_language("llama", tmp_path / "language")
    report = build(BuildOptions(str(tmp_path / "encoder"), str(language)), tmp_path / "model")
    assert report.stored_because == ""
    made = load(tmp_path / "model")
    assert made.image_spec.mean == (0.5, 0.4, 0.3)
    assert made.image_spec.shortest_edge == EDGE
    assert made.model.config.vision_config.hidden_act == "quick_gelu"
    theirs = read_vision_encoder(str(tmp_path / "encoder"), "auto").state_dict()
    for name, value in made.model.vision_encoder.state_dict().items():
        assert torch.equal(value, theirs[name]), name


def test_pictures_are_treated_as_the_folder_says(tmp_path):
    write(tmp_path / "a", preprocess={"resize_mode": "squash", "interpolation": "bilinear"})
    spec = read_image_settings(str(tmp_path / "a"), read_config(str(tmp_path / "a"), ""), "square", "exact").spec
    assert (spec.size, spec.crop, spec.resample) == ((EDGE, EDGE), None, 2)
    assert spec.mean == pytest.approx((0.481, 0.458, 0.408), abs=1e-3)
    write(tmp_path / "b", preprocess={"resize_mode": "longest"})
    assert read_image_settings(str(tmp_path / "b"), read_config(str(tmp_path / "b"), ""), "pad", "exact").spec.crop
    with pytest.raises(ModelError, match=r"resize_mode 'longest'.*--image-mode pad"):
        read_image_settings(str(tmp_path / "b"), read_config(str(tmp_path / "b"), ""), "square", "exact")


@pytest.mark.parametrize(
    ("vision", "message"),
    [
        ({"layers": [3, 4, 6, 3]}, r"vision_cfg.layers is \[3, 4, 6, 3\].*not ResNets"),
        ({"timm_model_name": "convnext_base"}, "vision_cfg.timm_model_name"),
        ({"ls_init_value": 0.1}, "vision_cfg.ls_init_value"),
        ({"attentional_pool": True}, "vision_cfg.attentional_pool"),
        ({"no_ln_pre": True}, "vision_cfg.no_ln_pre"),
        ({"image_size": [56, 70]}, r"vision_cfg.image_size is \[56, 70\]"),
        ({"head_width": 17}, "no multiple of head_width 17"),
        ({"act_kwargs": {"inplace": True}}, "vision_cfg.act_kwargs.inplace"),
    ],
)
def test_other_architectures_are_refused_by_setting(tmp_path, vision, message):
    write(tmp_path, **vision)
    with pytest.raises(ModelError, match=message):
        read_config(str(tmp_path), "vision encoder")


def test_tensors_are_accounted_for(tmp_path):
    write(tmp_path, pickled=False)
    file = tmp_path / "open_clip_model.safetensors"
    tensors = {name: tensor.read() for name, tensor in open_clip.open_file(file).items()}
    lost = dict(tensors)
    del lost["visual.transformer.resblocks.1.attn.in_proj_bias"]
    save_file(lost, file)
    with pytest.raises(ModelError, match=r"3 tensors .*missing.*layers.1.self_attn.k_proj.bias"):
        read_vision_encoder(str(tmp_path), "auto")
    save_file(tensors | {"visual.transformer.resblocks.0.ls_1.gamma": torch.ones(2)}, file)
    with pytest.raises(ModelError, match=r"visual.transformer.resblocks.0.ls_1.gamma"):
        read_vision_encoder(str(tmp_path), "auto")
    file.unlink()
    with pytest.raises(ModelError, match="no weights"):
        read_vision_encoder(str(tmp_path), "auto")


def test_a_folder_with_both_layouts_is_transformers_own(tmp_path):
    write(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip_vision_model"}))
    assert open_clip.is_open_clip(tmp_path), "no weights of transformers beside it"
    (tmp_path / "model.safetensors").touch()
    assert not open_clip.is_open_clip(tmp_path)
