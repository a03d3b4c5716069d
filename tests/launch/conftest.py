"""A recipe of some hundred quick steps, and what one uninterrupted process learns from it."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
from tests.train.conftest import REFERENCE, base  # noqa: F401

from lapilli.recipe.load import load_recipe
from lapilli.train.run import train_stage


@dataclass(frozen=True)
class Workshop:
    """A folder with data and `recipe.yaml`; `alone` is the run folder of one process that nobody interrupted."""

    folder: Path
    alone: Path

    @property
    def recipe(self) -> str:
        return str(self.folder / "recipe.yaml")


@pytest.fixture
def write_recipe(tmp_path, monkeypatch):
    """Write a recipe whose files are there but hold nothing, and return its name; it is in the current folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "chat.json").write_text("[]")

    def write(more: str = "", name: str = "align.yaml") -> str:
        (tmp_path / name).write_text(f"model: model\nout: run\ndata: {{train: chat.json}}\n{more}")
        return name

    return write


@pytest.fixture(scope="session")
def workshop(base, tmp_path_factory) -> Workshop:  # noqa: F811
    folder = tmp_path_factory.mktemp("launch")
    records = json.loads((REFERENCE / "training/instruct.json").read_text())
    pictures, text = ([r for r in records if ("image" in r) == wanted] for wanted in (True, False))
    mixed = [one for pair in zip(pictures[:6], text[:6], strict=True) for one in pair]
    (folder / "chat.json").write_text(json.dumps(mixed))
    (folder / "recipe.yaml").write_text(f"""\
model: {base}
out: alone
data: {{train: chat.json, images: {REFERENCE / "training/images"}, workers: 1, index: {folder / "index"}}}
train:
  {{global_batch_size: 4, tokens_per_micro_batch: 700, warmup_ratio: 0, epochs: 50, save_every: 5, optimizer: sgd,
   learning_rate: 0.02}}
run: {{precision: fp32, device: cpu, deterministic: true, threads: 1}}
""")
    (stage,) = load_recipe(str(folder / "recipe.yaml")).recipe.stages
    with open("/dev/null", "w") as stream:
        train_stage(stage, {}, stream=stream)
    return Workshop(folder, folder / "alone")
