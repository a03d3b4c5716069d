"""What `run.json` says of a run, and what it must not say."""

import subprocess

from lapilli.recipe.load import load_recipe
from lapilli.train.manifest import git_state, kept_variables, recipe_hash, versions


def test_git_state_of_a_folder(tmp_path):
    assert git_state(tmp_path) is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    (tmp_path / "a.txt").write_text("one")
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "add", "a.txt"], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "one"], check=True)
    commit = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    (tmp_path / "run").mkdir()
    assert git_state(tmp_path / "run") == {"commit": commit, "dirty": False}
    (tmp_path / "a.txt").write_text("two")
    assert git_state(tmp_path) == {"commit": commit, "dirty": True}


def test_only_named_variables_are_kept():
    given = {"OMP_NUM_THREADS": "1", "NCCL_DEBUG": "INFO", "WANDB_API_KEY": "secret", "HF_TOKEN": "secret", "A": ""}
    assert kept_variables(given) == {"NCCL_DEBUG": "INFO", "OMP_NUM_THREADS": "1"}


def test_the_hash_of_a_recipe_is_of_what_it_says(recipe_file):
    def of(*overrides, more=""):
        return recipe_hash(load_recipe(recipe_file(more), list(overrides)).recipe.stages[0])

    assert of() == of("train.learning_rate=0.001") == of(more="# a comment")
    assert of() != of("train.learning_rate=0.002")


def test_versions_name_what_is_not_there():
    found = versions()
    assert found["torch"]
    assert found["lapilli"]
    assert {"python", "transformers", "peft", "cuda", "driver", "bitsandbytes"} <= found.keys()
