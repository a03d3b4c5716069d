"""Configuration of a joined model.

It holds the two parts' own Hugging Face configurations and what joining them decided: which vision layers are read,
which of their tokens are kept, what projects them, and how the language model takes packed sequences. Everything that
was found out by probing the parts stands here, so a folder is loaded without probing again.
"""

from typing import Any, Literal

from transformers import AutoConfig, PreTrainedConfig

from lapilli.base.layout import ImageLayout


class LapilliConfig(PreTrainedConfig):
    """Configuration of `lapilli.model.vlm.VisionLanguageModel`.

    `feature_layers` are indices into the encoder's hidden states (0: the embeddings, -1: the last layer), one or
    several, concatenated over the hidden dimension. `feature_select` is `patch` (patch tokens only) or `cls_patch`
    (every token). `prefix_tokens` counts the tokens before the patches, `flat_patches` says that the encoder takes
    patches and their shapes. `image_row` says whether the image token has an embedding row. `packing` is `varlen` or
    `padded`; `head` says whether the output layer may be applied to chosen positions alone (`direct`) or only inside
    the language model's own forward pass (`forward`).
    """

    model_type = "lapilli"
    sub_configs = {"vision_config": AutoConfig, "text_config": AutoConfig}  # type: ignore[assignment]  # noqa: RUF012

    def __init__(
        self,
        vision_config: PreTrainedConfig | dict[str, Any] | None = None,
        text_config: PreTrainedConfig | dict[str, Any] | None = None,
        projector: str = "mlp2x_gelu",
        feature_layers: tuple[int, ...] | list[int] = (-2,),
        feature_select: str = "patch",
        prefix_tokens: int = 1,
        flat_patches: bool = False,
        layout: dict[str, Any] | None = None,
        image_token_id: int = 0,
        image_newline: bool = False,
        image_row: bool = True,
        packing: Literal["varlen", "padded"] = "varlen",
        head: Literal["direct", "forward"] = "direct",
        **kwargs: Any,
    ) -> None:
        self.vision_config = _as_config(vision_config)
        self.text_config = _as_config(text_config)
        self.projector = projector
        self.feature_layers = list(feature_layers)
        self.feature_select = feature_select
        self.prefix_tokens = prefix_tokens
        self.flat_patches = flat_patches
        self.layout = layout or {}
        self.image_token_id = image_token_id
        self.image_newline = image_newline
        self.image_row = image_row
        self.packing: Literal["varlen", "padded"] = packing
        self.head: Literal["direct", "forward"] = head
        kwargs.setdefault("tie_word_embeddings", bool(getattr(self.text_config, "tie_word_embeddings", False)))
        super().__init__(**kwargs)

    @property
    def image_layout(self) -> ImageLayout:
        return ImageLayout.model_validate(self.layout)

    @property
    def vision_hidden_size(self) -> int:
        """Width of the features that enter the projector."""
        return self.vision_config.hidden_size * len(self.feature_layers)


def _as_config(value: PreTrainedConfig | dict[str, Any] | None) -> Any:
    """Turn a dictionary with `model_type`, as a saved config.json holds it, into that model's configuration."""
    if isinstance(value, dict):
        fields = dict(value)
        return AutoConfig.for_model(fields.pop("model_type"), **fields)
    return value
