"""A recipe from a training command of LLaVA, KoLLaVA, Quilt-LLaVA or Intel's version for Gaudi.

What a flag says is written under the recipe's own key, with the flag beside it; flags that were not given are written
with the original's defaults, because the recipe's are others. Whatever has no counterpart is told, never dropped.
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lapilli.base.errors import RecipeError, unknown
from lapilli.recipe.flags import FLAGS, Value, parse_flags
from lapilli.recipe.resolved import scalar
from lapilli.recipe.shell import Command

_SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant", "constant_with_warmup": "constant"}
_OPTIMIZERS = {
    "adamw_torch": "adamw", "adamw_hf": "adamw", "adamw_torch_fused": "adamw", "adamw_apex_fused": "adamw",
    "adamw_bnb_8bit": "adamw_8bit", "adamw_8bit": "adamw_8bit", "paged_adamw_8bit": "adamw_8bit", "sgd": "sgd",
}  # fmt: skip
_TEMPLATES = {"v0": "v0-2023-06", "v1": "vicuna_v1"}
_TRACKERS = ("wandb", "tensorboard", "trackio")
_SET_BY_HAND = {
    "PT_HPU_MAX_COMPOUND_OP_SIZE": "Gaudi's compiler reads it",
    "DEEPSPEED_HPU_ZERO3_SYNC_MARK_STEP_REQUIRED": "DeepSpeed's ZeRO-3 on a Gaudi in lazy mode reads it",
}


@dataclass
class Imported:
    """A recipe's text, and what is to be told of the command it came from."""

    text: str
    notes: list[str] = field(default_factory=list)


def import_command(command: Command, devices: int | None, folder: Path, templates: Collection[str]) -> Imported:
    """Write the recipe of one command; `folder` is where it will lie, `templates` the names of templates there are.

    Paths of the command are relative to the current folder. `devices` is how many it ran on, where the command does not
    say it. Raises RecipeError for flags that are unknown or that nothing here can do.
    """
    return _Import(command, devices, folder, templates).made()


class _Import:
    def __init__(self, command: Command, devices: int | None, folder: Path, templates: Collection[str]) -> None:
        self.command, self.folder, self.templates = command, folder, templates
        self.given = parse_flags(command.arguments, command.where)
        self.keys: list[tuple[str, Any, str]] = []
        self.notes: list[str] = []
        self.template = ""
        self.devices = devices or self._devices()

    def made(self) -> Imported:
        self._data()
        self._what_trains()
        self._steps()
        self._how()
        self._told()
        return Imported(self._text(), self.notes)

    # ---- flags ----------------------------------------------------------------------------------------------------

    def value(self, flag: str) -> Any:
        return self.given.get(flag, FLAGS[flag].default)

    def put(self, key: str, value: Any, *flags: str) -> None:
        """Write a key, and beside it the flags that it comes from."""
        said = [_spell(flag, self.given[flag]) for flag in flags if flag in self.given]
        self.keys.append((key, value, " ".join(said) or "the original's default"))

    def refuse(self, flag: str, why: str) -> RecipeError:
        return RecipeError(f"{self.command.where}: {_spell(flag, self.value(flag))}: {why}")

    def path(self, flag: str) -> str:
        value = str(self.value(flag))
        if value.startswith(("/", "~", "$")):
            return value
        return os.path.relpath(Path.cwd() / value, self.folder)

    def needed(self, flag: str) -> None:
        if flag not in self.given:
            raise RecipeError(f"{self.command.where}: --{flag} is missing, and its default is of no use")

    # ---- parts of a recipe ----------------------------------------------------------------------------------------

    def _data(self) -> None:
        for flag in ("model_name_or_path", "data_path", "output_dir"):
            self.needed(flag)
        if self.value("vision_tower") is None:
            raise RecipeError(f"{self.command.where}: without --vision_tower it trains a language model alone")
        self.put("out", self.path("output_dir"), "output_dir")
        self.put("data.train", self.path("data_path"), "data_path")
        if "image_folder" in self.given:
            self.put("data.images", self.path("image_folder"), "image_folder")
        self._template()
        mode = self.value("image_aspect_ratio")
        if mode not in ("pad", "square"):
            self.notes.append(f"--image_aspect_ratio {mode}: the original trains every mode but pad as square; so here")
        self.put("data.image_mode", "pad" if mode == "pad" else "square", "image_aspect_ratio")
        self.keys.append(("data.placement", "front", "as the original: <image> moves to the front of its turn"))
        self.put("data.max_length", self.value("model_max_length"), "model_max_length")
        self.keys.append(("data.too_long", "truncate_turns", "the original cuts; here whole exchanges go, counted"))
        if self.value("group_by_modality_length"):
            self.put("data.order", "modality_groups_llava", "group_by_modality_length")
        elif self.value("group_by_length"):
            self.put("data.order", "length_groups", "group_by_length")
        self.put("data.workers", self.value("dataloader_num_workers"), "dataloader_num_workers")

    def _template(self) -> None:
        flag = "template" if "template" in self.given else "version"
        name = str(self.value(flag) or ("v1" if self.value("use_habana") else "v0"))
        if "$" in name:
            self.notes.append(f"--{flag} {name}: put the template's name there")
        elif name == "v0":
            self.notes.append(
                f"--{flag} v0 trained the template v0-2023-06 in LLaVA's first versions, which is written; since "
                "October 2023 it trains vicuna_v1"
            )
        elif name not in self.templates:
            self.notes.append(f"--{flag} {name}: no such template; the original falls back to vicuna_v1, and so here")
            name = "vicuna_v1"
        elif flag == "template" and name == "v1":
            self.notes.append(
                "--template v1: Intel's has roles User and Assistant and LLaVA's older system text; llava_v1, which is "
                "written, has USER and ASSISTANT. A YAML file of your own gives the very same"
            )
            name = "llava_v1"
        self.template = _TEMPLATES.get(name, name)
        self.put("data.template", self.template, flag)

    def _what_trains(self) -> None:
        lora = bool(self.value("lora_enable"))
        if self.value("tune_mm_mlp_adapter"):
            self.put("train.freeze", "projector", "tune_mm_mlp_adapter")
            if self.value("mm_use_im_start_end"):
                self.notes.append(
                    "--mm_use_im_start_end with --tune_mm_mlp_adapter: the original also trains the rows of <im_start> "
                    "and <im_end>; here they stay as they are made, the mean of the others"
                )
        elif self.value("freeze_mm_mlp_adapter"):
            frozen = [r"^vision_encoder\.", r"^projector\."] if not lora else [r"^vision_encoder\.", "projector"]
            self.put("train.freeze", frozen, "freeze_mm_mlp_adapter")
        elif self.value("freeze_backbone") and not lora:
            self.put("train.freeze", "projector", "freeze_backbone")
        else:
            self.keys.append(("train.freeze", "freeze_vision", "the original never trains the vision encoder"))
        if lora:
            for key, flag in (("r", "lora_r"), ("alpha", "lora_alpha"), ("dropout", "lora_dropout")):
                self.put(f"train.lora.{key}", self.value(flag), flag)
            self.put("train.lora.bias", self.value("lora_bias"), "lora_bias")
        bits = self.value("bits")
        if bits == 16:
            return
        if bits not in (4, 8):
            raise self.refuse("bits", "is 4, 8 or 16")
        if not lora:
            raise self.refuse("bits", "a quantised model learns through adapters only; add --lora_enable True")
        if bits == 4 and self.value("quant_type") != "nf4":
            raise self.refuse("quant_type", "only nf4 is offered")
        if bits == 4 and not self.value("double_quant"):
            self.notes.append("--double_quant False: scales are quantised too here, always")
        self.put("train.lora.quantise", "nf4" if bits == 4 else "int8", "bits", "quant_type", "double_quant")

    def _steps(self) -> None:
        self.put("train.epochs", self.value("num_train_epochs"), "num_train_epochs")
        if (self.value("max_steps") or -1) > 0:
            self.put("train.max_steps", self.value("max_steps"), "max_steps")
        per_device, times = self.value("per_device_train_batch_size"), self.value("gradient_accumulation_steps")
        self.keys.append(
            (
                "train.global_batch_size",
                per_device * times * self.devices,
                f"{per_device} samples x {times} accumulated x {self.devices} devices",
            )
        )
        self.keys.append(
            ("train.loss_reduction", "tokens", f"microbatch_mean with micro_batch_size: {per_device} is the original's")
        )
        optimizer = str(self.value("optim"))
        if optimizer not in _OPTIMIZERS:
            raise self.refuse("optim", unknown("optimiser", optimizer, _OPTIMIZERS))
        self.put("train.optimizer", _OPTIMIZERS[optimizer], "optim")
        self.put("train.learning_rate", self.value("learning_rate"), "learning_rate")
        if self.value("mm_projector_lr") is not None:
            self.put("train.projector_learning_rate", self.value("mm_projector_lr"), "mm_projector_lr")
        if _OPTIMIZERS[optimizer] != "sgd":
            betas = [self.value("adam_beta1"), self.value("adam_beta2")]
            self.put("train.betas", betas, "adam_beta1", "adam_beta2")
            self.put("train.eps", self.value("adam_epsilon"), "adam_epsilon")
        self.put("train.weight_decay", self.value("weight_decay"), "weight_decay")
        self._schedule()
        self.put("train.max_grad_norm", self.value("max_grad_norm") or None, "max_grad_norm")
        if self.value("gradient_checkpointing"):
            self.put("train.gradient_checkpointing", "full", "gradient_checkpointing")
        strategy = self.value("save_strategy")
        if strategy == "steps":
            self.put("train.save_every", int(self.value("save_steps")), "save_steps")
        elif strategy != "no":
            self.notes.append(f"--save_strategy {strategy}: checkpoints come by steps (train.save_every)")
        if self.value("save_total_limit") is None:
            self.notes.append("without --save_total_limit the original keeps every checkpoint; train.keep_checkpoints")
        else:
            self.put("train.keep_checkpoints", self.value("save_total_limit"), "save_total_limit")

    def _schedule(self) -> None:
        schedule = str(self.value("lr_scheduler_type"))
        if schedule not in _SCHEDULES:
            raise self.refuse("lr_scheduler_type", unknown("schedule", schedule, _SCHEDULES))
        self.put("train.schedule", _SCHEDULES[schedule], "lr_scheduler_type")
        if self.value("warmup_steps"):
            self.notes.append(
                f"--warmup_steps {self.value('warmup_steps')}: set train.warmup_ratio to its part of all steps"
            )
        warmup = 0.0 if schedule == "constant" else self.value("warmup_ratio")
        self.put("train.warmup_ratio", warmup, "warmup_ratio")

    def _how(self) -> None:
        if self.value("use_habana"):
            self.put("run.device", "hpu", "use_habana")
            if self.value("use_lazy_mode"):
                self.put("run.hpu_mode", "lazy", "use_lazy_mode")
                self.notes.append(
                    "--use_lazy_mode: Intel develops lazy mode no further; run.hpu_mode=eager, with run.compile=true "
                    "or without, is its successor"
                )
        elif self.value("use_lazy_mode"):
            raise self.refuse("use_lazy_mode", "belongs to --use_habana")
        if self.value("pad_max"):
            self.notes.append(
                "--pad_max: the original pads every sample to --model_max_length; run.static_shapes (8 on a Gaudi) "
                "pads to one of a few lengths, and teaches the same"
            )
        if self.value("deepspeed"):
            self.put("run.engine", "deepspeed", "deepspeed")
            self.keys.append(("run.deepspeed.config", self.path("deepspeed"), "the file works as it is"))
        elif str(self.value("fsdp")).strip():
            self.put("run.engine", "fsdp", "fsdp")
            if "shard_grad_op" in str(self.value("fsdp")):
                self.keys.append(("run.fsdp.reshard", False, "its word shard_grad_op"))
            if "offload" in str(self.value("fsdp")):
                self.keys.append(("run.fsdp.offload", True, "its word offload"))
        if self.value("fp16"):
            self.notes.append("--fp16: bf16 is taken instead; it needs no loss scale")
        half = self.value("bf16") or self.value("fp16")
        self.put("run.precision", "bf16" if half else "fp32", "bf16", "fp16")
        for flag, key in (("tf32", "tf32"), ("torch_compile", "compile"), ("full_determinism", "deterministic")):
            if self.value(flag):
                self.put(f"run.{key}", True, flag)
        trackers = str(self.value("report_to") or "").split()
        known = [name for name in trackers if name in _TRACKERS]
        if known:
            self.put("run.trackers", known, "report_to")
        others = [name for name in trackers if name not in (*_TRACKERS, "none")]
        if others:
            self.notes.append(f"--report_to {' '.join(others)}: known trackers are {', '.join(_TRACKERS)}")
        self.put("run.seed", self.value("seed"), "seed")

    def _told(self) -> None:
        """What has no place in the recipe: flags without effect, variables."""
        for flag in self.given:
            if FLAGS[flag].nothing:
                self.notes.append(f"{_spell(flag, self.given[flag])}: without effect here: {FLAGS[flag].nothing}")
        for name in self.command.unset:
            self.notes.append(f"${name} is set nowhere in {self.command.where.partition(':')[0]}; put its value in")
        for name, value in self.command.environment.items():
            why = _SET_BY_HAND.get(name)
            if why:
                self.notes.append(f"{name}={value}: {why}; set it where you start the run")
            elif name != "CUDA_VISIBLE_DEVICES":
                self.notes.append(f"{name}={value}: not read here; set it where you start the run, if it is needed")
        if self.value("mm_use_im_patch_token"):
            self.notes.append("--mm_use_im_patch_token True: its row is never used, and is not made")
        if str(self.value("mm_patch_merge_type")) != "flat":
            self.notes.append("--mm_patch_merge_type: the original never trains with tiles; without effect")

    # ---- devices and the model ------------------------------------------------------------------------------------

    def _devices(self) -> int:
        """How many devices the command runs on. Raises RecipeError where it does not say so."""
        options = _launcher_options(self.command.launcher)
        nodes = options.get("nnodes") or options.get("num_nodes") or "1"
        each = next((options[k] for k in _PER_NODE if options.get(k, "").isdigit()), None)
        if each is None and "include" in options:
            each = str(sum(len(part.partition(":")[2].split(",")) for part in options["include"].split("@")))
        visible = self.command.environment.get("CUDA_VISIBLE_DEVICES")
        if each is None and visible:
            each = str(len(visible.split(",")))
        first = self.command.launcher[0].rpartition("/")[2] if self.command.launcher else ""
        if each is None and first.startswith("python") and not options:
            return 1
        if each is None or not nodes.isdigit():
            raise RecipeError(
                f"{self.command.where}: it does not say on how many devices it runs, which is part of its batch size; "
                "give --devices"
            )
        return int(each) * (1 if "world_size" in options else int(nodes))

    def _build(self) -> str | None:
        """The command that makes the folder to start from; None where the model has a projector already."""
        model, adapter = str(self.value("model_name_or_path")), self.value("pretrain_mm_mlp_adapter")
        if adapter is None and not self.value("tune_mm_mlp_adapter") and _is_whole(model) is not False:
            return None
        words = ["lapilli", "build", "--vision-encoder", str(self.value("vision_tower")), "--language-model", model]
        words += ["--projector", str(self.value("mm_projector_type"))]
        words += ["--feature-layer", str(self.value("mm_vision_select_layer"))]
        words += ["--feature-select", str(self.value("mm_vision_select_feature"))]
        if self.template in self.templates and self.template != "plain":
            words += ["--template", self.template]
        words += ["--image-mode", "pad" if self.value("image_aspect_ratio") == "pad" else "square"]
        words += ["--im-start-end"] if self.value("mm_use_im_start_end") else []
        words += ["--projector-weights", str(adapter)] if adapter else []
        return shlex.join([*words, "--out", _parts_folder(str(self.value("output_dir")))])

    def _text(self) -> str:
        build = self._build()
        if build is None:
            self.keys.insert(0, ("model", self.path("model_name_or_path"), "--model_name_or_path"))
            self.notes.append(
                f"model: {self.value('model_name_or_path')} is taken for a whole LLaVA model, since neither a "
                "projector is given nor one trained alone; a folder, so download it first. If it is a language model, "
                "join it with `lapilli build`"
            )
        else:
            out = os.path.relpath(Path.cwd() / _parts_folder(str(self.value("output_dir"))), self.folder)
            self.keys.insert(0, ("model", out, "what the command above makes; or an earlier stage's run folder"))
        head = [f"# From {self.command.where}: {self.command.program}"]
        head += ["#", "# The model to start from, made once:", f"#   {build}"] if build else []
        lines = [*head, ""]
        above: list[str] = []
        for key, value, said in self.keys:
            *sections, name = key.split(".")
            for depth, section in enumerate(sections):
                if above[: depth + 1] != sections[: depth + 1]:
                    lines.append("  " * depth + f"{section}:")
                    above = sections[: depth + 1]
            above = sections
            lines.append(f"{'  ' * len(sections)}{name}: {scalar(value)}  # {said}")
        return "\n".join(lines) + "\n"


_PER_NODE = ("nproc_per_node", "nproc-per-node", "num_gpus", "num_processes", "world_size")


def _launcher_options(words: tuple[str, ...]) -> dict[str, str]:
    options: dict[str, str] = {}
    for i, word in enumerate(words):
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            following = words[i + 1] if i + 1 < len(words) and not words[i + 1].startswith("-") else ""
            options[name] = value if equals else following
    return options


def _spell(flag: str, value: Value) -> str:
    return f"--{flag} {value}"


def _parts_folder(output: str) -> str:
    return f"{output.rstrip('/')}-start"


def _is_whole(model: str) -> bool | None:
    """Whether a folder's configuration has a vision encoder; None where there is no such folder to look into."""
    try:
        config = json.loads((Path(model) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return "mm_vision_tower" in config or "vision_config" in config
