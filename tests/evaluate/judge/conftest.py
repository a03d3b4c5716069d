"""Questions, contexts and answers for the judge, in the forms of the original's files."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from lapilli.evaluate.judge.endpoint import Endpoint, Patience
from lapilli.evaluate.judge.items import read_items
from lapilli.evaluate.judge.prompt import Asking, requests
from lapilli.evaluate.judge.reviews import Store
from lapilli.evaluate.judge.rules import load_rules
from lapilli.evaluate.judge.run import Settings, judge

QUICK = Patience(attempts=4, timeout_seconds=5, backoff_seconds=0.001, max_wait_seconds=5)


@dataclass
class Bench:
    """A folder of judge files."""

    root: Path

    def write(self, name, records):
        path = self.root / name
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return path

    def make(self, count=3):
        kinds = ("conv", "detail", "complex")
        self.write(
            "q.jsonl",
            [
                {"question_id": i, "image": f"{i}.jpg", "text": f"What is it, {i}?", "category": kinds[i % 3]}
                for i in range(count)
            ],
        )
        self.write("c.jsonl", [{"id": i, "image": f"{i}.jpg", "caption": f"Caption {i}."} for i in range(count)])
        # The two files are in other orders than the questions: only ids join them.
        self.write(
            "ref.jsonl",
            [{"question_id": i, "text": f"Reference {i}.", "answer_id": f"r{i}"} for i in reversed(range(count))],
        )
        self.write(
            "ours.jsonl",
            [{"question_id": i, "text": f"Ours {i}.", "answer_id": f"o{i}", "model_id": "m"} for i in range(count)],
        )
        return self

    def items(self, **options):
        names = {"context": self.root / "c.jsonl", **options}
        return read_items(
            self.root / "q.jsonl", [self.root / "ref.jsonl", self.root / "ours.jsonl"], load_rules(None), **names
        )

    def run(
        self, server, *, both=False, patience=QUICK, key=None, asking=None, items=None, out="reviews.jsonl", **settings
    ):
        asking = asking or Asking("judge")
        asked = requests(items or self.items(), asking, both)
        endpoint = Endpoint(server.url, key, patience)
        return judge(asked, asking, endpoint, Settings(**{"concurrency": 1, **settings}), Store(self.root / out), {})

    def reviews(self, out="reviews.jsonl"):
        return [json.loads(line) for line in (self.root / out).read_text().splitlines()]

    def replies(self, out="reviews"):
        return [json.loads(line) for line in (self.root / f"{out}.judge" / "replies.jsonl").read_text().splitlines()]


@pytest.fixture
def bench(tmp_path):
    return Bench(tmp_path).make()
