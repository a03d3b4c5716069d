"""What a training run is: the typed recipe.

One YAML file becomes one `Recipe`. Every key has a type, a default and a sentence; an unknown key is an error that
names the nearest valid one. Nothing here imports torch, so a wrong recipe is reported at once.
"""

import re
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from lapilli.base.errors import nearest
from lapilli.recipe.subset import parse_subset

FreezeSet = Literal["projector", "freeze_vision", "full"]
Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Rate = Annotated[float, Field(ge=0)]
Momentum = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Source(Section):
    """One data file or folder, the root of its pictures, and its part in the mixture."""

    path: str
    """File or folder of conversations, in any format that lapilli reads; a relative path is relative to the recipe."""
    images: str | None = None
    """Folder or archive (.tar, .zip) that picture paths are relative to; no picture outside it is ever opened. Null:
    `data.images`."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """How often an epoch visits each record: the whole part of the weight, and once more for a share of the records
    as large as the rest, drawn anew for each epoch. Of training data only."""
    subset: str | None = None
    """The part of the file that is read: `0:1000` by record number from 0, end excluded, or `0.0-0.5` by share of all
    records. Null: all of it."""
    template: str | None = None
    """Name or YAML file of the template that renders this source; null: `data.template`. It is never exported."""

    @field_validator("subset")
    @classmethod
    def _known_subset(cls, value: str | None) -> str | None:
        if value is not None:
            parse_subset(value)
        return value


def _with_images(given: Any, images: Any) -> Any:
    """Complete one source: a plain path becomes a mapping, and the common picture folder is filled in."""
    one = {"path": given} if isinstance(given, str) else given
    if not isinstance(one, dict) or one.get("images") is not None or not isinstance(one.get("path"), str):
        return one
    return one if images is None else {**one, "images": images}


class Data(Section):
    """What is learned from. `train` and `validation` take a path, a mapping with the keys of a source, or a list."""

    train: tuple[Source, ...] = ()
    validation: tuple[Source, ...] = ()
    """Held-out data for the validation loss; empty: none is computed."""
    images: str | None = None
    """Picture folder of the sources that name none; null: where the data's format keeps its pictures, for JSON the
    folder of the file itself."""
    template: str | None = None
    """Name or YAML file of the template that renders conversations; null: the model folder's own. The exported model
    carries it, except `plain`, which has no turns to chat in: then the model keeps its own."""
    image_mode: Literal["square", "pad"] | None = None
    """How a picture becomes a square: cropped, or padded as LLaVA-1.5's stage 2 does; null: the model folder's own.
    The exported model carries it. Training with tiles (`anyres`) comes later."""
    placement: Literal["keep", "front"] = "keep"
    """`keep` leaves `<image>` where the user wrote it; `front` moves it to the front of its turn, as LLaVA does."""
    max_length: Positive = 2048
    """Longest conversation in tokens, image tokens included."""
    too_long: Literal["error", "drop", "truncate_turns"] = "error"
    """What happens to a longer one. `truncate_turns` drops whole exchanges from the end, never part of an image; a
    conversation whose first exchange alone is too long is dropped. All of them are counted and listed."""
    order: Literal["shuffled", "sequential", "length_groups", "modality_groups", "modality_groups_llava"] = "shuffled"
    """`length_groups`: the conversations of a step are of similar length in tokens; `modality_groups`: likewise, and
    all with pictures or all without. `modality_groups_llava` is the original's `group_by_modality_length`."""
    bad_records: Literal["error", "quarantine"] = "error"
    """What happens to a record that can't be used. `quarantine` leaves it out, lists it with its reason, and changes
    nothing else of the order."""
    max_bad_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.001
    """Part of all records that `quarantine` may leave out; one more stops the run."""
    image_backend: Literal["exact", "fast"] | None = None
    """How pictures are resized: `exact` as PIL does, `fast` within 2/255 of it; null: the model folder's own. The
    exported model carries it."""
    index: str | None = None
    """Folder that keeps what is known of data, for all runs; null: `index` in the user's cache folder
    (`$LAPILLI_CACHE`, else `$XDG_CACHE_HOME/lapilli` or `~/.cache/lapilli`)."""
    workers: Annotated[int, Field(ge=0)] = 2
    """Processes that read and tokenise; 0 reads in the training process."""
    max_image_pixels: Positive = 50_000_000
    """Pictures with more pixels are refused before they are decoded."""
    max_image_bytes: Positive = 100_000_000
    """Picture files with more bytes are refused before they are read."""

    @field_validator("image_mode", mode="before")
    @classmethod
    def _trainable_mode(cls, value: Any) -> Any:
        if value == "anyres":
            raise ValueError("training with tiles (anyres) comes later; use square or pad")
        return value

    @field_validator("validation")
    @classmethod
    def _unweighted(cls, value: tuple[Source, ...]) -> tuple[Source, ...]:
        for source in value:
            if source.weight != 1.0:
                raise ValueError(f"{source.path}: a weight is for training data; validation reads everything once")
        return value

    @model_validator(mode="before")
    @classmethod
    def _sources(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        value = dict(value)
        for split in ("train", "validation"):
            given = value.get(split)
            if isinstance(given, str | dict | Source):
                given = [given]
            if isinstance(given, list | tuple):
                value[split] = [_with_images(one, value.get("images")) for one in given]
        return value


class Lora(Section):
    """LoRA adapters on the language model's linear layers; the projector trains beside them in full."""

    r: Positive = 64
    """Rank of the adapters."""
    alpha: Positive = 16
    """The adapters' output is scaled by alpha / r."""
    dropout: Fraction = 0.05
    target_modules: tuple[str, ...] | None = None
    """Names of the linear layers to adapt, inside the language model; null adapts all but the output layer."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Which biases of the language model train beside the adapters."""
    quantise: Literal["nf4", "int8"] | None = None
    """QLoRA: hold the language model's linear layers in 4 bits (NF4, its scales quantised again) or in 8; all else, the
    projector too, stays as it is. Needs bitsandbytes."""
    vision: bool = False
    """Adapters on the vision encoder's linear layers too; the run then exports the whole model, merged."""

    @model_validator(mode="after")
    def _quantised(self) -> "Lora":
        if self.quantise is not None and self.bias != "none":
            raise ValueError(f"quantise: {self.quantise}, bias: {self.bias}: biases of quantised layers can't train")
        return self


class Evaluation(Section):
    """A task that is asked and scored while the model learns; see `lapilli tasks`."""

    task: str
    """Name of a task that lapilli knows, or a YAML file of your own."""
    data: str | None = None
    """The task's data folder, as `--data` of `lapilli evaluate`; null: beside the YAML file."""
    every: Positive | None = None
    """Steps between two evaluations; null: after the last step only. After the last step it always is."""
    limit: Positive | None = None
    """Ask only so many of the first questions; null: all."""


class Train(Section):
    """What is learned, and how: every key here changes the result."""

    freeze: FreezeSet | tuple[str, ...] = "freeze_vision"
    """What trains. `projector`: it alone; `freeze_vision`: projector and language model; `full`: everything.
    A list of regular expressions freezes the parameters whose name matches one of them; the rest trains."""
    lora: Lora | None = None
    """With LoRA the language model itself is frozen whatever `freeze` says."""
    train_type: Literal["full", "use_lora", "freeze_vision"] | None = None
    """Another way to say `freeze: full`, `lora: {}` (with `freeze: freeze_vision`) or `freeze: freeze_vision`, as other
    tools do."""
    epochs: Annotated[float, Field(gt=0)] = 1.0
    """Passes over the data; a part of a pass is a part of its steps, rounded up."""
    max_steps: Positive | None = None
    """Stop after this many optimiser steps; overrides `epochs`."""
    global_batch_size: Positive = 128
    """Samples per optimiser step, over all devices and micro-batches. The last, shorter batch of an epoch is kept."""
    tokens_per_micro_batch: Positive = 8192
    """Packed micro-batches hold at most this many tokens; it decides memory, never what is learned."""
    loss_reduction: Literal["tokens", "microbatch_mean"] = "tokens"
    """`tokens`: mean over the supervised tokens of the whole step. `microbatch_mean`: the original's arithmetic, mean
    per micro-batch of `micro_batch_size` consecutive samples, then mean over micro-batches."""
    micro_batch_size: Positive | None = None
    """Samples per micro-batch, for `microbatch_mean` only."""
    learning_rate: Rate = 2e-5
    """The highest one, reached after warm-up."""
    projector_learning_rate: Rate | None = None
    """Null: the same as `learning_rate`."""
    vision_learning_rate: Rate | None = None
    """Null: the same as `learning_rate`."""
    optimizer: Literal["adamw", "adamw_8bit", "adamw_bf16", "sgd"] = "adamw"
    """Memory of its state per trained number: `adamw` 8 bytes; `adamw_8bit` 2 (bitsandbytes); `adamw_bf16` 4, rounded
    by chance so that small changes count; `sgd` none, or 4 with momentum."""
    betas: tuple[Momentum, Momentum] = (0.9, 0.999)
    """adamw, of all kinds: how slowly its averages of gradient and squared gradient forget."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """adamw, of all kinds: added to the denominator."""
    momentum: Momentum = 0.0
    """sgd only."""
    weight_decay: Rate = 0.0
    """Applied to matrices, never to biases and norms."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_ratio: Fraction = 0.03
    """Part of all steps, rounded up, during which the learning rate rises linearly; the first step runs at 0."""
    min_learning_rate_ratio: Fraction = 0.0
    """The schedule ends at this part of the learning rate."""
    max_grad_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """Gradients are scaled down to this norm where they exceed it; null: never."""
    gradient_checkpointing: Literal["none", "selective", "full"] = "none"
    """`full` recomputes each layer of the trained parts in the backward pass: less memory, about a third slower.
    `selective` keeps what matrix products and attention made and recomputes the cheap rest."""
    non_finite: Literal["stop", "skip", "bisect"] = "stop"
    """What happens to a step whose loss or gradient is not finite; no weight ever changes by it. `stop` ends the run,
    `skip` goes on without the step, `bisect` ends the run with the samples that give it by themselves."""
    max_skipped_steps: Positive = 3
    """Steps that `non_finite: skip` may leave out in a run; one more stops it."""
    validate_every: Positive | None = None
    """Steps between validation losses; null: at the end only, when `data.validation` is given."""
    evaluate: tuple[Evaluation, ...] = ()
    """Tasks whose scores, by the original's protocol, are followed in `metrics.jsonl` and the run's report."""
    save_every: Positive | None = None
    """Steps between checkpoints; null: at the end only."""
    keep_checkpoints: Positive = 1
    """Older checkpoints are deleted when a newer one is complete."""
    keep_best: Annotated[int, Field(ge=0)] = 0
    """So many checkpoints with the smallest validation loss stay beside the newest; a step whose validation loss is
    among them is always saved. `checkpoints/best.json` names the best."""
    average_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Keep a moving average of the trained weights, of which each step leaves this part (0.999, say); it costs 4 bytes
    for each of them. Null: none is kept."""
    export: Literal["last", "best", "average"] = "last"
    """Which weights `model/` holds: the last step's, those with the smallest validation loss (needs `keep_best`), or
    the moving average (needs `average_decay`)."""

    @model_validator(mode="before")
    @classmethod
    def _by_type(cls, value: Any) -> Any:
        kind = value.get("train_type") if isinstance(value, dict) else None
        if kind not in ("full", "use_lora", "freeze_vision"):
            return value
        given = {key: value.get(key) for key in ("freeze", "lora")}
        meant = {"freeze": "full" if kind == "full" else "freeze_vision"}
        if given["freeze"] not in (None, meant["freeze"]):
            raise ValueError(f"train_type: {kind} contradicts freeze: {given['freeze']}; leave one of them out")
        if kind != "use_lora" and given["lora"] is not None:
            raise ValueError(f"train_type: {kind} contradicts lora; say use_lora, or leave one of them out")
        return value | meant | ({"lora": {} if given["lora"] is None else given["lora"]} if kind == "use_lora" else {})

    @field_validator("freeze", mode="before")
    @classmethod
    def _freeze(cls, value: Any) -> Any:
        names = get_args(FreezeSet)
        if isinstance(value, str) and value not in names:
            raise ValueError(
                f'unknown frozen set "{value}"{nearest(value, names)}; known: {", ".join(names)}, '
                "or a list of regular expressions over parameter names"
            )
        for pattern in value if isinstance(value, list | tuple) else ():
            try:
                re.compile(pattern)
            except (re.error, TypeError) as error:
                raise ValueError(f'"{pattern}" is not a regular expression: {error}') from error
        return value

    @model_validator(mode="after")
    def _exported(self) -> "Train":
        if self.export == "best" and not self.keep_best:
            raise ValueError("export: best needs keep_best: 1 or more")
        if self.export == "average" and self.average_decay is None:
            raise ValueError("export: average needs average_decay (0.999, say)")
        return self

    @model_validator(mode="after")
    def _micro_batch(self) -> "Train":
        if (self.micro_batch_size is not None) != (self.loss_reduction == "microbatch_mean"):
            raise ValueError(
                "micro_batch_size and loss_reduction: microbatch_mean belong together "
                "(otherwise micro-batches are packed by tokens_per_micro_batch)"
            )
        return self


class Fsdp(Section):
    """How `run.engine: fsdp` splits the model; without meaning for other engines."""

    frozen: Literal["replicate", "shard"] = "replicate"
    """What does not train: whole in every process, or split as what trains is and gathered where it is needed."""
    reshard: bool | Positive = True
    """Let go of a layer's gathered weights between its forward and its backward pass; false keeps them, which takes
    memory and saves sending them again; a number keeps them split over so many processes, as those of one machine."""
    offload: bool = False
    """Keep weights, gradients and the optimiser's state in the CPU's memory; the optimiser then steps there."""
    reduce: Literal["fp32", "bf16"] = "fp32"
    """Precision in which gradients are sent and summed."""


class DeepSpeed(Section):
    """How `run.engine: deepspeed` splits the model; without meaning for other engines."""

    zero: Literal[1, 2, 3] | None = None
    """What is split over the processes: 1, the optimiser's state; 2, gradients too; 3, weights too, frozen ones
    included. Null: what `config` says, else 2."""
    offload_optimizer: bool | None = None
    """Keep the optimiser's state in the CPU's memory, where it then steps. Null: what `config` says, else false."""
    offload_parameters: bool | None = None
    """Keep split weights in the CPU's memory; with `zero: 3` only. Null: what `config` says, else false."""
    config: str | None = None
    """A DeepSpeed JSON file of your own; a relative path is relative to the recipe. What is "auto" in it is filled from
    the recipe, what contradicts the recipe is an error, and what has no effect is said."""


class Run(Section):
    """Where and how the run is carried out; nothing here changes what is learned beyond rounding."""

    device: Literal["auto", "cpu", "cuda", "hpu"] = "auto"
    """`auto` takes CUDA where there is one, else an Intel Gaudi (`hpu`), else the CPU."""
    hpu_mode: Literal["eager", "lazy"] = "eager"
    """How a Gaudi executes: operation by operation (`run.compile` compiles layers), or in graphs that it collects while
    the program runs, which Intel develops no further. Without meaning elsewhere."""
    static_shapes: Annotated[int, Field(ge=0)] | None = None
    """Batches are padded to at most so many shapes, because each one is compiled; 0: packed without padding. Null: 8 on
    a Gaudi, else 0."""
    engine: Literal["auto", "single", "ddp", "fsdp", "deepspeed"] = "auto"
    """How several processes, started by torchrun or SLURM, train together: `ddp` has the whole model in each of them,
    `fsdp` splits it over them, `deepspeed` does so by ZeRO. `auto` is `single` for one process, else `ddp`."""
    fsdp: Fsdp = Fsdp()
    deepspeed: DeepSpeed = DeepSpeed()
    precision: Literal["fp32", "bf16"] = "bf16"
    """bf16 holds trained weights in fp32 and computes in bf16; frozen weights are held in bf16. What was really
    computed is printed after the first step."""
    tf32: bool = False
    """Let CUDA round the inputs of fp32 matrix products to TF32; without meaning elsewhere, which is said."""
    attention: Literal["auto", "flash_attention_2", "sdpa", "eager"] = "auto"
    """What computes attention: PyTorch's variable-length FlashAttention-2 (CUDA, bf16), its
    scaled_dot_product_attention, or plain matrix products. `auto` takes the first that can."""
    compile: bool = False
    """Compile the layers of encoder and language model with torch.compile: one program for all layers and lengths. The
    first steps wait for the compiler."""
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Services that get every step's numbers beside `metrics.jsonl`; their packages are installed apart."""
    seed: int = 42
    """Of the sample order, of new weights and of dropout."""
    checkpoints: Literal["async", "sync"] = "async"
    """`async`: the state is copied to the CPU and written while training goes on; `sync`: training waits for it, which
    needs no memory for a copy."""
    deterministic: bool = False
    """Bit-for-bit repeatable on the same machine with the same number of threads; slower."""
    threads: Positive | None = None
    """CPU threads for PyTorch; null: its own default."""


class Stage(Section):
    """One training run: which model it starts from, on which data, how."""

    name: str = "train"
    model: str | None = None
    """A model folder, or the run folder of an earlier stage (its `model/` is taken)."""
    out: str | None = None
    """The run folder that is written."""
    data: Data = Data()
    train: Train = Train()
    run: Run = Run()

    @model_validator(mode="after")
    def _validated(self) -> "Stage":
        if self.train.keep_best and not self.data.validation:
            raise ValueError("train.keep_best needs data.validation: it goes by the validation loss")
        return self


class Recipe(Section):
    """One or more stages in order. A stage that names no model starts from the one before it."""

    stages: tuple[Stage, ...]
