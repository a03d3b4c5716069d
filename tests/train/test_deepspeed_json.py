"""A user's DeepSpeed JSON: what is filled from the recipe, what is said, what is refused."""

import json
from pathlib import Path

import pytest

from lapilli.base.errors import RecipeError, RunError
from lapilli.recipe.load import load_recipe
from lapilli.recipe.schema import DeepSpeed, Run, Train
from lapilli.train.parallel import deepspeed
from lapilli.train.parallel.deepspeed_json import deepspeed_settings

ORIGINALS = Path(__file__).parents[1] / "reference/deepspeed"
SIZES = {
    "reduce_bucket_size": 4096 * 4096,
    "stage3_prefetch_bucket_size": 15_099_494,
    "stage3_param_persistence_threshold": 40_960,
}
"""What transformers' Trainer fills in for a model of width 4,096."""


def settings(path=None, train=None, device="cuda", processes=8, precision="bf16", **wanted):
    run = Run(engine="deepspeed", precision=precision, deepspeed=DeepSpeed(config=path and str(path), **wanted))
    return deepspeed_settings(train or Train(), run, processes, device)


@pytest.fixture
def file(tmp_path):
    def write(content):
        path = tmp_path / "own.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    return write


def said(found, key):
    """The one note about a key."""
    (line,) = [line for line in found.notes if line.partition(": ")[2].split(":")[0] == key]
    return line


def test_without_a_file_the_recipe_says_all():
    found = settings(zero=3, offload_optimizer=True)
    assert found.notes == ()
    assert found.stage == 3
    config = found.sized(4096)
    assert {key: config["zero_optimization"][key] for key in SIZES} == SIZES
    assert config["zero_optimization"]["offload_optimizer"] == {"device": "cpu", "pin_memory": True}
    assert "offload_param" not in config["zero_optimization"]
    assert config["bf16"] == {"enabled": True, "check_grad_overflow": True}
    assert (config["train_batch_size"], config["gradient_clipping"]) == (8, 1.0)
    assert settings().stage == 2
    assert settings(precision="fp32").config["bf16"]["enabled"] is False


@pytest.mark.parametrize(("name", "stage"), [("zero2", 2), ("zero3", 3), ("zero3_offload", 3)])
def test_the_originals_files_work_as_they_are(name, stage):
    found = settings(ORIGINALS / f"{name}.json")
    assert found.stage == stage
    zero = found.sized(4096)["zero_optimization"]
    given = json.loads((ORIGINALS / f"{name}.json").read_text())["zero_optimization"]
    left_out = [key for key in given if "gather_16bit" in key]
    assert zero == {
        key: SIZES[key] if value == "auto" else value for key, value in given.items() if key not in left_out
    }
    for key in left_out:
        assert "lapilli gathers and writes model/ itself" in said(found, f"zero_optimization.{key}")
    assert "a loss scale belongs to fp16" in said(found, "fp16")
    assert not {"fp16", "optimizer", "scheduler"} & found.config.keys()
    batches = [line for line in found.notes if "train_batch_size" in line]
    assert len(batches) == 1
    assert "train.global_batch_size 128 samples" in batches[0]
    assert "at most 8192 tokens each" in batches[0]


def test_the_scheduler_that_took_the_place_of_cosine_is_explained():
    found = settings(ORIGINALS / "zero3_offload.json")
    assert "train.schedule cosine decides" in said(found, "scheduler")
    assert "WarmupLR warms up along a logarithm and then keeps the rate" in said(found, "scheduler")
    assert "train.schedule=constant" in said(found, "scheduler")
    assert "projector's own learning rate" in said(found, "optimizer")
    assert found.config["steps_per_print"] == 1e5
    assert found.offload_parameters
    assert {line.split(": ")[1] for line in found.notes} == {
        "fp16", "train_batch_size, train_micro_batch_size_per_gpu, gradient_accumulation_steps", "optimizer",
        "scheduler", "zero_optimization.gather_16bit_weights_on_model_save",
    }  # fmt: skip


def test_on_a_gaudi_the_files_are_those_of_its_document():
    found = settings(ORIGINALS / "zero3.json", device="hpu")
    assert (found.config["zero_optimization"]["overlap_comm"], found.stage) == (False, 3)
    assert "false on hpu" in said(found, "zero_optimization.overlap_comm")
    zero = settings(ORIGINALS / "zero2.json", device="hpu").config["zero_optimization"]
    assert (zero["allgather_partitions"], zero["overlap_comm"]) == (False, False)


def adam(**params):
    return {"optimizer": {"type": "AdamW", "params": params}}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"bf16": {"enabled": False}}, "bf16.enabled is false, and the recipe has run.precision: bf16"),
        ({"fp16": {"enabled": True}}, "fp16.enabled is true, and the recipe has run.precision: bf16"),
        ({"train_batch_size": 64}, "train_batch_size is 64, and the recipe has train.global_batch_size: 128"),
        (
            {"train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 2},
            "x 8 processes is 64, and the recipe has train.global_batch_size: 128",
        ),
        ({"gradient_clipping": 0.5}, "gradient_clipping is 0.5, and the recipe has train.max_grad_norm: 1.0"),
        (adam(lr=1e-3), "optimizer.params.lr is 0.001, and the recipe has train.learning_rate: 2e-05"),
        (adam(betas=[0.9, 0.95]), r"optimizer.params.betas is \(0.9, 0.95\), and .* train.betas: \(0.9, 0.999\)"),
        (adam(adam_w_mode=False), "adam_w_mode is false"),
        ({"optimizer": {"type": "Lion"}}, "optimizer.type is Lion, and the recipe has train.optimizer: adamw"),
        (
            {"scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 1}}},
            "warmup_max_lr is 1, and the recipe has train.learning_rate: 2e-05",
        ),
        ({"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 9}}}, "warmup_num_steps is 9; train.warmup"),
        ({"zero_optimization": {"stage": 0}}, "zero_optimization.stage is 0; ZeRO has stages 1, 2 and 3"),
        ({"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}, "offload_param belongs to stage 3"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, "is nvme"),
        ({"zero_optimization": {"stage": 3, "mics_shard_size": 4}}, "mics_shard_size is 4"),
        ({"zero_optimization": {"allgather_bucket_size": "auto"}}, 'allgather_bucket_size is "auto", which lapilli'),
        ({"elasticity": {"enabled": True}}, "elasticity is not for lapilli"),
        ({"gradient_allreduce_op": "sum"}, "gradient_allreduce_op is sum"),
        ("{", "own.json: can't be read as JSON"),
        ("[]", "is a JSON object"),
    ],
)
def test_what_contradicts_the_recipe_is_refused(file, content, message):
    with pytest.raises(RecipeError, match=message):
        settings(file(content))


def test_all_of_it_at_once(file):
    with pytest.raises(RecipeError) as caught:
        settings(file({"bf16": {"enabled": False}, "train_batch_size": 64, "zero_optimization": {"stage": 3}}), zero=2)
    lines = str(caught.value).splitlines()
    assert len(lines) == 3
    assert all(line.startswith("own.json: ") for line in lines)
    assert "zero_optimization.stage is 3, and the recipe has run.deepspeed.zero: 2" in lines[2]


def test_what_says_the_same_as_the_recipe_is_taken(file):
    train = Train(learning_rate=1e-3, micro_batch_size=4, loss_reduction="microbatch_mean", max_grad_norm=None)
    found = settings(
        file(
            {
                "train_batch_size": 128, "train_micro_batch_size_per_gpu": 4, "gradient_clipping": 0,
                "bf16": {"enabled": True}, "zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}},
                **adam(lr=1e-3, weight_decay=0.0),
            }
        ),
        train, offload_optimizer=True,
    )  # fmt: skip
    assert found.stage == 1
    assert found.config["zero_optimization"]["offload_optimizer"] == {"device": "cpu"}
    with pytest.raises(RecipeError, match=r"micro_batch_size_per_gpu is 8, .* train\.micro_batch_size: 4"):
        settings(file({"train_micro_batch_size_per_gpu": 8}), train)


def test_what_lapilli_does_not_know_is_handed_on_and_said(file):
    found = settings(
        file({"new_thing": {"x": 1}, "aio": {}, "zero_optimization": {"newer": 2}, "amp": {"enabled": False}})
    )
    assert (found.config["new_thing"], found.config["zero_optimization"]["newer"]) == ({"x": 1}, 2)
    for key in ("new_thing", "aio", "zero_optimization.newer"):
        assert "handed to DeepSpeed as it is" in said(found, key)
    assert "amp" not in found.config


def test_no_effect_has_a_reason(file):
    found = settings(file({"activation_checkpointing": {"partition_activations": True}, "checkpoint": {}}))
    assert "train.gradient_checkpointing decides" in said(found, "activation_checkpointing")
    assert not {"activation_checkpointing", "checkpoint"} & found.config.keys()


def test_weights_on_the_cpu_need_to_be_split():
    with pytest.raises(RecipeError, match="offload_param belongs to stage 3"):
        settings(zero=2, offload_parameters=True)


def test_the_file_is_relative_to_the_recipe(tmp_path):
    (tmp_path / "there").mkdir()
    recipe = tmp_path / "there/recipe.yaml"
    recipe.write_text(
        "model: m\nout: o\ndata: {train: d.json}\nrun: {engine: deepspeed, deepspeed: {config: z.json}}\n"
    )
    (stage,) = load_recipe(str(recipe)).recipe.stages
    assert stage.run.deepspeed.config == str(tmp_path / "there/z.json")


def test_without_deepspeed_the_way_to_get_it_is_named(monkeypatch):
    monkeypatch.setattr(deepspeed, "find_spec", lambda _name: None)
    with pytest.raises(RunError, match=r"pip install 'lapilli\[deepspeed\]'"):
        deepspeed.check_deepspeed(Train(), Run(), 2, "cpu")
