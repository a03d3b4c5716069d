"""Models, and a small task of our own, for evaluation's tests."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from tests.support.tiny import build_parrot, build_tiny, make_picture

import lapilli
from lapilli.evaluate.catalogue import load_task
from lapilli.evaluate.job import open_job

SAYS = "a red dog 음식"


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    return tmp_path_factory.mktemp("evaluate")


@pytest.fixture(scope="session")
def tiny(models):
    """Random: its answers depend on every token and pixel."""
    return lapilli.load(build_tiny(models / "tiny"))


@pytest.fixture(scope="session")
def parrot(models):
    return lapilli.load(build_parrot(models / "parrot", f" {SAYS}"))


@dataclass
class Folder:
    """A task's YAML, its questions and its pictures."""

    root: Path

    def task(self, **changes):
        keys = {
            "name": "mine",
            "title": "Mine",
            "about": "for a test",
            "source": ["here"],
            "files": {"questions": "q.jsonl", "images": "pictures"},
            "reader": "own",
            "scorer": "exact",
            "options": {"groups": ["kind"]},
            "decoding": {"max_new_tokens": 12},
        }
        file = self.root / "mine.yaml"
        file.write_text(yaml.safe_dump({**keys, **changes}, sort_keys=False))
        return load_task(str(file))

    def questions(self, records):
        (self.root / "q.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))

    def job(self, wanted=("llava", "official"), limit=None, **changes):
        return open_job(self.task(**changes), self.root, wanted, limit=limit)


@pytest.fixture
def folder(tmp_path):
    """Twelve questions about three pictures, not in the pictures' order; what the parrot says is right for eight."""
    made = Folder(tmp_path / "data")
    (made.root / "pictures").mkdir(parents=True)
    for i in range(3):
        make_picture(made.root / "pictures" / f"{i}.png", 60 + i, 50, seed=i)
    made.questions(
        {
            "question_id": i,
            "text": f"What is it, no. {i}?",
            "image": f"{i % 3}.png",
            "answer": "no" if i % 3 == 0 else SAYS.upper(),
            "kind": "first" if i < 6 else "second",
        }
        for i in range(12)
    )
    return made
