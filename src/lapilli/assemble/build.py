"""`build`: a vision encoder and a language model become one model folder.

Replaces the hand edits that joining two models used to take. Everything that could go wrong later is settled here:
parts are probed, the image token gets its row, the class that can hold the model is found by trying it, and one
forward pass proves that a picture has as many places in the text as it has features.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import PIL.Image
import torch
from transformers import AutoModel, AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerBase

from lapilli.assemble import parts, projector
from lapilli.assemble.folder import FolderSpec, joined_fields
from lapilli.assemble.save import hf_image_processor, save
from lapilli.assemble.vocabulary import Vocabulary, add_tokens, make_room
from lapilli.base.errors import ModelError
from lapilli.base.layout import ImageLayout, ImageMode
from lapilli.base.version import VERSION
from lapilli.checkpoint import hf
from lapilli.data.image import ImageSpec, normalise, to_tiles
from lapilli.data.template import Template, get_template
from lapilli.data.tokenizer import load_tokenizer
from lapilli.model.config import LapilliConfig
from lapilli.model.language import LanguageTraits, probe_language
from lapilli.model.projector import build_projector, check_projector
from lapilli.model.quiet import quiet
from lapilli.model.vision import VisionGeometry, probe_vision, resolve_layers, vision_part
from lapilli.model.vlm import VisionLanguageModel

ANYRES_PINPOINTS = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
"""LLaVA-1.6's canvases, in tiles (columns, rows)."""

FULL_PROOF_PARAMETERS = 1_000_000_000
"""Up to this size the proof runs the whole model; above, the vision side and the joining only."""


@dataclass(frozen=True)
class BuildOptions:
    """What `lapilli build` asks for; defaults are LLaVA-1.5's."""

    vision_encoder: str
    language_model: str
    projector: str = "mlp2x_gelu"
    template: str = "vicuna_v1"
    image_mode: ImageMode = "pad"
    image_backend: Literal["exact", "fast"] = "exact"
    feature_layers: tuple[int, ...] = (-2,)
    feature_select: Literal["patch", "cls_patch"] = "patch"
    im_start_end: bool = False
    image_token: str = "<image>"
    projector_weights: str | None = None
    keep_vocabulary: bool = False
    dtype: str = "auto"
    """`auto` keeps each part's own; a new projector is float32."""
    seed: int = 0
    """Of the random projector."""


@dataclass(frozen=True)
class BuildReport:
    """What was built, or with a dry run would be."""

    parameters: dict[str, int]
    tokens_per_image: str
    packing: LanguageTraits
    stored_because: str
    """Why transformers' class can't hold the model; empty if it can."""
    image_token_id: int
    notes: list[str] = field(default_factory=list)
    proof: str = ""


@dataclass(frozen=True)
class _Plan:
    options: BuildOptions
    template: Template
    tokenizer: PreTrainedTokenizerBase
    vocabulary: Vocabulary
    image: ImageSpec
    geometry: VisionGeometry
    traits: LanguageTraits
    layout: ImageLayout
    vision_config: Any
    text_config: Any
    notes: list[str]

    @property
    def image_row(self) -> bool:
        """Whether the image token will have an embedding row."""
        rows = self.text_config.get_text_config().vocab_size
        return not self.options.keep_vocabulary or self.vocabulary.image_token_id < rows

    def config(self, text_config: Any = None) -> LapilliConfig:
        return LapilliConfig(
            vision_config=self.vision_config,
            text_config=text_config or self.text_config,
            projector=self.options.projector,
            feature_layers=self.options.feature_layers,
            feature_select=self.options.feature_select,
            prefix_tokens=self.geometry.prefix_tokens,
            flat_patches=self.geometry.flat_patches,
            layout=self.layout.model_dump(mode="json"),
            image_token_id=self.vocabulary.image_token_id,
            image_newline=self.layout.mode == "anyres",
            image_row=self.image_row,
            packing=self.traits.packing,
            head=self.traits.head,
        )


def build(options: BuildOptions, out: Path | str, say: Callable[[str], None] = lambda _line: None) -> BuildReport:
    """Build a model folder at `out` and return what was built. Raises ModelError for parts that can't be joined."""
    out = Path(out)
    if out.exists():
        raise ModelError(f"{out}: exists already; choose another --out or remove it")
    plan = _plan(options)
    say("reading weights")
    with quiet():
        model, notes = _join(plan)
        why_not = where_it_fits(model.config, plan.image)
        say("proving that features fill their places")
        proof = _prove(model, plan)
        spec = FolderSpec(
            written_by=f"lapilli {VERSION}",
            stored_as="lapilli" if why_not else "transformers",
            stored_because=why_not,
            template=plan.template,
            image=plan.image,
            image_token=options.image_token,
            im_start_end=options.im_start_end,
            joined=joined_fields(model.config),
        )
        plan.tokenizer.chat_template = spec.chat_template()
        say(f"writing {out}")
        save(model, plan.tokenizer, spec, out)
    return _report(plan, {k: _count(getattr(model, k)) for k in _PARTS}, why_not, [*plan.notes, *notes], proof)


def dry_run(options: BuildOptions) -> BuildReport:
    """Say what `build` would make, without reading any weights."""
    plan = _plan(options)
    with quiet():
        config = plan.config()
        why_not = where_it_fits(config, plan.image)
        width = plan.text_config.get_text_config().hidden_size
        with torch.device("meta"):
            projector = build_projector(options.projector, config.vision_hidden_size, width)
        counts = {
            "vision_encoder": parts.count_parameters(plan.vision_config, AutoModel),
            "projector": _count(projector),
            "language_model": parts.count_parameters(_grown(plan), AutoModelForCausalLM),
        }
    return _report(plan, counts, why_not, plan.notes, "")


def _grown(plan: _Plan) -> Any:
    """The language model's configuration with the rows that `make_room` would add."""
    text = copy.deepcopy(plan.text_config)
    inner = text.get_text_config()
    if not plan.options.keep_vocabulary:
        inner.vocab_size = max(inner.vocab_size, plan.vocabulary.size)
    return text


_PARTS = ("vision_encoder", "projector", "language_model")


def _count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _report(plan: _Plan, counts: dict[str, int], why_not: str, notes: list[str], proof: str) -> BuildReport:
    layout = plan.layout
    if layout.mode == "anyres":
        tokens = [layout.tokens(*c) for c in layout.pinpoints]
        said = f"{min(tokens)} to {max(tokens)} (by the picture's shape)"
    else:
        patches = f"{layout.grid_height}x{layout.grid_width} patches"
        said = f"{layout.tokens_per_tile} ({patches} of a {layout.tile_height}x{layout.tile_width} picture)"
    return BuildReport(counts, said, plan.traits, why_not, plan.vocabulary.image_token_id, notes, proof)


def _plan(options: BuildOptions) -> _Plan:
    """Settle everything that needs no weights, cheapest checks first."""
    check_projector(options.projector)
    template = get_template(options.template)
    with quiet():
        vision_config = vision_part(parts.read_config(options.vision_encoder, "vision encoder"))
        text_config = parts.read_config(options.language_model, "language model")
        tokenizer = load_tokenizer(options.language_model)
        notes: list[str] = []
        settings = parts.read_image_settings(
            options.vision_encoder, vision_config, options.image_mode, options.image_backend
        )
        if settings.assumed:
            notes.append(f"{options.vision_encoder} brings no image processor: pictures get CLIP's mean and deviation")
        if (depth := getattr(vision_config, "num_hidden_layers", None)) is not None:
            resolve_layers(options.feature_layers, depth)
        geometry = probe_vision(vision_config, settings.spec.tile_size)
        traits = probe_language(text_config)
        template = template.bind(tokenizer)
        had_pad = tokenizer.pad_token
        vocabulary = add_tokens(tokenizer, im_start_end=options.im_start_end, image_token=options.image_token)
        if vocabulary.added:
            notes.append(f"added to the tokenizer: {', '.join(vocabulary.added)}")
        if had_pad is None:
            notes.append(f"the tokenizer has no pad token; {tokenizer.pad_token} pads batches (masked)")
    tile = (geometry.tile_width, geometry.tile_height)
    pinpoints = tuple((c * tile[0], r * tile[1]) for c, r in ANYRES_PINPOINTS) if options.image_mode == "anyres" else ()
    layout = hf.layout_of(geometry, options.image_mode, options.feature_select, pinpoints)
    return _Plan(
        options,
        template,
        tokenizer,
        vocabulary,
        settings.spec,
        geometry,
        traits,
        layout,
        vision_config,
        text_config,
        notes,
    )


def _join(plan: _Plan) -> tuple[VisionLanguageModel, list[str]]:
    options = plan.options
    dtype = options.dtype if options.dtype == "auto" else getattr(torch, options.dtype)
    vision = parts.read_vision_encoder(options.vision_encoder, dtype)
    language = parts.read_language_model(options.language_model, dtype)
    tokens: Any = [plan.tokenizer.convert_tokens_to_ids(t) for t in plan.vocabulary.added]
    added = make_room(language, plan.vocabulary, tokens, resize=not options.keep_vocabulary)
    notes = [f"added {added} embedding row{'s' * (added > 1)}, set to the mean of the others"] if added else []
    language.generation_config = generation_config(
        language.generation_config, plan.tokenizer, plan.template, plan.vocabulary.image_token_id
    )
    config = plan.config(language.config)
    config.dtype = language.dtype
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        model = VisionLanguageModel(config, vision, language)
    if options.dtype != "auto":
        model = model.to(dtype)  # type: ignore[arg-type]
    if options.projector_weights:
        path = Path(options.projector_weights)
        notes += projector.fill(model, plan.tokenizer, path, im_start_end=options.im_start_end)
    return model.eval(), notes


def generation_config(
    own: GenerationConfig | None, tokenizer: PreTrainedTokenizerBase, template: Template, image_token_id: int
) -> GenerationConfig:
    """Greedy decoding that ends at the tokenizer's end token or the template's own end mark, where that is a token.

    The image token is never generated. Of the language model's `own` settings the end tokens are kept; those of
    sampling are left out: settings that contradict each other there would make saving fail at the end of a long run.
    """
    vocabulary = tokenizer.get_vocab()
    given: Any = None if own is None else own.eos_token_id
    ends = [given] if isinstance(given, int) else list(given or [])
    ends += [tokenizer.eos_token_id, *(vocabulary[s] for s in template.stop if s in vocabulary)]
    ids = list(dict.fromkeys(e for e in ends if e is not None))
    return GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=ids[0] if len(ids) == 1 else ids or None,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=False,
        suppress_tokens=[image_token_id],
    )


def where_it_fits(config: LapilliConfig, image: ImageSpec) -> str:
    """Return why transformers' class and processor can't stand for this model; empty if they can."""
    if not config.image_row:
        return "its class looks the image token up, which has no embedding row"
    reason = hf.why_not_hf(config)
    if reason:
        return reason
    layout = config.image_layout
    if layout.mode == "anyres":
        return ""
    picture = PIL.Image.effect_noise((93, 57), 90).convert("RGB")
    ours = normalise(to_tiles(picture, image.model_copy(update={"backend": "exact"}), layout), image)
    theirs = hf_image_processor(image, config)(picture, return_tensors="pt")["pixel_values"]
    if ours.shape != theirs.shape or float((ours - theirs).abs().max()) > 1e-4:
        return "its image processor makes other pixels"
    return ""


@torch.no_grad()
def _prove(model: VisionLanguageModel, plan: _Plan) -> str:
    """Run one picture through the model; ModelError if its features don't fill its places exactly."""
    width, height = 93, 57
    picture = PIL.Image.effect_noise((width, height), 90).convert("RGB")
    pixels = normalise(to_tiles(picture, plan.image, plan.layout), plan.image)
    count = torch.tensor([len(pixels)])
    features = model.encode_images(pixels, count, torch.tensor([[width, height]]))
    places = plan.layout.tokens(width, height)
    if features.shape[0] != places:
        raise ModelError(f"a picture gives {features.shape[0]} features but has {places} places in the text")
    if not torch.isfinite(features.float()).all():
        raise ModelError("the vision encoder gives values that are not finite; its weights are broken")
    said = f"{places} places, {features.shape[0]} features"
    if _count(model) > FULL_PROOF_PARAMETERS:
        return said + " (language model not run: too large for a quick proof)"
    text = torch.tensor(plan.tokenizer("Hi").input_ids)
    ids = torch.cat([text, torch.full((places,), model.config.image_token_id), text])
    logits = model(
        input_ids=ids[None], pixel_values=pixels, tiles_per_image=count, image_sizes=torch.tensor([[width, height]])
    ).logits
    if not torch.isfinite(logits.float()).all():
        raise ModelError("the joined model gives values that are not finite; its weights are broken")
    return said + ", logits finite"
