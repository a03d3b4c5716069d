"""The task file, against what SkyPilot's own schema takes (read in sky/utils/schemas.py of skypilot-org/skypilot)."""

import pytest
import yaml
from typer.testing import CliRunner

from lapilli.base.errors import RecipeError
from lapilli.cli.launch import app

TASK = {
    "name": str, "num_nodes": int, "resources": dict, "workdir": str, "file_mounts": dict, "setup": str, "run": str,
}  # fmt: skip
RESOURCES = {"accelerators": str, "infra": str, "disk_size": int, "use_spot": bool, "job_recovery": dict}
JOB_RECOVERY = {"max_restarts_on_errors": int}
STORAGE = {"source": str, "mode": str}
MODES = ("MOUNT", "COPY", "MOUNT_CACHED")
"""The keys that tasks of ours may have, of those that SkyPilot takes, and what it takes for them."""


def launch(*words):
    return CliRunner().invoke(app, ["skypilot", *words])


def assert_fits(value, keys):
    assert set(value) <= set(keys)
    for key, one in value.items():
        assert type(one) is keys[key], key


def test_a_task_fits_the_schema_and_trains_in_all_processes(write_recipe, tmp_path):
    recipe = write_recipe("train: {save_every: 100}\n")
    (tmp_path / "photos").mkdir()
    made = launch(
        recipe, "out=/runs/align", "--gpus", "H100:8", "--nodes", "2", "--spot", "--infra", "aws/us-east-1",
        "--disk", "512", "--mount", "/runs=s3://weights", "--mount", "/photos=photos", "--setup", "pip install lapilli",
    )  # fmt: skip
    assert made.exit_code == 0, made.output
    assert "sky jobs launch align.sky.yaml" in made.stdout
    text = (tmp_path / "align.sky.yaml").read_text()
    assert "checked against SkyPilot's schema only" in text
    assert str(tmp_path) not in text
    task = yaml.safe_load(text)
    assert_fits(task, TASK)
    assert_fits(task["resources"], RESOURCES)
    assert_fits(task["resources"]["job_recovery"], JOB_RECOVERY)
    assert (task["num_nodes"], task["resources"]["accelerators"], task["resources"]["use_spot"]) == (2, "H100:8", True)
    assert task["file_mounts"]["/photos"] == "photos"
    bucket = task["file_mounts"]["/runs"]
    assert_fits(bucket, STORAGE)
    assert bucket["mode"] in MODES
    # Only this mode lets files grow, as metrics.jsonl does.
    assert bucket == {"source": "s3://weights", "mode": "MOUNT_CACHED"}
    for variable in ("NUM_NODES", "NODE_RANK", "NUM_GPUS_PER_NODE", "NODE_IPS"):
        assert f"$SKYPILOT_{variable}" in task["run"]
    assert task["run"].rstrip().endswith("-m lapilli.cli train align.yaml out=/runs/align --resume auto")
    assert "SIGUSR1" in task["run"]


@pytest.mark.parametrize(
    ("more", "words", "message"),
    [
        ("", ["--spot"], "train.save_every: a spot instance may go at any moment"),
        ("train: {save_every: 9}\n", ["--spot"], "lies in no bucket"),
        ("train: {save_every: 9}\n", ["--spot", "--mount", "/other=s3://b"], "lies in no bucket"),
        ("", ["--mount", "/runs=ftp://b"], "buckets begin with s3://"),
        ("", ["--mount", "runs=s3://b"], "looks like /runs=s3://bucket"),
        ("", ["--mount", "/data=nowhere"], "nowhere: no such file or folder"),
        ("", ["--workdir", "model"], "is not in model, the folder that goes along"),
        ("", ["--nodes", "0"], "--nodes 0"),
        ("run: {engine: single}\n", [], "run.engine: single is for one process, but 8 would be started"),
    ],
)
def test_what_could_not_work_there_is_refused(write_recipe, tmp_path, more, words, message):
    made = launch(write_recipe(more), "out=/runs/align", "--gpus", "H100:8", *words)
    assert isinstance(made.exception, RecipeError), made.output
    with pytest.raises(RecipeError, match=message):
        raise made.exception
    assert not list(tmp_path.glob("*.sky.yaml"))


def test_a_changed_task_file_is_kept(write_recipe, tmp_path):
    recipe = write_recipe()
    assert launch(recipe, "--gpus", "H100:8").exit_code == 0
    file = tmp_path / "align.sky.yaml"
    file.write_text(file.read_text() + "# mine\n")
    made = launch(recipe, "--gpus", "H100:8")
    assert "is there already and differs; give --force" in str(made.exception)
    assert launch(recipe, "--gpus", "H100:8", "--force").exit_code == 0
    assert "mine" not in file.read_text()
