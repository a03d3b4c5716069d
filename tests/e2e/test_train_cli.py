"""`lapilli train` as a user has it: two stages from one file, killed and started again, and what it refuses."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lapilli.cli.main import main
from lapilli.train.metrics import read_metrics

REFERENCE = Path(__file__).parents[1] / "reference"
PARTS = REFERENCE / "checkpoints"
PICTURES = REFERENCE / "training" / "images"

TWO_STAGES = f"""\
model: base
out: runs
data: {{images: {PICTURES}, workers: 0}}
train: {{global_batch_size: 8, learning_rate: 2e-3, save_every: 2}}
run: {{precision: fp32, device: cpu, deterministic: true, threads: 1}}
stages:
  - name: align
    data: {{train: captions.json, template: plain}}
    train: {{freeze: projector}}
  - name: instruct
    data: {{train: instruct.json, template: vicuna_v1}}
    train: {{freeze: freeze_vision, epochs: 20}}
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("built") / "base"
    parts = ["--vision-encoder", str(PARTS / "vision-tower"), "--language-model", str(PARTS / "llama-base")]
    assert lapilli("build", *parts, "--out", str(folder)) == 0
    return folder


@pytest.fixture
def place(base, tmp_path, monkeypatch):
    """A folder as a user's: a model, two data files, a recipe of two stages."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").symlink_to(base)
    for name in ("captions", "instruct"):
        records = json.loads((REFERENCE / f"training/{name}.json").read_text())
        (tmp_path / f"{name}.json").write_text(json.dumps(records[:16]))
    (tmp_path / "two.yaml").write_text(TWO_STAGES)
    return tmp_path


def lapilli(*arguments):
    """Run the command line in this process, which has torch loaded; returns the exit status."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["lapilli", *arguments])
        try:
            main()
        except SystemExit as end:
            return end.code or 0
    return 0


def refused(capsys, *arguments):
    """What a refusal says; it is one message, on standard error, with exit status 1."""
    capsys.readouterr()
    assert lapilli(*arguments) == 1
    said = capsys.readouterr().err
    assert said.count("error: ") == 1
    return said[said.index("error: ") :].strip()


@pytest.mark.slow
def test_two_stages_killed_and_started_again_and_then_a_chat(place, capsys):
    command = [sys.executable, "-m", "lapilli.cli", "train", "two.yaml"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    metrics = place / "runs/instruct/metrics.jsonl"
    until = time.monotonic() + 120
    while process.poll() is None and len(read_metrics(metrics)) < 7:
        assert time.monotonic() < until
        time.sleep(0.02)
    process.kill()
    assert process.wait() == -signal.SIGKILL, "it ended before it could be killed"
    kept = len(read_metrics(metrics)) // 2 * 2

    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "stage align is finished already" in done.stdout
    resumed = re.search(r"going on after step (\d+)", done.stdout)
    assert resumed
    assert kept - 2 <= int(resumed[1]) <= kept + 2
    assert "Warning" not in done.stdout + done.stderr

    assert lapilli("train", "two.yaml", "out=whole") == 0
    one, two = read_metrics(place / "whole/instruct/metrics.jsonl"), read_metrics(metrics)
    assert [(r["step"], r["loss"]) for r in one] == [(r["step"], r["loss"]) for r in two]
    assert two[-1]["loss"] < two[0]["loss"] / 2
    weights = "instruct/model/model.safetensors"
    assert (place / "whole" / weights).read_bytes() == (place / "runs" / weights).read_bytes()
    for stage, template in (("align", "vicuna_v1"), ("instruct", "vicuna_v1")):
        assert json.loads((place / f"runs/{stage}/model/lapilli.json").read_text())["template"]["name"] == template
        report = (place / f"runs/{stage}/report.html").read_text()
        assert "<svg" in report
        assert not re.search(r"https?://", report), "a report needs nothing but itself"

    capsys.readouterr()
    assert lapilli("chat", "runs/instruct", "--image", str(PICTURES / "000.png"), "--message", "image red?") == 0
    answer, notes = capsys.readouterr()
    assert answer.strip()
    assert "Warning" not in notes


def test_what_is_wrong_with_the_data_is_one_message(place, capsys):
    records = json.loads((place / "instruct.json").read_text())
    good = (PICTURES / "002.png").read_bytes()
    (place / "pictures").mkdir()
    for picture in PICTURES.glob("0*.png"):
        (place / "pictures" / picture.name).write_bytes(picture.read_bytes())
    (place / "pictures/002.png").write_bytes(good[: len(good) // 2])
    (place / "pictures/003.png").unlink()
    (place / "pictures/004.png").unlink()
    (place / "pictures/004.png").symlink_to(PICTURES / "004.png")
    records[5]["image"] = ["005.png", "006.png"]
    records[6]["conversations"][1]["from"] = "human"
    records[7]["conversations"] = records[7]["conversations"][:1]
    (place / "instruct.json").write_text(json.dumps(records))

    said = refused(capsys, "train", "two.yaml", "stages.instruct.data.images=pictures")
    assert said.startswith("error: 6 of 16 records can't be used:")
    data, pictures = place / "instruct.json", place / "pictures"
    for number, what in {
        3: 'image "002.png": the picture can\'t be decoded',
        4: f'image "003.png": there is no file {pictures}/003.png',
        5: f'image "004.png": the path leaves the image folder {pictures}',
        6: "`image` names 2 picture(s), but the text has 1 <image>",
        7: "turns 1 and 2 are both from the user",
        8: "nothing to learn from this record",
    }.items():
        assert f"{data}: record {number} (id i{number - 1:03d}): {what}" in said
    assert not (place / "runs").exists(), "nothing is trained, of the first stage neither"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.lerning_rate=1"], 'command line: train.lerning_rate: unknown key (did you mean "learning_rate"?)'),
        (["train.freeze=freeze_visoin"], 'unknown frozen set "freeze_visoin" (did you mean "freeze_vision"?)'),
        (["stages.instruct.train.freeze=['.*']"], 'train.freeze: ".*" freezes every parameter'),
        (["stages.instruct.data.template=vicuna"], 'unknown template "vicuna" (did you mean "vicuna_v1"?)'),
        (["data.image_mode=anyres"], "data.image_mode: training with tiles (anyres) comes later"),
        (["stages.instruct.data.max_length=150"], "but max_length is 150; raise data.max_length or set data.too_long"),
        (
            ["data.max_image_pixels=1000"],
            "is more than 1,000 pixels; shrink the picture or raise data.max_image_pixels",
        ),
        (["stages.instruct.out=base"], "base: holds other files"),
        (["stages.instruct.out=runs/align"], "stages align and instruct write the same folder"),
    ],
)
def test_what_cannot_work_is_refused_before_training(place, capsys, overrides, message):
    assert message in refused(capsys, "train", "two.yaml", *overrides)
    assert not list(place.glob("runs/*/metrics.jsonl"))


def test_a_folder_with_a_run_is_never_written_to(place, capsys):
    quick = ["train", "two.yaml", "stages.instruct.train.max_steps=1"]
    assert lapilli(*quick) == 0
    assert "all stages are finished; give another folder with out=..." in refused(capsys, *quick)
    assert "holds a finished run" in refused(capsys, *quick, "stages.instruct.train.learning_rate=1")
    assert "holds a finished run" in refused(capsys, *quick, "--resume", "never")


@pytest.mark.parametrize("recipe", ["llava-1.5/pretrain", "llava-1.5/finetune", "llava-1.5/finetune_lora"])
def test_shipped_recipes_run_dry(place, capsys, recipe):
    given = ["model=base", "data.train=captions.json", f"data.images={PICTURES}"]
    assert lapilli("train", recipe, *given, "--dry-run") == 0
    said, notes = capsys.readouterr()
    assert "16 conversations, 16 pictures" in said
    assert "bf16 on cpu" in said
    assert "Warning" not in said + notes
    assert sorted(p.name for p in place.iterdir()) == ["base", "captions.json", "instruct.json", "two.yaml"]
    assert lapilli("train", "llava-1.5/pretrian") == 1
