"""Tiny random vision encoders and language models of many architectures, saved as ordinary Hugging Face folders."""

from pathlib import Path

import torch
import transformers as hf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

_V = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "patch_size": 14}
_SQUARE = {"size": {"height": 56, "width": 56}}
_CROP = {"size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56}}

VISION = {
    "clip": lambda: (
        hf.CLIPVisionConfig(**_V, intermediate_size=64, image_size=56),
        CLIPImageProcessorPil(**_CROP),
    ),
    "siglip": lambda: (
        hf.SiglipVisionConfig(**_V, intermediate_size=64, image_size=56),
        SiglipImageProcessorPil(**_SQUARE),
    ),
    "siglip2": lambda: (
        hf.Siglip2VisionConfig(**_V, intermediate_size=64, num_patches=16),
        Siglip2ImageProcessorPil(patch_size=14, max_num_patches=16),
    ),
    "dinov2": lambda: (hf.Dinov2Config(**_V, mlp_ratio=2, image_size=70), BitImageProcessorPil(**_CROP)),
    "vit": lambda: (hf.ViTConfig(**_V, intermediate_size=64, image_size=56), ViTImageProcessorPil(**_SQUARE)),
}

_L = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}

LANGUAGE = {
    "llama": lambda ids: hf.LlamaConfig(**_L, **ids),
    "mistral": lambda ids: hf.MistralConfig(**_L, **ids, num_key_value_heads=2, sliding_window=24),
    "qwen2": lambda ids: hf.Qwen2Config(**_L, **ids, num_key_value_heads=2, tie_word_embeddings=True),
    "qwen3": lambda ids: hf.Qwen3Config(**_L, **ids, num_key_value_heads=2, head_dim=24),
    "gemma": lambda ids: hf.GemmaConfig(**_L, **ids, num_key_value_heads=1, head_dim=16),
    "phi3": lambda ids: hf.Phi3Config(**_L, **ids, num_key_value_heads=2),
    "mpt": lambda ids: hf.MptConfig(d_model=64, n_heads=4, n_layers=2, **ids),
    "gpt_neox": lambda ids: hf.GPTNeoXConfig(**_L, **ids),
}

_TEXT = [
    "A chat between a curious user and an artificial intelligence assistant. USER: what is it? ASSISTANT: a cat",
    "Two red dogs and one blue bird stand on the left side of the picture. How many? Three, in all.",
    "사진 속 음식은 무엇입니까? 0123456789 ### Human: Assistant: <image> \n",
]


def make_tokenizer() -> hf.PreTrainedTokenizerFast:
    """A byte-level BPE of 400 tokens with `<s>`, `</s>` and `<pad>`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXT, trainer)
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=512
    )


def make_vision(name: str, folder: Path, seed: int = 0) -> Path:
    config, processor = VISION[name]()
    torch.manual_seed(seed)
    model = hf.AutoModel.from_config(config)
    _spread(model)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def make_language(name: str, folder: Path, seed: int = 1) -> Path:
    tokenizer = make_tokenizer()
    ids = {"vocab_size": len(tokenizer), "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    torch.manual_seed(seed)
    model = hf.AutoModelForCausalLM.from_config(LANGUAGE[name](ids))
    _spread(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _spread(model: torch.nn.Module) -> None:
    """Weights large enough that a wrong mask or a lost layer shows in the logits."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.15)
