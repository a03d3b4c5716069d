"""A run: what it writes, what it refuses, and that stopping it changes nothing."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lapilli.assemble.load import load
from lapilli.base.errors import DataError, LapilliError, RunError
from lapilli.recipe.load import load_recipe
from lapilli.train import run as run_room
from lapilli.train.metrics import read_metrics
from lapilli.train.monitor import Monitor
from lapilli.train.run import train_stage

REFERENCE = Path(__file__).parents[1] / "reference"
LEARNED = ("step", "loss", "learning_rate", "grad_norm", "tokens", "supervised_tokens", "samples")


def train(path, *overrides, resume="auto", dry_run=False):
    loaded = load_recipe(path, list(overrides))
    (stage,) = loaded.recipe.stages
    said: list[str] = []
    with open(os.devnull, "w") as stream:
        outcome = train_stage(
            stage, loaded.stage_origins(stage.name), resume=resume, dry_run=dry_run, say=said.append, stream=stream
        )
    return Path(stage.out), outcome, "\n".join(said)


def learned(folder):
    return [{key: row[key] for key in LEARNED} for row in read_metrics(folder / "metrics.jsonl")]


def weights(folder):
    return load_file(folder / "model/model.safetensors")


def assert_same_run(one, two):
    assert learned(one) == learned(two)
    a, b = weights(one), weights(two)
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert torch.equal(tensor, b[name]), name


def test_a_run_folder_holds_what_it_promises(recipe_file):
    path = recipe_file("")
    folder, outcome, said = train(
        path, "data.validation=held-out.json", "train.validate_every=2", "train.epochs=2", "train.save_every=3",
        "train.keep_checkpoints=2",
    )  # fmt: skip
    assert (outcome.step, outcome.total_steps, outcome.stopped_by) == (8, 8, None)
    names = {p.name for p in folder.iterdir() if not p.name.startswith(".")}
    assert names == {"recipe.yaml", "run.json", "metrics.jsonl", "checkpoints", "model", "report.html"}
    rows = read_metrics(folder / "metrics.jsonl")
    assert [r["step"] for r in rows] == list(range(1, 9))
    assert {*LEARNED, "seconds", "wait_seconds", "padding"} <= rows[0].keys()
    assert [r["step"] for r in rows if "validation_loss" in r] == [2, 4, 6, 8]
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert sum(r["samples"] for r in rows) == 32
    assert [p.name for p in sorted((folder / "checkpoints").iterdir())] == ["step-000006", "step-000008"]
    assert "learning_rate: 0.001  # recipe.yaml:4" in (folder / "recipe.yaml").read_text()
    assert re.search(r"projector +6.3k", said)


def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(recipe_file, monkeypatch):
    path = recipe_file()
    whole, _, _ = train(path, "out=whole")
    row = Monitor.row

    def stop_at_3(self, step, *args, **kwargs):
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return row(self, step, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Monitor, "row", stop_at_3)
        folder, outcome, said = train(path, "out=stopped")
    assert (outcome.step, outcome.stopped_by) == (3, "SIGTERM")
    assert "goes on from there" in said
    assert not (folder / "model").exists()
    with pytest.raises(RunError, match="interrupted run; resume it with --resume auto"):
        train(path, "out=stopped", resume="never")
    _, outcome, said = train(path, "out=stopped", "data.workers=1")
    assert outcome.step == 4
    assert "going on after step 3" in said
    assert_same_run(whole, folder)


def test_a_named_checkpoint_goes_on_in_a_folder_of_its_own(recipe_file):
    path = recipe_file()
    keep = ["train.save_every=1", "train.keep_checkpoints=9"]
    whole, _, _ = train(path, "out=whole", *keep)
    branch, outcome, said = train(path, "out=branch", *keep, resume=str(whole / "checkpoints/step-000002"))
    assert outcome.step == 4
    assert "going on after step 2" in said
    assert learned(branch) == learned(whole)[2:]
    assert all(torch.equal(tensor, weights(branch)[name]) for name, tensor in weights(whole).items())
    with pytest.raises(RunError, match="another recipe"):
        train(path, "out=third", *keep, "run.seed=1", resume=str(whole / "checkpoints/step-000002"))
    with pytest.raises(RunError, match="not a complete checkpoint"):
        train(path, "out=third", *keep, resume=str(whole))


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_a_killed_run_goes_on_bit_for_bit(recipe_file, seed):
    """SIGKILL at a random moment, twice; LoRA with dropout, so that the random state matters too."""
    path = recipe_file()
    common = ["train.epochs=6", "train.save_every=1", "data.workers=1"]
    if seed:
        common += ["train.lora={r: 4, dropout: 0.2}"]
    whole, _, _ = train(path, "out=whole", *common)
    killed = whole.parent / "killed"
    rng = random.Random(seed)
    command = [sys.executable, "-m", "lapilli.cli", "train", path, "out=killed", *common]
    for _ in range(2):
        after = len(read_metrics(killed / "metrics.jsonl")) + rng.randint(1, 7)
        process = subprocess.Popen(command, cwd=whole.parent, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and len(read_metrics(killed / "metrics.jsonl")) < after:
            time.sleep(0.01)
        time.sleep(rng.random() * 0.1)
        process.kill()
        process.wait()
    assert not (killed / "model").exists(), "too late to prove anything"
    train(path, f"out={killed}", *common)
    if seed:
        assert learned(whole) == learned(killed)
        for file in ("adapter_model.safetensors", "projector.safetensors"):
            a, b = load_file(whole / "model" / file), load_file(killed / "model" / file)
            assert all(torch.equal(a[k], b[k]) for k in a)
    else:
        assert_same_run(whole, killed)


def test_folders_that_are_not_free_are_refused(recipe_file, tmp_path, monkeypatch):
    path = recipe_file()
    train(path)
    with pytest.raises(RunError, match=r"run: holds a finished run; give another folder"):
        train(path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").write_text("")
    with pytest.raises(RunError, match=r"mine: holds other files \(thesis.tex\)"):
        train(path, f"out={tmp_path / 'mine'}")

    def crash(*_args):
        raise KeyboardInterrupt

    monkeypatch.setattr(run_room, "export", crash)
    with pytest.raises(KeyboardInterrupt):
        train(path, f"out={tmp_path / 'other'}")
    with pytest.raises(RunError, match=r"another recipe(.|\n)*train.learning_rate: 0.001 there, 0.5 now"):
        train(path, f"out={tmp_path / 'other'}", "train.learning_rate=0.5")
    (tmp_path / "chat.json").write_text(json.dumps(json.loads((tmp_path / "chat.json").read_text())[:12]))
    with pytest.raises(RunError, match=r"data: \w+ there"):
        train(path, f"out={tmp_path / 'other'}")


@pytest.mark.slow
def test_two_processes_do_not_train_in_one_folder(recipe_file, tmp_path):
    path = recipe_file()
    holder = (
        "import sys, time\nfrom pathlib import Path\nfrom lapilli.train.folder import only_writer\n"
        "with only_writer(Path(sys.argv[1]), print): print('held', flush=True); time.sleep(600)"
    )
    other = subprocess.Popen([sys.executable, "-c", holder, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(RunError, match="another process is training here"):
            train(path)
    finally:
        other.kill()
        other.wait()
    train(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r[3].update(image="nowhere.png"), "nowhere.png"),
        (lambda r: r[0].update(image=["000.png", "001.png"]), r"record 1"),
        (lambda r: r[2]["conversations"][1].update({"from": "human"}), r"record 3"),
        (lambda r: r[1].update(image="../../checkpoints/llama-base/config.json"), r"root|outside"),
    ],
)
def test_bad_data_is_told_before_anything_is_written(recipe_file, tmp_path, change, message):
    path = recipe_file()
    records = json.loads((tmp_path / "chat.json").read_text())
    change(records)
    (tmp_path / "chat.json").write_text(json.dumps(records))
    with pytest.raises(DataError, match=message):
        train(path)
    assert not (tmp_path / "run").exists()


def test_a_picture_that_breaks_in_training_loses_no_step(recipe_file, tmp_path):
    """Damage inside a whole-looking file is only seen when it is decoded."""
    path = recipe_file()
    shutil.copytree(REFERENCE / "training/images", tmp_path / "pictures")
    good = (REFERENCE / "training/images/045.png").read_bytes()
    middle = len(good) // 2
    (tmp_path / "pictures/045.png").write_bytes(good[:middle] + bytes(40) + good[middle + 40 :])
    given = [path, f"data.images={tmp_path}/pictures", "data.order=sequential"]
    with pytest.raises(DataError, match=r'record 6 \(id i045\): image "045.png".*damaged'):
        train(*given)
    assert [p.name for p in (tmp_path / "run/checkpoints").iterdir()] == ["step-000001"]
    (tmp_path / "pictures/045.png").write_bytes(good)
    mended, _, said = train(*given)
    assert "going on after step 1" in said
    assert_same_run(train(path, "out=whole", "data.order=sequential")[0], mended)


def test_what_is_left_out_is_counted_and_listed(recipe_file, tmp_path):
    folder, _, said = train(recipe_file(), "data.max_length=200", "data.too_long=truncate_turns", "train.max_steps=1")
    listed = [json.loads(line) for line in (folder / "left_out.jsonl").read_text().splitlines()]
    dropped = [one["record"] for one in listed if one["what"].startswith("dropped: even the first exchange")]
    assert len(dropped) > 3
    assert all(record.startswith(f"{tmp_path}/chat.json: record ") for record in dropped)
    first = [record.rpartition(": ")[2] for record in dropped[:3]]
    assert (
        f"{len(dropped)} x dropped: even the first exchange is longer than max_length: {', '.join(first)}, ..." in said
    )


def test_files_that_are_not_there_are_told_together(recipe_file):
    with pytest.raises(DataError) as caught:
        train(recipe_file(), "data.train=a.json", "data.validation=b.json", "data.images=c")
    named = [line.split(":")[0] for line in str(caught.value).splitlines()]
    assert named == ["data.train", "data.images", "data.validation", "data.images"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.template=vicuna_v2", 'data.template: unknown template "vicuna_v2"'),
        ("train.freeze=['.*']", "freezes every parameter"),
        ("train.freeze=['nothing_like_it']", "matches no parameter"),
        ("data.max_length=20", "max_length"),
        ("train.tokens_per_micro_batch=20", "tokens_per_micro_batch"),
        ("model=nowhere", "nowhere: no such folder"),
    ],
)
def test_what_cannot_work_is_told_before_anything_is_written(recipe_file, tmp_path, monkeypatch, override, message):
    monkeypatch.chdir(tmp_path)
    path = recipe_file()
    with pytest.raises(LapilliError, match=message):
        train(path, override)
    assert not (tmp_path / "run/metrics.jsonl").exists()
    train(path, dry_run=True)  # the folder is still free


def test_training_with_tiles_is_refused_by_name(recipe_file, base, tmp_path):
    shutil.copytree(base, tmp_path / "tiled")
    description = json.loads((tmp_path / "tiled/lapilli.json").read_text())
    description["joined"]["layout"] |= {"mode": "anyres", "pinpoints": [[56, 112], [112, 56]]}
    (tmp_path / "tiled/lapilli.json").write_text(json.dumps(description))
    with pytest.raises(RunError, match=r"anyres\); training with tiles comes later"):
        train(recipe_file(), f"model={tmp_path / 'tiled'}")


def test_a_dry_run_says_the_plan_and_writes_nothing(recipe_file, tmp_path):
    folder, _, said = train(recipe_file(), dry_run=True)
    assert "4 steps of 4 samples (4 per epoch), fp32 on cpu" in said
    assert "16 conversations" in said
    assert not folder.exists()


def test_checkpointed_activations_learn_the_same(recipe_file):
    path = recipe_file()
    plain, _, _ = train(path, "out=plain", "train.freeze=full")
    recomputed, _, _ = train(path, "out=recomputed", "train.freeze=full", "train.gradient_checkpointing=full")
    for a, b in zip(learned(plain), learned(recomputed), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


@pytest.mark.parametrize("freeze", ["projector", "freeze_vision", "full"])
def test_bf16_learns_about_the_same(recipe_file, freeze):
    path = recipe_file()
    exact, _, _ = train(path, "out=exact", f"train.freeze={freeze}")
    rounded, _, _ = train(path, "out=rounded", f"train.freeze={freeze}", "run.precision=bf16")
    for a, b in zip(learned(exact), learned(rounded), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=2e-2)
    assert {t.dtype for t in weights(rounded).values()} == {torch.bfloat16}
    state = load_file(next((rounded / "checkpoints/step-000004/weights").iterdir()))
    assert {t.dtype for t in state.values()} == {torch.float32}


def test_the_export_speaks_the_template_it_learned(recipe_file):
    path = recipe_file()
    changed, _, _ = train(path, "out=changed", "data.template=chatml", "train.max_steps=1")
    assert json.loads((changed / "model/lapilli.json").read_text())["template"]["name"] == "chatml"


@pytest.mark.slow
def test_a_signal_to_the_whole_group_still_saves(recipe_file, tmp_path):
    """As a cluster's scheduler or Ctrl-C in a terminal sends it: to the data's workers too."""
    path = recipe_file()
    command = [sys.executable, "-m", "lapilli.cli", "train", path, "train.epochs=200", "data.workers=2"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    while process.poll() is None and len(read_metrics(tmp_path / "run/metrics.jsonl")) < 3:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, output
    done = len(read_metrics(tmp_path / "run/metrics.jsonl"))
    assert f"stopped by SIGTERM after step {done}" in output
    assert [p.name for p in (tmp_path / "run/checkpoints").iterdir()] == [f"step-{done:06d}"]


def test_lora_runs_export_adapters_that_know_what_they_learned(recipe_file, recwarn):
    path = recipe_file()
    common = ["train.lora={r: 2, dropout: 0}", "train.max_steps=1"]
    folder, _, _ = train(path, "out=adapter", *common, "data.template=chatml", "data.image_mode=square")
    assert not (folder / "model/README.md").exists()
    loaded = load(folder)
    assert (loaded.template.name, loaded.image_spec.mode, loaded.layout.mode) == ("chatml", "square", "square")
    assert "<|im_start|>" in loaded.tokenizer.chat_template
    assert load(folder, template="v0").template.name == "v0"
    on_top, _, _ = train(path, "out=on-top", f"model={folder}", *common)
    assert load(on_top).template.name == "chatml"
    again, _, _ = train(path, "out=again", f"model={folder}", "train.max_steps=1", "train.freeze=projector")
    assert (again / "model/config.json").is_file()
    assert not [w for w in recwarn if issubclass(w.category, FutureWarning)]


def test_lora_runs_that_learn_more_than_adapters_export_the_whole_model(recipe_file):
    whole, _, said = train(
        recipe_file(), "train.lora={r: 2, dropout: 0}", "train.max_steps=1", "train.freeze=full",
    )  # fmt: skip
    assert "adapters merged, model/ holds the whole model: the vision encoder was trained" in said
    assert (whole / "model/config.json").is_file()


@pytest.fixture
def own_pictures(tmp_path):
    """The pictures of the recipe's conversations in a folder that a test may spoil."""
    shutil.copytree(REFERENCE / "training/images", tmp_path / "pictures")
    named = [r["image"] for r in json.loads((tmp_path / "chat.json").read_text()) if "image" in r]
    return [tmp_path / "pictures" / name for name in named]


def test_a_run_goes_on_without_bad_records_and_lists_them(recipe_file, own_pictures):
    pictures = own_pictures
    keep = ["data.images=pictures", "data.bad_records=quarantine", "data.max_bad_ratio=0.2", "train.epochs=2"]
    path = recipe_file()
    pictures[0].unlink()
    _, outcome, _ = train(path, "out=first", *keep, "train.max_steps=1")  # the index is made here
    pictures[1].write_bytes(pictures[1].read_bytes()[:60])
    folder, outcome, _ = train(path, "out=second", *keep, "train.save_every=1")
    assert outcome.step == 8
    listed = [json.loads(line)["what"] for line in (folder / "left_out.jsonl").read_text().splitlines()]
    assert len(listed) == 2
    assert "there is no file" in listed[0]
    assert "truncated" in listed[1]
    assert sum(r["samples"] for r in read_metrics(folder / "metrics.jsonl")) == 2 * (15 - 1)
    state = json.loads((folder / "checkpoints/step-000008/state.json").read_text())
    assert ["truncated" in one["reason"] for one in state["bad"]] == [True]
    with pytest.raises(DataError, match=r"max_bad_ratio 0\.07 allows 1"):
        train(path, "out=third", *keep[:2], "data.max_bad_ratio=0.07")


def test_a_source_is_visited_as_often_as_it_weighs(recipe_file, tmp_path):
    path = recipe_file()
    twice = "data.train=[{path: chat.json, weight: 2, subset: '0:8'}, {path: held-out.json, template: llava_v0}]"
    folder, outcome, said = train(path, "out=weighted", twice, "train.save_every=2")
    assert outcome.total_steps == 5  # 2 * 8 + 4 samples, four at a time
    assert "20 samples by weight" in said
    assert sum(r["samples"] for r in read_metrics(folder / "metrics.jsonl")) == 20
    other = [twice.replace("weight: 2", "weight: 3"), "train.save_every=2"]
    with pytest.raises(RunError, match=r"data\.weights"):
        train(path, "out=other", *other, resume=str(folder / "checkpoints/step-000005"))
