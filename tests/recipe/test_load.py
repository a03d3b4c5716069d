"""A wrong recipe is reported at once and in full; a right one knows where each value came from."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from lapilli.base.errors import RecipeError
from lapilli.recipe.load import load_recipe, shipped_recipes
from lapilli.recipe.resolved import resolved_yaml

GOOD = """\
model: parts
out: runs/a
data:
  train: chat.json
  images: pictures
train:
  learning_rate: 1e-3
"""


def write(folder: Path, text: str, name: str = "recipe.yaml") -> str:
    (folder / name).write_text(text)
    return str(folder / name)


def error(folder: Path, text: str, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(folder, text), list(overrides))
    return str(caught.value)


def test_values_paths_and_origins(tmp_path, monkeypatch):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    path = write(tmp_path, GOOD)
    monkeypatch.chdir(elsewhere)
    loaded = load_recipe(path, ["train.epochs=2", "out=here"])
    (stage,) = loaded.recipe.stages
    assert stage.train.learning_rate == 1e-3
    assert stage.train.epochs == 2
    assert stage.model == str(tmp_path / "parts")
    assert stage.out == str(elsewhere / "here")
    assert stage.data.train[0].path == str(tmp_path / "chat.json")
    assert stage.data.train[0].images == str(tmp_path / "pictures")
    origins = loaded.stage_origins("train")
    assert origins["train.learning_rate"] == "recipe.yaml:7"
    assert origins["train.epochs"] == "command line"
    assert "train.weight_decay" not in origins


@pytest.mark.parametrize(
    ("text", "override", "message"),
    [
        ("lerning_rate: 1", None, 'recipe.yaml: train.lerning_rate: unknown key (did you mean "learning_rate"?)'),
        ("epochs: many", None, "recipe.yaml: train.epochs: input should be a valid number"),
        ("freeze: projecter", None, 'train.freeze: unknown frozen set "projecter" (did you mean "projector"?)'),
        ("freeze: ['(']", None, 'train.freeze: "(" is not a regular expression'),
        ("optimizer: adam", None, 'train.optimizer: "adam" is not one of'),
        ("micro_batch_size: 4", None, "micro_batch_size and loss_reduction: microbatch_mean belong together"),
        ("epochs: 1", "train.lerning_rate=1", "command line: train.lerning_rate: unknown key"),
        ("epochs: 1", "placement=front", 'placement: unknown key here; it belongs under "data"'),
        ("epochs: 1\n  epochs: 2", None, 'line 9: key "epochs" is given twice (first on line 8)'),
        ("epochs: [", None, "recipe.yaml: not valid YAML: line"),
        ("epochs: 1", "train.epochs", "an override looks like"),
        ("epochs: 1", "train.epochs.x=1", "command line: train.epochs.x: input should be a valid number"),
        ("epochs: .inf", None, "train.epochs: input should be a finite number"),
    ],
)
def test_errors_name_file_and_key(tmp_path, text, override, message):
    assert message in error(tmp_path, GOOD + f"  {text}\n", *([override] if override else []))


def test_all_errors_at_once(tmp_path):
    told = error(tmp_path, "modle: x\ntrain:\n  lerning_rate: 1\n  epochs: -1\n", "run.seed=x").splitlines()
    assert len(told) == 4
    assert 'recipe.yaml: modle: unknown key (did you mean "model"?)' in told
    assert any(line.startswith("command line: run.seed:") for line in told)


def test_missing_parts_are_named(tmp_path):
    told = error(tmp_path, "train: {epochs: 1}")
    assert [line.split(": ")[1] for line in told.splitlines()] == ["model", "out", "data.train"]


TWO = """\
model: parts
out: runs/two
data: {images: pictures}
train: {learning_rate: 1e-3, warmup_ratio: 0.1}
stages:
  - name: align
    data: {train: captions.json}
    train: {freeze: projector}
  - name: tune
    data: {train: [chat.json, {path: more.jsonl, images: others}]}
    train: {learning_rate: 2e-5}
"""


def test_stages_lie_over_common_keys_and_hand_over(tmp_path):
    loaded = load_recipe(write(tmp_path, TWO), ["train.epochs=3", "stages.tune.train.epochs=1"])
    align, tune = loaded.recipe.stages
    assert (align.model, align.out) == (str(tmp_path / "parts"), str(tmp_path / "runs/two/align"))
    assert (tune.model, tune.out) == (align.out, str(tmp_path / "runs/two/tune"))
    assert (align.train.learning_rate, tune.train.learning_rate) == (1e-3, 2e-5)
    assert (align.train.epochs, tune.train.epochs) == (3, 1)
    assert tune.train.warmup_ratio == 0.1
    assert [s.images for s in tune.data.train] == [str(tmp_path / "pictures"), str(tmp_path / "others")]
    assert loaded.stage_origins("tune")["train.learning_rate"] == "recipe.yaml:11"
    assert loaded.stage_origins("tune")["model"] == "stage align"


def test_start_from_names_an_earlier_stage(tmp_path):
    third = "  - name: again\n    start_from: align\n    data: {train: c.json}\n"
    stages = load_recipe(write(tmp_path, TWO + third)).recipe.stages
    assert stages[2].model == stages[0].out
    told = error(tmp_path, TWO + third.replace("from: align", "from: algin"))
    assert (
        told == 'recipe.yaml: stages.again.start_from: "algin" is no earlier stage (did you mean "align"?); '
        "earlier stages: align, tune"
    )


def test_two_stages_never_share_a_folder(tmp_path):
    loaded = error(tmp_path, TWO, f"stages.tune.out={tmp_path}/runs/two/align")
    assert "command line: stages.tune.out: stages align and tune write the same folder" in loaded


def test_a_key_inside_an_override_is_named(tmp_path):
    told = error(tmp_path, GOOD, "train.lora={rank: 4}")
    known = "r, alpha, dropout, target_modules, bias, quantise, vision"
    assert told == f"command line: train.lora.rank: unknown key; known here: {known}"


def test_training_with_tiles_is_refused_by_name(tmp_path):
    told = error(tmp_path, GOOD, "data.image_mode=anyres")
    assert told == "command line: data.image_mode: training with tiles (anyres) comes later; use square or pad"


def test_an_error_in_common_keys_is_told_once(tmp_path):
    told = error(tmp_path, TWO.replace("warmup_ratio", "warmup_ration"))
    assert told == 'recipe.yaml: train.warmup_ration: unknown key (did you mean "warmup_ratio"?)'
    told = error(tmp_path, TWO.replace("freeze: projector", "freze: projector"))
    assert told.startswith("recipe.yaml: stages.align.train.freze: unknown key")


def test_resolved_copy_is_the_same_recipe_and_says_origins(tmp_path):
    loaded = load_recipe(write(tmp_path, TWO), ["run.seed=7"])
    tune = loaded.recipe.stages[1]
    text = resolved_yaml(tune, loaded.stage_origins("tune"))
    assert "learning_rate: 2.0e-05  # recipe.yaml:11" in text
    assert "seed: 7  # command line" in text
    assert "weight_decay: 0.0  # default" in text
    assert load_recipe(write(tmp_path, text, "copy.yaml")).recipe.stages[0] == tune


def test_shipped_recipes_are_complete_but_for_model_and_data():
    assert shipped_recipes() == ["llava-1.5/finetune", "llava-1.5/finetune_lora", "llava-1.5/pretrain"]
    for name in shipped_recipes():
        (stage,) = load_recipe(name, ["model=parts", "data.train=chat.json"]).recipe.stages
        assert stage.train.warmup_ratio == 0.03
    with pytest.raises(RecipeError, match=r'did you mean "llava-1.5/pretrain"'):
        load_recipe("llava-1.5/pretrian")


def test_a_wrong_recipe_is_told_within_a_second_and_without_torch(tmp_path):
    path = write(tmp_path, GOOD + "  lerning_rate: 1\n")
    code = (
        "import sys\nfrom lapilli.base.errors import RecipeError\nfrom lapilli.recipe.load import load_recipe\n"
        f"try: load_recipe({path!r})\nexcept RecipeError as e: assert 'torch' not in sys.modules; sys.exit(str(e))"
    )
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "did you mean" in done.stderr
    assert time.perf_counter() - start < 3, "generous: the machine may be busy"


def test_a_template_file_is_relative_to_the_recipe(tmp_path):
    recipe = load_recipe(write(tmp_path, GOOD.replace("images: pictures", "template: mine.yaml")))
    assert recipe.recipe.stages[0].data.template == str(tmp_path / "mine.yaml")


MIX = """\
model: parts
out: runs/a
data:
  images: pictures
  train:
    - chat.json
    - {path: more.json, weight: 2.5, subset: "0.0-0.5", template: mine.yaml}
  validation: {path: more.json, subset: "0.5-1.0", template: plain}
"""


def test_sources_of_a_mixture(tmp_path):
    loaded = load_recipe(write(tmp_path, MIX.replace('"0.5-1.0"', "1:30")))
    (stage,) = loaded.recipe.stages
    assert stage.data.validation[0].subset == "1:30", "no number to base 60"
    plain, mixed = stage.data.train
    assert (plain.weight, plain.subset, plain.template) == (1.0, None, None)
    assert (mixed.weight, mixed.subset, mixed.template) == (2.5, "0.0-0.5", str(tmp_path / "mine.yaml"))
    assert stage.data.validation[0].template == "plain"
    copy = write(tmp_path, resolved_yaml(stage, loaded.stage_origins("train")), "copy.yaml")
    assert load_recipe(copy).recipe.stages[0] == stage


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("weight: 2.5", "weight: 0", "data.train.1.weight: input should be greater than 0"),
        ("weight: 2.5", "wieght: 2", 'data.train.1.wieght: unknown key (did you mean "weight"?)'),
        ('"0.0-0.5"', "half", 'data.train.1.subset: "half" is no part of a file; give record numbers such as'),
        ('"0.5-1.0"', '"0.5-1.0", weight: 2', "data.validation: "),
        ("  images", "  order: length_group\n  images", 'data.order: "length_group" is not one of'),
        ("  images", "  max_bad_ratio: 1\n  images", "data.max_bad_ratio: input should be less than 1"),
    ],
)
def test_wrong_sources_are_named(tmp_path, old, new, message):
    assert message in error(tmp_path, MIX.replace(old, new))
