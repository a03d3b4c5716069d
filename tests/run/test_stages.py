"""Several stages as one piece of work: handed over, checked beforehand, carried on where they stopped."""

import io
import json
import os
import signal
from pathlib import Path

import pytest

from lapilli.assemble.build import BuildOptions, build
from lapilli.base.errors import DataError, LapilliError, RunError
from lapilli.recipe.load import load_recipe
from lapilli.run import stages as stages_room
from lapilli.run.stages import run_recipe
from lapilli.train.run import Outcome

REFERENCE = Path(__file__).parents[1] / "reference"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts") / "base"
    parts = REFERENCE / "checkpoints"
    build(BuildOptions(str(parts / "vision-tower"), str(parts / "llama-base"), dtype="float32"), folder)
    return folder


@pytest.fixture
def recipe(base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("captions", "instruct"):
        records = json.loads((REFERENCE / f"training/{name}.json").read_text())[:8]
        (tmp_path / f"{name}.json").write_text(json.dumps(records))
    (tmp_path / "two.yaml").write_text(f"""\
model: {base}
out: runs
data: {{images: {REFERENCE / "training/images"}, workers: 0}}
train: {{global_batch_size: 4, learning_rate: 1e-3}}
run: {{precision: fp32, device: cpu, threads: 1}}
stages:
  - name: align
    data: {{train: captions.json, template: plain}}
    train: {{freeze: projector}}
  - name: tune
    data: {{train: instruct.json}}
""")
    return "two.yaml"


def run(path, *overrides, **options):
    said: list[str] = []
    with open(os.devnull, "w") as stream:
        outcome = run_recipe(load_recipe(path, list(overrides)), say=said.append, stream=stream, **options)
    return outcome, "\n".join(said)


def template(folder):
    return json.loads((folder / "model/lapilli.json").read_text())["template"]["name"]


def test_stages_hand_over_and_are_not_repeated(recipe, tmp_path, monkeypatch):
    _, said = run(recipe)
    assert "data of stage tune" in said
    assert template(tmp_path / "runs/align") == "vicuna_v1", "plain has no turns to chat in, so it is not carried"
    assert template(tmp_path / "runs/tune") == "vicuna_v1"
    assert f"model: {tmp_path / 'runs/align'}  # stage align" in (tmp_path / "runs/tune/recipe.yaml").read_text()
    with pytest.raises(RunError, match="all stages are finished"):
        run(recipe)

    trained = []
    monkeypatch.setattr(
        stages_room, "train_stage", lambda stage, *_a, **_k: trained.append(stage.name) or Outcome(1, 1)
    )
    run(recipe, "stages.tune.out=elsewhere")
    assert trained == ["tune"]


class _Signals(io.StringIO):
    """A stream that sends this process SIGTERM when a stage's last step is shown."""

    def write(self, text):
        if "step 2/2" in text:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().write(text)


def test_a_wish_in_the_last_step_of_a_stage_is_one_not_to_begin_the_next(recipe, tmp_path):
    said: list[str] = []
    outcome = run_recipe(load_recipe(recipe), stream=_Signals(), say=said.append)
    assert (outcome.step, outcome.total_steps, outcome.stopped_by) == (2, 2, "SIGTERM")
    assert said[-1].startswith("stopped by SIGTERM before the next stage")
    assert (tmp_path / "runs/align/model").exists()
    assert not (tmp_path / "runs/tune").exists()
    outcome = run_recipe(load_recipe(recipe), stream=_Signals())
    assert (outcome.step, outcome.total_steps, outcome.stopped_by) == (2, 2, None), "it is done"


def test_bad_data_of_a_later_stage_is_told_before_the_first_one_trains(recipe, tmp_path):
    records = json.loads((tmp_path / "instruct.json").read_text())
    records[3]["image"] = "nowhere.png"
    (tmp_path / "instruct.json").write_text(json.dumps(records))
    with pytest.raises(DataError, match=r"nowhere.png"):
        run(recipe)
    assert not (tmp_path / "runs/align/metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.tune.train.freeze=['.*']", "stage tune: train.freeze: .* freezes every parameter"),
        ("stages.tune.train.lora={target_modules: [q_prj]}", 'did you mean "q_proj"'),
        ("stages.tune.data.template=vicuna", 'data.template: unknown template "vicuna"'),
        (
            "data.validation=nowhere.json",
            r"stage align: data.validation: .*: no such file or folder\nstage tune: .*no such file",
        ),
    ],
)
def test_what_cannot_work_in_a_later_stage_is_told_before_the_first_one_trains(recipe, tmp_path, override, message):
    with pytest.raises(LapilliError, match=message):
        run(recipe, override)
    assert not (tmp_path / "runs/align/metrics.jsonl").exists()


def test_a_taken_folder_of_a_later_stage_is_told_before_the_first_one_trains(recipe, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("")
    with pytest.raises(RunError, match="holds other files"):
        run(recipe, "stages.tune.out=mine")
    assert not (tmp_path / "runs").exists()


def test_a_dry_run_of_stages_writes_nothing(recipe, tmp_path):
    _, said = run(recipe, dry_run=True)
    assert "data of stage tune" in said
    assert not (tmp_path / "runs").exists()
