"""The joined model: pictures through the vision encoder and the projector into the language model's sequence.

One class for every pair of parts. Training feeds it packed sequences (`embed`, `hidden_states`, `head`); everything
else calls it as any transformers model (`forward`, `generate`). On disk it is written in transformers' own layout
wherever transformers' class can hold it (`lapilli.checkpoint.hf`), else under its own `model_type`.
"""

from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from lapilli.base.errors import ModelError
from lapilli.model import attention, language, vision
from lapilli.model.config import LapilliConfig
from lapilli.model.projector import build_projector


class VisionLanguageModel(PreTrainedModel, GenerationMixin):
    """A vision encoder, a projector and a causal language model, joined at the image token.

    Every image token of the input is replaced by one projected feature, in order; the number of image tokens must
    equal the number of features. Shape letters: B batch, T tokens, S chosen positions, N Examples, D hidden, V
    vocabulary.
    """

    config: LapilliConfig  # type: ignore[assignment]
    config_class = LapilliConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _no_split_modules: list[str] = []  # noqa: RUF012  (transformers' protocol)

    def __init__(
        self,
        config: LapilliConfig,
        vision_encoder: PreTrainedModel | None = None,
        language_model: PreTrainedModel | None = None,
    ) -> None:
        """Join the given parts; a part that is not given is built, random, from the configuration."""
        super().__init__(config)
        attention.register()
        given = vision_encoder is not None and language_model is not None
        for part in (config.vision_config, config.text_config):
            # transformers has just set our own attention there; each part decides for itself below.
            part._attn_implementation_internal = None
        self.vision_encoder: Any = vision_encoder or AutoModel.from_config(config.vision_config)
        self.language_model: Any = language_model or AutoModelForCausalLM.from_config(config.text_config)
        for part in (self.vision_encoder, self.language_model):
            language.use_attention(part, language.native_attention(part))
        self.projector = build_projector(config.projector, config.vision_hidden_size, self.hidden_size)
        if config.image_newline:
            self.image_newline = nn.Parameter(torch.randn(self.hidden_size) / self.hidden_size**0.5)
        self.layout = config.image_layout
        self.attention_kernel: attention.Kernel = "auto"
        """What computes the language model's attention over packed sequences."""
        if not given:
            self.post_init()

    @property
    def hidden_size(self) -> int:
        """Width of the language model's embeddings."""
        return self.language_model.get_input_embeddings().weight.shape[1]

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.get_output_embeddings()

    # ---- pictures -------------------------------------------------------------------------------------------------

    def encode_images(self, pixels: torch.Tensor, tiles_per_image: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
        """Encode and project pictures, and lay their features out as the text has places for them.

        `pixels` (tiles, C, H, W) normalised, `tiles_per_image` (I,), `sizes` (I, 2) each picture's own (width,
        height). Returns (sum of tokens over the I pictures, D).
        """
        tower = self.vision_encoder
        trains = torch.is_grad_enabled() and any(p.requires_grad for p in tower.parameters())
        with torch.set_grad_enabled(trains):
            states = vision.read_layers(tower, pixels.to(next(tower.parameters()).dtype), self.config.feature_layers)
            if self.config.feature_select == "patch":
                states = [s[:, self.config.prefix_tokens :] for s in states]
            features = torch.cat(states, dim=-1)
        projected = self.projector(features.to(self._projector_dtype(features.dtype)))
        if self.layout.mode != "anyres":
            return projected.flatten(0, 1)
        parts = torch.split(projected, tiles_per_image.tolist())
        return torch.cat(
            [self._lay_out_tiles(part, int(w), int(h)) for part, (w, h) in zip(parts, sizes.tolist(), strict=True)]
        )

    def _projector_dtype(self, default: torch.dtype) -> torch.dtype:
        return next((p.dtype for p in self.projector.parameters()), default)

    def _lay_out_tiles(self, tiles: torch.Tensor, width: int, height: int) -> torch.Tensor:
        """Lay one anyres picture's tiles (1 + columns*rows, P, D) out: overview, then the grid row by row.

        The grid is cut to the part the picture covers and a newline ends each row, as in LLaVA-1.6.
        """
        layout = self.layout
        columns, rows = layout.tile_grid(width, height)
        top, bottom, left, right = layout.unpadded_grid(width, height)
        grid = tiles[1:, layout.extra_tokens :].unflatten(0, (rows, columns))
        grid = grid.unflatten(2, (layout.grid_height, layout.grid_width))
        grid = grid.permute(0, 2, 1, 3, 4).flatten(2, 3).flatten(0, 1)[top:bottom, left:right]
        newline = self.image_newline.to(grid.dtype).expand(grid.shape[0], 1, -1)
        return torch.cat([tiles[0], torch.cat([grid, newline], dim=1).flatten(0, 1)])

    # ---- packed sequences -----------------------------------------------------------------------------------------

    def embed(
        self,
        input_ids: torch.Tensor,
        image_features: torch.Tensor | None = None,
        places: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Embed input_ids (T,) -> (T, D), with image_features (F, D) at the image tokens, in order.

        Where the image tokens stand may be given as `places` (F,), T for a feature that goes nowhere: then nothing is
        looked for on the device. Raises ModelError if image tokens and features differ in number.
        """
        is_image = input_ids == self.config.image_token_id
        # The image token's own row is never read: it may be missing, and its gradient would be zero.
        embeds = self.get_input_embeddings()(input_ids.masked_fill(is_image, 0))
        if places is not None:
            if image_features is None:
                return embeds
            spare = embeds.new_zeros(1, embeds.shape[1])
            return torch.cat([embeds, spare]).index_copy(0, places, image_features.to(embeds.dtype))[:-1]
        places = is_image.nonzero(as_tuple=True)[0]
        features = 0 if image_features is None else image_features.shape[0]
        if len(places) != features:
            raise ModelError(
                f"the text has places for {len(places)} image features, the pictures gave {features}; "
                "text and pictures were prepared with another image layout, or a picture is missing"
            )
        if image_features is None:
            return embeds
        return embeds.index_copy(0, places, image_features.to(embeds.dtype))

    def hidden_states(
        self, embeds: torch.Tensor, position_ids: torch.Tensor, cu_seqlens: torch.Tensor, rows: int | None = None
    ) -> torch.Tensor:
        """Run the language model over a packed sequence, each segment by itself.

        embeds (T, D), position_ids (T,) restarting with each segment, cu_seqlens (N+1,) int32 -> states (T, D). `rows`:
        there are so many segments, all of one length.
        """
        return language.packed_states(
            self.language_model, embeds, position_ids, cu_seqlens, self.config.packing, self.attention_kernel, rows
        )

    def head(self, states: torch.Tensor) -> torch.Tensor:
        """Apply the output layer to states (S, D) -> logits (S, V); for models whose `config.head` is `direct`."""
        return language.output_layer(self.language_model)(states)

    def packed_logits(
        self,
        embeds: torch.Tensor,
        position_ids: torch.Tensor,
        cu_seqlens: torch.Tensor,
        keep: torch.Tensor,
        rows: int | None = None,
    ) -> torch.Tensor:
        """Logits (S, V) of a packed sequence at positions `keep` (S,), whatever the language model's head."""
        if self.config.head == "direct":
            return self.head(self.hidden_states(embeds, position_ids, cu_seqlens, rows)[keep])
        return language.packed_logits(
            self.language_model,
            embeds,
            position_ids,
            cu_seqlens,
            keep,
            self.config.packing,
            self.attention_kernel,
            rows,
        )

    def without_image_token(self, logits: torch.Tensor) -> torch.Tensor:
        """Take the image token out of the running: its logit (last dimension V) becomes -inf.

        It is never an answer, and its row was added to a vocabulary that the language model learned without it.
        """
        if self.config.image_token_id >= logits.shape[-1]:
            return logits
        index = torch.tensor([self.config.image_token_id], device=logits.device)
        return logits.index_fill(-1, index, float("-inf"))

    # ---- as any transformers model --------------------------------------------------------------------------------

    def _inputs_embeds(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor | None,
        tiles_per_image: torch.Tensor | None,
        image_sizes: torch.Tensor | None,
    ) -> torch.Tensor:
        features = None
        if pixel_values is not None:
            if tiles_per_image is None:
                tiles_per_image = torch.ones(len(pixel_values), dtype=torch.long)
            if image_sizes is None:
                image_sizes = torch.zeros(len(tiles_per_image), 2, dtype=torch.long)
            features = self.encode_images(pixel_values, tiles_per_image, image_sizes)
        return self.embed(input_ids.flatten(), features).unflatten(0, input_ids.shape)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        *,
        tiles_per_image: torch.Tensor | None = None,
        image_sizes: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits (B, T, V), and the mean loss if `labels` (B, T, -100 where not supervised) are given.

        `input_ids` (B, T) with one image token per feature; `pixel_values` (tiles, C, H, W) normalised, with
        `tiles_per_image` (I,) and `image_sizes` (I, 2) as (width, height), as the processor returns them. Other
        arguments go to the language model.
        """
        language.use_attention(self.language_model, language.native_attention(self.language_model))
        if inputs_embeds is None:
            if input_ids is None:
                raise ModelError("forward needs input_ids or inputs_embeds")
            inputs_embeds = self._inputs_embeds(input_ids, pixel_values, tiles_per_image, image_sizes)
        out = self.language_model(inputs_embeds=inputs_embeds, attention_mask=attention_mask, **kwargs)
        loss = None
        if labels is not None:
            logits = self.without_image_token(out.logits[:, :-1].flatten(0, 1).float())
            loss = nn.functional.cross_entropy(logits, labels[:, 1:].flatten())
        return CausalLMOutputWithPast(loss=loss, logits=out.logits, past_key_values=out.past_key_values)

    @torch.no_grad()
    def generate(  # type: ignore[override]
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        *,
        tiles_per_image: torch.Tensor | None = None,
        image_sizes: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Generate new tokens (B, new) through the language model's own `generate`; the prompt is not repeated."""
        language.use_attention(self.language_model, language.native_attention(self.language_model))
        embeds = self._inputs_embeds(input_ids, pixel_values, tiles_per_image, image_sizes)
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        return self.language_model.generate(inputs_embeds=embeds, attention_mask=attention_mask, **kwargs)


def register() -> None:
    """Let transformers' Auto classes load folders of our own `model_type`."""
    if "lapilli" not in _registered_types():
        AutoConfig.register("lapilli", LapilliConfig)
        AutoModel.register(LapilliConfig, VisionLanguageModel)
        AutoModelForCausalLM.register(LapilliConfig, VisionLanguageModel)


def _registered_types() -> list[str]:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return list(CONFIG_MAPPING.keys())
