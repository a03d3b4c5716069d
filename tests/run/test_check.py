"""A recipe's data, examined as its stages read them; training afterwards finds all of it indexed."""

import json
import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lapilli.assemble.build import BuildOptions, build
from lapilli.base.errors import DataError, LapilliError
from lapilli.cli.data import app
from lapilli.data import check as index_room
from lapilli.recipe.load import is_recipe, load_recipe
from lapilli.run.check import check_recipe
from lapilli.run.stages import run_recipe

REFERENCE = Path(__file__).parents[1] / "reference"
PICTURES = REFERENCE / "training/images"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts") / "base"
    parts = REFERENCE / "checkpoints"
    build(BuildOptions(str(parts / "vision-tower"), str(parts / "llama-base"), dtype="float32"), folder)
    return folder


@pytest.fixture
def recipe(base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, part in (("captions", slice(8)), ("instruct", slice(8)), ("held-out", slice(8, 12))):
        records = json.loads((REFERENCE / f"training/{name.replace('held-out', 'instruct')}.json").read_text())
        (tmp_path / f"{name}.json").write_text(json.dumps(records[part]))
    (tmp_path / "two.yaml").write_text(f"""\
# Two stages.
model: {base}
out: runs
data: {{images: {PICTURES}, workers: 0}}
train: {{global_batch_size: 4, learning_rate: 1e-3}}
run: {{precision: fp32, device: cpu, threads: 1}}
stages:
  - name: align
    data: {{train: captions.json, template: plain}}
    train: {{freeze: projector}}
  - name: tune
    data: {{train: instruct.json, validation: held-out.json}}
""")
    return "two.yaml"


def look(path, *overrides):
    with open(os.devnull, "w") as stream:
        return list(check_recipe(load_recipe(path, list(overrides)), stream=stream))


def train(path, *overrides, **options):
    said: list[str] = []
    with open(os.devnull, "w") as stream:
        run_recipe(load_recipe(path, list(overrides)), say=said.append, stream=stream, **options)
    return "\n".join(said)


def test_training_after_a_check_reads_no_data_again(recipe, monkeypatch):
    align, tune = look(recipe)
    assert align.ok
    assert tune.ok
    assert all(note.endswith("made now") for stage in (align, tune) for note in stage.notes)
    assert tune.diagnosis.unit == "tokens"
    monkeypatch.setattr(index_room, "_check_all", None)  # whoever reads a record now fails
    said = train(recipe, "train.max_steps=1")
    assert said.count(", found") == said.count("data index: ") == 5  # those of tune are named twice
    assert f"{int(tune.diagnosis.lengths.sum()):,} tokens" in said


def test_each_stage_is_examined_with_its_own_template_and_limits(recipe):
    align, tune = look(recipe, "stages.tune.data.max_length=200", "stages.tune.data.too_long=drop")
    assert align.diagnosis.findings.records("cut") == 8  # plain leaves the question out
    assert align.diagnosis.lengths.max() < 60 < tune.diagnosis.lengths.min()
    dropped = tune.diagnosis.findings.records("dropped")
    assert dropped > 0
    assert tune.ok, "a policy of the recipe is no fault of the data"
    assert tune.diagnosis.lengths.max() <= 200
    _, strict = look(recipe, "stages.tune.data.max_length=200")
    assert strict.diagnosis.findings.records("too_long") == dropped
    assert not strict.ok
    assert "max_length is 200" in str(strict.refused) or "records can't be used" in str(strict.refused)


def test_bad_records_are_refused_or_left_out_as_the_recipe_says(recipe, tmp_path):
    records = json.loads((tmp_path / "instruct.json").read_text())
    records[3]["image"] = "nowhere.png"
    (tmp_path / "instruct.json").write_text(json.dumps(records))
    align, tune = look(recipe)
    assert (align.ok, tune.ok) == (True, False)
    assert "nowhere.png" in str(tune.refused)
    _, allowed = look(recipe, "data.bad_records=quarantine", "data.max_bad_ratio=0.2")
    assert allowed.ok
    assert any("1 bad records of training data are left out" in note for note in allowed.notes)


def test_leakage_is_no_success_though_training_would_start(recipe):
    _, tune = look(recipe, "stages.tune.data.validation={path: instruct.json, subset: '2:4'}")
    assert tune.refused is None
    assert tune.diagnosis.findings.records("leak") == 2
    assert [p.where.rpartition("record ")[2] for p in tune.diagnosis.findings.of("leak")] == [
        "3 (id i002)",
        "4 (id i003)",
    ]
    assert not tune.ok


def test_a_model_that_is_not_built_yet_is_said_and_what_needs_none_is_checked(recipe, tmp_path):
    align, tune = look(recipe, "model=later")
    for stage in (align, tune):
        assert stage.diagnosis.unit == "words"
        assert "no model, and so no index" in stage.notes[0]
    assert "later: no such folder yet" in align.notes[0]
    assert "the stage before it" in tune.notes[0]
    with pytest.raises(DataError, match=r"stage align: data\.train: .*gone\.json"):
        look(recipe, "stages.align.data.train=gone.json")


def test_prepared_folders_of_a_recipe_are_examined_row_by_row(recipe, base, tmp_path):
    prepare = ["prepare", "instruct.json", "--out", "rows", "--model", str(base), "--images", str(PICTURES)]
    assert CliRunner().invoke(app, prepare).exit_code == 0
    _, records = look(recipe)
    _, rows = look(recipe, "stages.tune.data.train=rows")
    assert rows.ok
    assert rows.diagnosis.lengths.tolist() == records.diagnosis.lengths.tolist()
    assert any("leakage between rows" in what for what in rows.diagnosis.not_checked)


# --- the command -----------------------------------------------------------------------------------------------------


def run(*arguments):
    return CliRunner().invoke(app, ["check", *map(str, arguments), "--workers", "0"])


def test_the_command_takes_a_recipe_with_overrides(recipe, tmp_path):
    page = tmp_path / "page.html"
    told = run(recipe, "stages.tune.data.max_length=200", "--json", "--html", page)
    assert told.exit_code == 1
    found = json.loads(told.stdout)
    assert [(stage["stage"], stage["ok"], stage["max_length"]) for stage in found["stages"]] == [
        ("align", True, 2048),
        ("tune", False, 200),
    ]
    assert found["stages"][1]["refused"]
    assert page.read_text().count('id="1-too_long"') == 1
    good = run(recipe)
    assert good.exit_code == 0
    assert good.stdout.count("train can start with these data") == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--model", "base"), "--model: a recipe says that itself; set it with model=..."),
        (("--max-length", "9"), r"set it with data.max_length=..."),
        (("--fix", "out"), "--fix goes with sources"),
        (("train.lerning_rate=1",), 'did you mean "learning_rate"'),
    ],
)
def test_what_a_recipe_says_itself_is_refused(recipe, options, message):
    result = run(recipe, *options)
    assert isinstance(result.exception, LapilliError)
    assert message in str(result.exception)


def test_a_recipe_is_known_by_what_stands_in_it(recipe, tmp_path):
    assert is_recipe(recipe)
    assert is_recipe("llava-1.5/pretrain")
    assert not is_recipe("instruct.json")
    assert not is_recipe(str(tmp_path))
    for text, expected in (
        ('{"model": "m", "data": {"train": "a.json"}}', True),
        ('{"id": "1", "data": "x"}', False),
        ('{"id": "1"}\n{"id": "2"}', False),
        ("[]", False),
        ("", False),
        ("data:\n  train: a.json\n  broken: [", True),  # its own error says more than `no known format`
        ("title: notes\n", False),
    ):
        (tmp_path / "some.yaml").write_text(text)
        assert is_recipe(str(tmp_path / "some.yaml")) is expected, text
