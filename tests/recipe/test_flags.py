"""Training commands of the originals become recipes: every flag mapped, explained, or refused."""

import os
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from lapilli.base.errors import RecipeError
from lapilli.cli.main import app
from lapilli.data.templates import TABLE
from lapilli.recipe.flags import FLAGS, parse_flags
from lapilli.recipe.imported import import_command
from lapilli.recipe.load import load_recipe
from lapilli.recipe.shell import read_commands

COMMON = """ --data_path data/chat.json --image_folder data --vision_tower openai/clip-vit-large-patch14-336 \\
    --mm_projector_type mlp2x_gelu --mm_vision_select_layer -2 --mm_use_im_start_end False \\
    --mm_use_im_patch_token False --bf16 True --num_train_epochs 1 --per_device_eval_batch_size 4 \\
    --evaluation_strategy "no" --save_strategy "steps" --save_total_limit 1 --weight_decay 0. --warmup_ratio 0.03 \\
    --lr_scheduler_type "cosine" --logging_steps 1 --tf32 True --model_max_length 2048 \\
    --gradient_checkpointing True --dataloader_num_workers 4 --lazy_preprocess True"""

PRETRAIN = f"""#!/bin/bash
# MODEL=other
MODEL=vicuna-13b   # one of two
deepspeed llava/train/train_mem.py \\
    --deepspeed ./scripts/zero2.json --model_name_or_path ./checkpoints/$MODEL --version plain \\
    --tune_mm_mlp_adapter True --output_dir ./out/$MODEL-pretrain --per_device_train_batch_size 32 \\
    --gradient_accumulation_steps 1 --save_steps 24000 --learning_rate 1e-3 --report_to wandb {COMMON}
"""
LORA = f"""torchrun --nnodes=2 --nproc_per_node=4 --master_port=25001 llava/train/train_mem.py --lora_enable True \\
    --lora_r 128 --lora_alpha 256 --mm_projector_lr 2e-5 --deepspeed ./scripts/zero3.json \\
    --model_name_or_path lmsys/vicuna-13b-v1.5 --version v1 --output_dir out/lora \\
    --pretrain_mm_mlp_adapter ./out/mm_projector.bin --image_aspect_ratio pad --group_by_modality_length True \\
    --per_device_train_batch_size 16 --gradient_accumulation_steps 1 --save_steps 50000 --learning_rate 2e-4 {COMMON}
"""
QLORA = f"""deepspeed --include localhost:0,1,2 llava/train/train.py --bits 4 --double_quant --lora_enable True \\
    --model_name_or_path base --version llava_llama_2 --pretrain_mm_mlp_adapter p.bin --freeze_mm_mlp_adapter True \\
    --output_dir=out/qlora --per_device_train_batch_size 16 --gradient_accumulation_steps 2 --save_steps 500 \\
    --learning_rate 2e-4 --report_to tensorboard wandb {COMMON}
"""
FSDP = f"""torchrun --nnodes=1 --nproc_per_node=8 llava/train/train_mem.py --model_name_or_path vicuna --version v0 \\
    --mm_use_im_start_end --pretrain_mm_mlp_adapter p.bin --fsdp "full_shard auto_wrap" \\
    --fsdp_transformer_layer_cls_to_wrap 'LlamaDecoderLayer' --output_dir out/v0 --per_device_train_batch_size 4 \\
    --save_steps 5000 --learning_rate 2e-5 {COMMON.replace("--mm_use_im_start_end False", "")}
"""
GAUDI = f"""export PT_HPU_MAX_COMPOUND_OP_SIZE=10
python ../gaudi_spawn.py --use_deepspeed --world_size 8 train.py --deepspeed zero3.json --use_habana --use_lazy_mode \\
    --model_name_or_path base --template v1 --pretrain_mm_mlp_adapter p.bin --pad_max True --mm_im_patches 576 \\
    --output_dir out/gaudi --per_device_train_batch_size 2 --gradient_accumulation_steps 4 --save_steps 10 \\
    --learning_rate 2e-5 --throughput_warmup_steps 3 {COMMON.replace("--tf32 True", "")}
"""


def imported(tmp_path, text, devices=None):
    """The checked stage of a command's recipe, its text and notes."""
    (command,) = read_commands(text, "train.sh")
    made = import_command(command, devices, tmp_path, TABLE)
    (tmp_path / "recipe.yaml").write_text(made.text)
    (stage,) = load_recipe(str(tmp_path / "recipe.yaml")).recipe.stages
    return stage, made.text, "\n".join(made.notes)


def test_stage_1(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stage, text, notes = imported(tmp_path, PRETRAIN, devices=8)
    assert stage.model == str(tmp_path / "out/vicuna-13b-pretrain-start")
    assert stage.out == str(tmp_path / "out/vicuna-13b-pretrain")
    assert (stage.train.freeze, stage.train.lora) == ("projector", None)
    assert (stage.train.global_batch_size, stage.train.learning_rate, stage.train.save_every) == (256, 1e-3, 24000)
    assert (stage.data.template, stage.data.image_mode, stage.data.order) == ("plain", "square", "shuffled")
    assert (stage.run.engine, stage.run.trackers) == ("deepspeed", ("wandb",))
    assert (stage.run.precision, stage.run.tf32) == ("bf16", True)
    assert stage.run.deepspeed.config == str(tmp_path / "scripts/zero2.json")
    assert "lapilli build --vision-encoder openai/clip-vit-large-patch14-336" in text
    assert "--language-model ./checkpoints/vicuna-13b" in text
    assert "32 samples x 1 accumulated x 8 devices" in text
    assert "--lazy_preprocess True: without effect here" in notes
    assert "set nowhere" not in notes


def test_lora_with_two_learning_rates(tmp_path):
    stage, text, _ = imported(tmp_path, LORA)
    assert stage.train.lora is not None
    assert (stage.train.lora.r, stage.train.lora.alpha, stage.train.lora.dropout) == (128, 256, 0.05)
    assert (stage.train.learning_rate, stage.train.projector_learning_rate) == (2e-4, 2e-5)
    assert stage.train.global_batch_size == 16 * 2 * 4
    assert (stage.data.template, stage.data.image_mode) == ("vicuna_v1", "pad")
    assert (stage.data.order, stage.data.max_length, stage.data.workers) == ("modality_groups_llava", 2048, 4)
    assert stage.train.gradient_checkpointing == "full"
    assert "--projector-weights ./out/mm_projector.bin" in text


def test_quantised(tmp_path):
    stage, _, _ = imported(tmp_path, QLORA)
    assert stage.train.lora is not None
    assert stage.train.lora.quantise == "nf4"
    assert stage.train.global_batch_size == 16 * 2 * 3
    assert stage.run.trackers == ("tensorboard", "wandb")
    assert isinstance(stage.train.freeze, tuple)


def test_the_first_version(tmp_path):
    stage, text, notes = imported(tmp_path, FSDP)
    assert (stage.run.engine, stage.data.template) == ("fsdp", "v0-2023-06")
    assert "--im-start-end" in text
    assert "since October 2023 it trains vicuna_v1" in notes
    assert "LlamaDecoderLayer: without effect here: layers are found by themselves" in notes


def test_gaudi(tmp_path):
    stage, _, notes = imported(tmp_path, GAUDI)
    assert (stage.run.device, stage.run.hpu_mode) == ("hpu", "lazy")
    assert stage.train.global_batch_size == 2 * 4 * 8
    assert stage.data.template == "llava_v1"
    for said in (
        "Intel develops lazy mode no further",
        "--pad_max: the original pads every sample",
        "PT_HPU_MAX_COMPOUND_OP_SIZE=10: Gaudi's compiler reads it",
        "roles User and Assistant",
        "--mm_im_patches 576: without effect here",
    ):
        assert said in notes


def test_what_was_not_given_is_the_originals_default(tmp_path):
    bare = "python train.py --model_name_or_path m --data_path d.json --vision_tower v --output_dir o"
    stage, text, notes = imported(tmp_path, bare)
    assert (stage.data.max_length, stage.train.epochs, stage.train.learning_rate) == (512, 3.0, 5e-5)
    assert (stage.train.schedule, stage.train.warmup_ratio, stage.train.global_batch_size) == ("linear", 0.0, 8)
    assert (stage.run.precision, stage.train.save_every) == ("fp32", 500)
    assert "is taken for a whole LLaVA model" in notes
    assert text.count("the original's default") > 10


def test_variables_that_nothing_sets_stay_and_are_named(tmp_path):
    given = "python train.py --model_name_or_path ./m/$WHICH --data_path d.json --vision_tower v --output_dir ${OUT}/x"
    _, text, notes = imported(tmp_path, given)
    assert "m/$WHICH" in text
    assert "${OUT}/x" in text
    assert "$OUT is set nowhere in train.sh; put its value in" in notes
    assert "$WHICH is set nowhere" in notes


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("--lerning_rate 1", r'unknown flag "--lerning_rate" \(did you mean "learning_rate"\?\)'),
        ("--num_train_epochs two", '--num_train_epochs: "two" is no number'),
        ("--bf16 maybe", '--bf16: "maybe" is neither True nor False'),
        ("--learning_rate", "--learning_rate: needs a value"),
        ("--learning_rate 1 2", '"2" is no flag'),
        ("--bits 4", "--bits 4: a quantised model learns through adapters only"),
        ("--optim lion", 'unknown optimiser "lion"'),
        ("--lr_scheduler_type polynomial", 'unknown schedule "polynomial"'),
        ("--use_lazy_mode", "--use_lazy_mode True: belongs to --use_habana"),
    ],
)
def test_what_nothing_here_can_do_is_refused(tmp_path, more, said):
    bare = "python train.py --model_name_or_path m --data_path d.json --vision_tower v --output_dir o "
    with pytest.raises(RecipeError, match=f"train.sh: line 1: .*{said}"):
        imported(tmp_path, bare + more)


def test_all_unknown_flags_are_named_at_once():
    with pytest.raises(RecipeError) as caught:
        parse_flags(["--nothing", "1", "--bf16", "--neither"], "x")
    assert str(caught.value).count("unknown flag") == 2


def test_flags_are_taken_as_argparse_takes_them():
    given = parse_flags(
        ["--model-name", "m", "--bf16", "--mm_vision_select_layer=-2", "--no_tf32", "--bf16", "no"], "x"
    )
    assert given == {"model_name_or_path": "m", "bf16": False, "mm_vision_select_layer": -2, "tf32": False}
    assert all(flag.kind != "bool" or flag.default in (None, True, False) for flag in FLAGS.values())


def test_the_number_of_devices_is_asked_for(tmp_path):
    with pytest.raises(RecipeError, match=r"does not say on how many devices it runs, .* give --devices"):
        imported(tmp_path, PRETRAIN)
    two = PRETRAIN.replace("deepspeed llava", "CUDA_VISIBLE_DEVICES=0,3 deepspeed llava")
    assert imported(tmp_path, two)[0].train.global_batch_size == 32 * 2


def test_scripts_are_read_as_a_shell_reads_them():
    text = f"cd here && {LORA}\n# {LORA.splitlines()[0]}\npython eval.py --answers x\n\n{QLORA} > log 2>&1"
    first, second = read_commands(text, "s")
    assert (first.where, first.program) == ("s: line 1", "llava/train/train_mem.py")
    assert second.program == "llava/train/train.py"
    assert "log" not in second.arguments
    with pytest.raises(RecipeError, match="s: line 1: a shell would not take this"):
        read_commands("python train.py --data_path 'x", "s")


def test_the_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "both.sh").write_text(f"{LORA}\n{QLORA}")
    (tmp_path / "sub").mkdir()
    run = lambda *words: CliRunner().invoke(app, ["recipe", "import", *words])  # noqa: E731
    refused = run("both.sh")
    second = 1 + (tmp_path / "both.sh").read_text().splitlines().index(QLORA.splitlines()[0])
    assert f"holds 2 training commands, on lines 1, {second}; choose one with --line" in str(refused.exception)
    made = run("both.sh", "--line", "1", "--out", "sub/r.yaml")
    assert made.exit_code == 0, made.output
    assert "wrote sub/r.yaml" in made.output
    (stage,) = load_recipe("sub/r.yaml").recipe.stages
    assert stage.data.images == str(tmp_path / "data")
    assert "exists already" in str(run("both.sh", "--line", "1", "--out", "sub/r.yaml").exception)
    assert "no such script" in str(run("nothing.sh").exception)
    assert "holds no training command" in str(run("echo hello world").exception)
    assert "template: vicuna_v1" in run(LORA).output


def test_it_needs_no_torch(tmp_path):
    (tmp_path / "s.sh").write_text(LORA)
    code = (
        "import sys; sys.argv = ['lapilli', 'recipe', 'import', 's.sh', '--out', 'r.yaml']\n"
        "from lapilli.cli.main import app\n"
        "try: app()\nexcept SystemExit: pass\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, env=os.environ)
    assert (tmp_path / "r.yaml").is_file()
