"""What DeepSpeed is told: from the recipe, and from a DeepSpeed JSON of the user's where the recipe names one.

A recipe says all that such a file says about learning, so the file never decides it: what is "auto" there is filled
from the recipe, what says the same is taken, and what says something else is an error that names both. Every key that
is not handed on is named with its reason. Nothing here needs DeepSpeed, so a wrong file is reported at once.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lapilli.base.errors import RecipeError
from lapilli.recipe.schema import Run, Train

AUTO = "auto"
_ZERO = "zero_optimization"
_SIZES: dict[str, float] = {
    "reduce_bucket_size": 1.0,
    "stage3_prefetch_bucket_size": 0.9,
    "stage3_param_persistence_threshold": 0.0,
}
"""Sizes that may be "auto", as parts of the square of the language model's width; the last is 10 widths. They are what
transformers' Trainer, which the originals trained with, fills in."""

_BATCHES = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
_ADAM = ("adam", "adamw")

_HANDED_ON = {
    "steps_per_print", "wall_clock_breakdown", "dump_state", "memory_breakdown", "log_level", "flops_profiler",
    "comms_logger", "tensorboard", "wandb", "csv_monitor", "comet", "communication_data_type", "prescale_gradients",
    "gradient_predivide_factor", "disable_allgather", "timers", "data_types", "gradient_allreduce_op",
}  # fmt: skip
"""Keys of the file that mean to DeepSpeed under lapilli what its documentation says."""

_HANDED_ON_ZERO = {
    "stage", "contiguous_gradients", "reduce_scatter", "reduce_bucket_size", "use_multi_rank_bucket_allreduce",
    "allgather_partitions", "allgather_bucket_size", "overlap_comm", "sub_group_size", "round_robin_gradients",
    "ignore_unused_parameters", "memory_efficient_linear", "log_trace_cache_warnings", "enable_sanity_checks",
    "zero_hpz_partition_size", "offload_optimizer", "offload_param", "stage3_prefetch_bucket_size",
    "stage3_param_persistence_threshold", "stage3_model_persistence_threshold", "stage3_max_live_parameters",
    "stage3_max_reuse_distance", "stage3_module_granularity_threshold", "stage3_use_all_reduce_for_fetch_params",
    "override_module_apply",
}  # fmt: skip

_LEFT_OUT = {
    "activation_checkpointing": "train.gradient_checkpointing decides",
    "zero_allow_untested_optimizer": "always true: the optimiser is lapilli's own",
    "zero_force_ds_cpu_optimizer": "always false: the optimiser is PyTorch's, on the CPU too, so that nothing is "
    "compiled",
    "managed_gradient_accumulation": "lapilli says itself which pass is the last of a step",
    "checkpoint": "lapilli writes checkpoints itself, for every engine alike",
    "use_node_local_storage": "lapilli writes checkpoints itself, for every engine alike",
    "dataloader_drop_last": "lapilli reads the data itself",
}
"""Keys with no effect under lapilli, and why."""

_LEFT_OUT_ZERO = {
    "stage3_gather_16bit_weights_on_model_save": "lapilli gathers and writes model/ itself",
    "gather_16bit_weights_on_model_save": "lapilli gathers and writes model/ itself",
    "stage3_gather_fp16_weights_on_model_save": "lapilli gathers and writes model/ itself",
    "elastic_checkpoint": "checkpoints are lapilli's own, and any number of processes goes on from them",
    "load_from_fp32_weights": "checkpoints are lapilli's own, and hold fp32 weights",
}

_REFUSED = {
    "amp": "lapilli computes in what run.precision says",
    "torch_autocast": "lapilli computes in what run.precision says",
    "elasticity": "the size of a batch is train.global_batch_size, in any number of processes",
    "autotuning": "lapilli runs the recipe that it is given",
    "curriculum_learning": "what a step holds is decided by data.order",
    "data_efficiency": "what a step holds is decided by data.order",
    "progressive_layer_drop": "it drops layers of the model",
    "compression_training": "it changes the model",
    "hybrid_engine": "lapilli trains and answers with engines of its own",
}
"""Sections that would change what is learned, or need a trainer that drives them; an error where they are enabled."""

_REFUSED_ZERO = {
    "mics_shard_size": "lapilli lays checkpoints out over all processes",
    "zenflow": "it needs an optimiser of DeepSpeed's own",
    "cpu_offload": "it is DeepSpeed's old word; write offload_optimizer: {device: cpu}",
    "cpu_offload_param": "it is DeepSpeed's old word; write offload_param: {device: cpu}",
}


@dataclass(frozen=True)
class DeepSpeedSettings:
    """`config` is for `deepspeed.initialize`, but that sizes may still be "auto"; `notes` are lines for the user."""

    config: dict[str, Any]
    stage: int
    offload_parameters: bool
    notes: tuple[str, ...] = ()

    def sized(self, width: int) -> dict[str, Any]:
        """Return the configuration with sizes for a language model of this width."""
        zero = dict(self.config[_ZERO])
        for key, part in _SIZES.items():
            if zero.get(key) == AUTO:
                zero[key] = int(part * width * width) if part else 10 * width
        return {**self.config, _ZERO: zero}


def deepspeed_settings(train: Train, run: Run, processes: int, device: str) -> DeepSpeedSettings:
    """Return what DeepSpeed is told for this recipe, on `device` (cpu, cuda, hpu).

    Raises RecipeError, naming file and key, for a file that can't be read or that contradicts the recipe.
    """
    path = run.deepspeed.config
    given = _read(path) if path else {}
    return _Translation(train, run, given, Path(path).name if path else "", processes, device).settings()


def _read(path: str) -> dict[str, Any]:
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise RecipeError(f"run.deepspeed.config: {path}: can't be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise RecipeError(f"run.deepspeed.config: {path}: a DeepSpeed configuration is a JSON object")
    return content


class _Translation:
    """One file against one recipe. `_given` is what is left of the file to deal with."""

    def __init__(self, train: Train, run: Run, given: dict[str, Any], file: str, processes: int, device: str) -> None:
        self._train, self._run = train, run
        self._given, self._file = dict(given), file
        self._processes, self._device = processes, device
        self._notes: list[str] = []
        self._problems: list[str] = []

    def settings(self) -> DeepSpeedSettings:
        config: dict[str, Any] = self._precision() | self._batches() | {"gradient_clipping": self._clipping()}
        self._optimizer()
        self._scheduler()
        zero = self._zero(self._section(_ZERO))
        config |= {_ZERO: zero, "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
        config |= self._others()
        # Gradients of a step's passes are added up in fp32, unless the file says otherwise.
        config["data_types"] = {"grad_accum_dtype": "fp32", **(config.get("data_types") or {})}
        self._problems += [
            f'{self._named(key)} is "auto", which lapilli has nothing to fill with; give a value or leave it out'
            for key in _autos(config)
            if key.removeprefix(f"{_ZERO}.") not in _SIZES
        ]
        if self._problems:
            raise RecipeError("\n".join(self._problems))
        offload = zero.get("offload_param") is not None
        return DeepSpeedSettings(config, zero["stage"], offload, tuple(self._notes))

    # ---- what the recipe decides ------------------------------------------------------------------------------------

    def _precision(self) -> dict[str, Any]:
        fp16, bf16, precision = self._section("fp16"), self._section("bf16"), self._run.precision
        if fp16.get("enabled") is True:
            self._differs("fp16.enabled", True, "run.precision", precision, "lapilli has bf16 and fp32")
        elif fp16:
            self._note("fp16", f"not used: run.precision is {precision}; a loss scale belongs to fp16 alone")
        self._agree("bf16.enabled", bf16.pop("enabled", AUTO), "run.precision", precision, precision == "bf16")
        for key in ("bf16_master_weights_and_grads", "bf16_optimizer_states"):
            if bf16.pop(key, False):
                self._problem(f"bf16.{key}", "lapilli's trained weights and the optimiser's state are fp32")
        if bf16.pop("check_grad_overflow", True) is not True:
            self._note("bf16.check_grad_overflow", "always true: a gradient that is not finite never reaches weights")
        return {"bf16": {**bf16, "enabled": precision == "bf16", "check_grad_overflow": True}}

    def _batches(self) -> dict[str, Any]:
        given = {key: self._given.pop(key) for key in _BATCHES if key in self._given}
        numbers = {key: value for key, value in given.items() if value != AUTO}
        whole = numbers.get("train_batch_size")
        if whole is None and {*_BATCHES[1:]} <= numbers.keys():
            whole = numbers[_BATCHES[1]] * numbers[_BATCHES[2]] * self._processes
            product = f"{_BATCHES[1]} x {_BATCHES[2]} x {self._processes} processes"
            self._agree(product, whole, "train.global_batch_size", self._train.global_batch_size)
        elif whole is not None:
            self._agree(_BATCHES[0], whole, "train.global_batch_size", self._train.global_batch_size)
        if self._train.micro_batch_size is not None:
            micro = numbers.get(_BATCHES[1], AUTO)
            self._agree(_BATCHES[1], micro, "train.micro_batch_size", self._train.micro_batch_size)
        if given:
            packed = (
                f"{self._train.micro_batch_size} samples each"
                if self._train.micro_batch_size
                else f"at most {self._train.tokens_per_micro_batch} tokens each"
            )
            self._note(
                ", ".join(given),
                f"a step has train.global_batch_size {self._train.global_batch_size} samples, in as many passes as "
                f"they take at {packed}",
            )
        return {_BATCHES[0]: self._processes, _BATCHES[1]: 1, _BATCHES[2]: 1}

    def _clipping(self) -> float:
        norm = self._train.max_grad_norm or 0.0
        self._agree("gradient_clipping", self._given.pop("gradient_clipping", AUTO), "train.max_grad_norm", norm)
        return norm

    def _optimizer(self) -> None:
        given, train = self._section("optimizer"), self._train
        if not given:
            return
        kind, params = str(given.pop("type", "")), self._parameters(given, "optimizer")
        if kind.lower() not in (_ADAM if train.optimizer.startswith("adamw") else (train.optimizer,)):
            self._differs("optimizer.type", kind, "train.optimizer", train.optimizer)
        if train.optimizer.startswith("adamw") and params.pop("adam_w_mode", True) is not True:
            self._differs("optimizer.params.adam_w_mode", False, "train.optimizer", train.optimizer)
        betas = params.pop("betas", AUTO)
        for key, value, name, mine in (
            ("lr", params.pop("lr", AUTO), "learning_rate", train.learning_rate),
            ("weight_decay", params.pop("weight_decay", AUTO), "weight_decay", train.weight_decay),
            ("eps", params.pop("eps", AUTO), "eps", train.eps),
            ("betas", betas if betas == AUTO else tuple(betas), "betas", train.betas),
            ("momentum", params.pop("momentum", AUTO), "momentum", train.momentum),
        ):
            self._agree(f"optimizer.params.{key}", value, f"train.{name}", mine)
        for key in params:
            self._note(f"optimizer.params.{key}", f"train.optimizer {train.optimizer} has no such setting")
        self._note(
            "optimizer",
            f"train.optimizer {train.optimizer} is what it asks for. In the original this section took the place of "
            "the trainer's optimiser, and with it of the projector's own learning rate and of biases and norms without "
            "weight decay; here train.projector_learning_rate and the rest hold",
        )

    def _scheduler(self) -> None:
        given, train = self._section("scheduler"), self._train
        if not given:
            return
        kind, params = str(given.pop("type", "")), self._parameters(given, "scheduler")
        self._agree("scheduler.params.warmup_min_lr", params.pop("warmup_min_lr", AUTO), "the first step's rate", 0)
        highest = params.pop("warmup_max_lr", AUTO)
        self._agree("scheduler.params.warmup_max_lr", highest, "train.learning_rate", train.learning_rate)
        for key, value in params.items():
            if value != AUTO:
                self._problem(f"scheduler.params.{key}", f"is {value}; train.warmup_ratio and train.schedule decide")
        does = "warms up along a logarithm and then keeps the rate" if kind == "WarmupLR" else "has its own"
        self._note(
            "scheduler",
            f"train.schedule {train.schedule} decides. In the original this section took the place of the trainer's "
            f"schedule: {kind} {does}, so that runs with this file had no cosine; train.schedule=constant is nearest",
        )

    # ---- ZeRO -------------------------------------------------------------------------------------------------------

    def _zero(self, given: dict[str, Any]) -> dict[str, Any]:
        wanted = self._run.deepspeed
        stage = given.get("stage", wanted.zero or 2)
        if stage not in (1, 2, 3):
            self._problem(f"{_ZERO}.stage", f"is {stage}; ZeRO has stages 1, 2 and 3 (run.engine: ddp splits nothing)")
        if wanted.zero is not None:
            self._agree(f"{_ZERO}.stage", stage, "run.deepspeed.zero", wanted.zero)
        zero: dict[str, Any] = {"overlap_comm": True, "contiguous_gradients": True, "reduce_bucket_size": AUTO}
        if stage == 3:
            zero |= {"stage3_prefetch_bucket_size": AUTO, "stage3_param_persistence_threshold": AUTO}
        zero |= {key: value for key, value in given.items() if key not in (*_LEFT_OUT_ZERO, *_REFUSED_ZERO)}
        zero["stage"] = stage
        for key, why in _LEFT_OUT_ZERO.items():
            if key in given:
                self._note(f"{_ZERO}.{key}", f"no effect: {why}")
        for key, why in _REFUSED_ZERO.items():
            if given.get(key) not in (None, False, 0, -1):
                self._problem(f"{_ZERO}.{key}", f"is {given[key]}: {why}")
        for key in sorted(given.keys() - _HANDED_ON_ZERO - _LEFT_OUT_ZERO.keys() - _REFUSED_ZERO.keys()):
            self._note(f"{_ZERO}.{key}", "not known to lapilli, handed to DeepSpeed as it is")
        self._offload(zero, "offload_optimizer", wanted.offload_optimizer)
        self._offload(zero, "offload_param", wanted.offload_parameters)
        if zero.get("offload_param") and stage != 3:
            self._problem(f"{_ZERO}.offload_param", "belongs to stage 3: only there weights are split")
        if self._device == "hpu":
            for key in ("overlap_comm", "allgather_partitions"):
                if zero.get(key) is not False and (key in given or key == "overlap_comm"):
                    self._note(f"{_ZERO}.{key}", "false on hpu, as in the files of LLaVA's Gaudi version")
                zero[key] = False
        return zero

    def _offload(self, zero: dict[str, Any], key: str, wanted: bool | None) -> None:
        given = zero.get(key) or {}
        device = given.get("device", "none")
        name = "run.deepspeed." + ("offload_optimizer" if key == "offload_optimizer" else "offload_parameters")
        if device == "nvme":
            self._problem(f"{_ZERO}.{key}.device", "is nvme, which lapilli's checkpoints don't reach; use cpu")
        if given.get("ratio", 1.0) != 1.0 or given.get("super_offload"):
            self._problem(f"{_ZERO}.{key}", "ratio and super_offload need an optimiser of DeepSpeed's own")
        if given and wanted is not None:
            self._agree(f"{_ZERO}.{key}.device", device, name, wanted, "cpu" if wanted else "none")
        if wanted and not given:
            zero[key] = {"device": "cpu", "pin_memory": True}
        elif device in ("none", None):
            zero.pop(key, None)

    # ---- everything else --------------------------------------------------------------------------------------------

    def _others(self) -> dict[str, Any]:
        config: dict[str, Any] = {}
        for key, value in self._given.items():
            if key in _LEFT_OUT:
                self._note(key, f"no effect: {_LEFT_OUT[key]}")
            elif key in _REFUSED:
                if not isinstance(value, Mapping) or value.get("enabled", True) is not False:
                    self._problem(key, f"is not for lapilli: {_REFUSED[key]}")
            elif key == "gradient_allreduce_op" and value != "mean":
                self._problem(key, f"is {value}: lapilli turns DeepSpeed's mean into a sum itself; leave it out")
            elif key == "communication_data_type" and value == AUTO:
                self._note(key, "left to DeepSpeed, which sends in what gradients are held in")
            else:
                if key not in _HANDED_ON:
                    self._note(key, "not known to lapilli, handed to DeepSpeed as it is")
                config[key] = value
        return config

    # ---- words ------------------------------------------------------------------------------------------------------

    def _section(self, key: str) -> dict[str, Any]:
        value = self._given.pop(key, None) or {}
        if not isinstance(value, dict):
            self._problem(key, f"is {value!r}, not a section")
            return {}
        return dict(value)

    def _parameters(self, given: dict[str, Any], name: str) -> dict[str, Any]:
        params = given.pop("params", None) or {}
        for key in given:
            self._note(f"{name}.{key}", "no effect")
        return dict(params)

    def _agree(self, key: str, value: Any, name: str, mine: Any, same: Any = None) -> None:
        """Complain unless the file's `value` is "auto" or what the recipe's `mine` comes to."""
        if value not in (AUTO, mine if same is None else same):
            self._differs(key, value, name, mine)

    def _differs(self, key: str, value: Any, name: str, mine: Any, more: str = "") -> None:
        said = str(value).lower() if isinstance(value, bool) else value
        ours = str(mine).lower() if isinstance(mine, bool) else mine
        end = f"; {more}" if more else '; change one of them, or write "auto"'
        self._problems.append(f"{self._named(key)} is {said}, and the recipe has {name}: {ours}{end}")

    def _problem(self, key: str, text: str) -> None:
        self._problems.append(f"{self._named(key)} {text}")

    def _note(self, key: str, text: str) -> None:
        self._notes.append(f"{self._named(key)}: {text}")

    def _named(self, key: str) -> str:
        return f"{self._file}: {key}" if self._file else f"run.deepspeed: {key}"


def _autos(config: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Dotted keys whose value is "auto"."""
    found: list[str] = []
    for key, value in config.items():
        if isinstance(value, Mapping):
            found += _autos(value, f"{prefix}{key}.")
        elif value == AUTO:
            found.append(prefix + key)
    return found
