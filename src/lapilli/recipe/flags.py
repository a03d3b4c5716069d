"""The flags of the training programs of LLaVA, KoLLaVA, Quilt-LLaVA and Intel's version for Gaudi, with their defaults.

Those of LLaVA and what it takes from transformers' TrainingArguments (LLaVA llava/train/train.py) and from Gaudi's
(intel-extension-for-transformers; optimum-habana). What each becomes in a recipe is told in `imported.py`; those that
become nothing have the reason here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from lapilli.base.errors import RecipeError, nearest

Kind = Literal["text", "int", "float", "bool", "list"]
Value = str | int | float | bool | None

_SOON = "validation is data.validation and train.validate_every"
_ALWAYS = "always so here"
_OWN_LOGS = "every step is in metrics.jsonl"
_INTEL = "belongs to Intel's own trainer"
_TRUE = frozenset({"true", "yes", "y", "t", "1"})
_FALSE = frozenset({"false", "no", "n", "f", "0"})


@dataclass(frozen=True)
class Flag:
    """A flag's kind and the programs' default; `nothing` says why it has no effect here, and is empty if it has one."""

    kind: Kind
    default: Value = None
    nothing: str = ""


FLAGS: dict[str, Flag] = {
    # What is trained
    "model_name_or_path": Flag("text", "facebook/opt-125m"),
    "version": Flag("text"),
    "template": Flag("text"),
    "freeze_backbone": Flag("bool", False),
    "tune_mm_mlp_adapter": Flag("bool", False),
    "freeze_mm_mlp_adapter": Flag("bool", False),
    "vision_tower": Flag("text"),
    "mm_vision_select_layer": Flag("int", -1),
    "mm_vision_select_feature": Flag("text", "patch"),
    "pretrain_mm_mlp_adapter": Flag("text"),
    "mm_projector_type": Flag("text", "linear"),
    "mm_use_im_start_end": Flag("bool", False),
    "mm_use_im_patch_token": Flag("bool", True),
    "mm_patch_merge_type": Flag("text", "flat"),
    "mm_im_patches": Flag("int", None, "places per picture follow from the vision encoder"),
    "mpt_attn_impl": Flag("text", None, "run.attention chooses; auto takes the fastest that can do it"),
    "cache_dir": Flag("text", None, "hub names are cached where huggingface_hub keeps them (HF_HOME)"),
    "trust_remote_code": Flag("bool", None, "code from a model's folder is never run"),
    "use_auth_token": Flag("bool", None, "huggingface_hub's own login is used"),
    "use_fast_tokenizer": Flag("bool", None, "tokenizers are fast in transformers 5"),
    # Data
    "data_path": Flag("text"),
    "image_folder": Flag("text"),
    "image_aspect_ratio": Flag("text", "square"),
    "image_grid_pinpoints": Flag("text", None, "the original writes it into its configuration and no more"),
    "is_multimodal": Flag("bool", None, "the original sets it itself"),
    "lazy_preprocess": Flag("bool", None, "records are always read when they are needed, in the original too"),
    "pad_max": Flag("bool", False),
    "model_max_length": Flag("int", 512),
    "group_by_modality_length": Flag("bool", False),
    "group_by_length": Flag("bool", False),
    "dataloader_num_workers": Flag("int", 0),
    "dataloader_pin_memory": Flag("bool", None, _ALWAYS),
    "dataloader_persistent_workers": Flag("bool", None, _ALWAYS),
    "dataloader_drop_last": Flag("bool", None, "the last, shorter step of an epoch is kept"),
    "remove_unused_columns": Flag("bool", None, "there are no columns"),
    # Adapters
    "lora_enable": Flag("bool", False),
    "lora_r": Flag("int", 64),
    "lora_alpha": Flag("int", 16),
    "lora_dropout": Flag("float", 0.05),
    "lora_bias": Flag("text", "none"),
    "lora_weight_path": Flag("text", None, "the original never reads it"),
    "bits": Flag("int", 16),
    "double_quant": Flag("bool", True),
    "quant_type": Flag("text", "nf4"),
    # Steps
    "num_train_epochs": Flag("float", 3.0),
    "max_steps": Flag("int", -1),
    "per_device_train_batch_size": Flag("int", 8),
    "gradient_accumulation_steps": Flag("int", 1),
    "learning_rate": Flag("float", 5e-5),
    "mm_projector_lr": Flag("float"),
    "weight_decay": Flag("float", 0.0),
    "adam_beta1": Flag("float", 0.9),
    "adam_beta2": Flag("float", 0.999),
    "adam_epsilon": Flag("float", 1e-8),
    "max_grad_norm": Flag("float", 1.0),
    "lr_scheduler_type": Flag("text", "linear"),
    "warmup_ratio": Flag("float", 0.0),
    "warmup_steps": Flag("int", 0),
    "optim": Flag("text", "adamw_torch"),
    "seed": Flag("int", 42),
    "data_seed": Flag("int", None, "run.seed orders the data too"),
    "full_determinism": Flag("bool", False),
    # How
    "bf16": Flag("bool", False),
    "fp16": Flag("bool", False),
    "tf32": Flag("bool", False),
    "gradient_checkpointing": Flag("bool", False),
    "gradient_checkpointing_kwargs": Flag("text", None, "layers are always computed again without reentering"),
    "deepspeed": Flag("text"),
    "fsdp": Flag("text", ""),
    "fsdp_config": Flag("text", None, "the keys of run.fsdp"),
    "fsdp_transformer_layer_cls_to_wrap": Flag("text", None, "layers are found by themselves"),
    "torch_compile": Flag("bool", False),
    "torch_compile_backend": Flag("text", None, "chosen by the device"),
    "local_rank": Flag("int", None, "read from the launcher"),
    "ddp_backend": Flag("text", None, "chosen by the device: NCCL, HCCL or Gloo"),
    "ddp_timeout": Flag("int", None, "a process that is gone is noticed by its closed connection"),
    "ddp_find_unused_parameters": Flag("bool", None, "gradients are summed after the last backward pass"),
    "ddp_bucket_cap_mb": Flag("int", None, "gradients are sent in buckets of 64 MiB"),
    # Saving and telling
    "output_dir": Flag("text"),
    "overwrite_output_dir": Flag("bool", None, "a finished run is never written over"),
    "save_strategy": Flag("text", "steps"),
    "save_steps": Flag("int", 500),
    "save_total_limit": Flag("int"),
    "save_safetensors": Flag("bool", None, _ALWAYS),
    "save_on_each_node": Flag("bool", None, "processes share one run folder"),
    "resume_from_checkpoint": Flag("text", None, "the same command goes on from its newest checkpoint (--resume)"),
    "evaluation_strategy": Flag("text", None, _SOON),
    "eval_strategy": Flag("text", None, _SOON),
    "eval_steps": Flag("int", None, _SOON),
    "do_eval": Flag("bool", None, _SOON),
    "do_train": Flag("bool", None, _ALWAYS),
    "per_device_eval_batch_size": Flag("int", None, "held-out data are packed like the rest"),
    "report_to": Flag("list", None),
    "run_name": Flag("text", None, "trackers show the run folder"),
    "logging_steps": Flag("float", None, _OWN_LOGS),
    "logging_strategy": Flag("text", None, _OWN_LOGS),
    "logging_dir": Flag("text", None, _OWN_LOGS),
    "logging_first_step": Flag("bool", None, _OWN_LOGS),
    "log_level": Flag("text", None, _OWN_LOGS),
    "disable_tqdm": Flag("bool", None, "progress is one line"),
    # Gaudi
    "use_habana": Flag("bool", False),
    "use_lazy_mode": Flag("bool", None),
    "gaudi_config_name": Flag("text", None, _INTEL),
    "use_hpu_graphs": Flag("bool", None, _INTEL),
    "use_hpu_graphs_for_training": Flag("bool", None, _INTEL),
    "use_hpu_graphs_for_inference": Flag("bool", None, _INTEL),
    "disable_tensor_cache_hpu_graphs": Flag("bool", None, _INTEL),
    "max_hpu_graphs": Flag("int", None, _INTEL),
    "distribution_strategy": Flag("text", None, _INTEL),
    "throughput_warmup_steps": Flag("int", None, "the live line is of the last 20 steps"),
    "adjust_throughput": Flag("bool", None, "waiting for data is told apart"),
    "pipelining_fwd_bwd": Flag("bool", None, _INTEL),
    "non_blocking_data_copy": Flag("bool", None, _ALWAYS),
    "sdp_on_bf16": Flag("bool", None, _INTEL),
    "profiling_steps": Flag("int", None, _INTEL),
}
"""Every flag that is known, without its dashes."""


def parse_flags(arguments: Sequence[str], where: str) -> dict[str, Value]:
    """Return the flags that were given, with their values, as Python's argparse would take them.

    Raises RecipeError naming every flag that is unknown, with the nearest known one, or has no value of its kind.
    """
    given: dict[str, Value] = {}
    problems: list[str] = []
    words = list(arguments)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            problems.append(f'{where}: "{word}" is no flag, and no flag before it takes it')
            continue
        written, equals, text = word[2:].partition("=")
        name, negated = _name(written.replace("-", "_"))
        if name is None:
            problems.append(f'{where}: unknown flag "--{written}"{nearest(written, FLAGS)}')
            while words and not words[0].startswith("--"):
                words.pop(0)
            continue
        values = [text] if equals else []
        while not equals and words and not words[0].startswith("--"):
            if values and FLAGS[name].kind != "list":
                break
            values.append(words.pop(0))
        try:
            given[name] = False if negated else _value(FLAGS[name].kind, values)
        except ValueError as error:
            problems.append(f"{where}: --{name}: {error}")
    if problems:
        raise RecipeError("\n".join(problems))
    return given


def _name(written: str) -> tuple[str | None, bool]:
    """The flag that is meant, by its whole name or a beginning of its own, and whether it is `--no_...` of one."""
    if written in FLAGS:
        return written, False
    if written.startswith("no_") and written[3:] in FLAGS and FLAGS[written[3:]].kind == "bool":
        return written[3:], True
    beginning = [name for name in FLAGS if name.startswith(written)]
    return (beginning[0] if len(beginning) == 1 else None), False


def _value(kind: Kind, values: list[str]) -> Value:
    if kind == "bool":
        word = values[0].lower() if values else "true"
        if word not in _TRUE | _FALSE:
            raise ValueError(f'"{values[0]}" is neither True nor False')
        return word in _TRUE
    if not values:
        raise ValueError("needs a value")
    if kind in ("text", "list") or "$" in values[0]:
        return " ".join(values)
    try:
        return int(values[0]) if kind == "int" else float(values[0])
    except ValueError as error:
        raise ValueError(f'"{values[0]}" is no {"whole " if kind == "int" else ""}number') from error
