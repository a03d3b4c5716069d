"""Two processes started by torchrun itself: all killed, one of them dying, and what they wrote gathered in the end."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests.support.tiny import build_parrot, make_picture

pytestmark = pytest.mark.slow

QUESTIONS = 40
TASK = """
name: mine
title: Mine
about: for a test
source: [here]
files: {questions: q.jsonl, images: pictures}
reader: own
scorer: contains
decoding: {max_new_tokens: 120}
"""
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
EVALUATE = ["-m", "lapilli.cli", "evaluate", "model", "--task", "mine.yaml", "--out", "out", "--device", "cpu"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("torchrun")
    build_parrot(root / "model", " one blue bird", endless=True)
    (root / "pictures").mkdir()
    for i in range(4):
        make_picture(root / "pictures" / f"{i}.png", seed=i)
    lines = (
        {"question_id": i, "text": f"What {i}?", "image": f"{i % 4}.png", "answer": "bird" if i else "cat"}
        for i in range(QUESTIONS)
    )
    (root / "q.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (root / "mine.yaml").write_text(TASK)
    return root


def start(root):
    return subprocess.Popen(
        [*TORCHRUN, *EVALUATE, "--batch-size", "2"],
        cwd=root,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def answered(root):
    """Question ids in each process's file, of whole lines."""
    texts = [path.read_text() for path in sorted((root / "out" / "mine").glob("answers-0*.jsonl"))]
    return [[json.loads(line)["question_id"] for line in text.split("\n")[:-1]] for text in texts]


def wait_for(root, count, process):
    """Until both processes have so many answers."""
    until = time.monotonic() + 240
    while len(found := answered(root)) < 2 or min(map(len, found)) < count:
        assert time.monotonic() < until
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    return found


def process_of(parent, rank):
    """The process that torchrun started as this rank."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            below = int((folder / "stat").read_text().rpartition(")")[2].split()[1]) == parent
            if below and f"RANK={rank}" in (folder / "environ").read_text().split("\0"):
                return int(folder.name)
        except OSError:
            continue
    raise AssertionError(f"no rank {rank}")


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds a process by /proc")
def test_killed_processes_go_on_and_are_gathered(root):
    killed = start(root)
    wait_for(root, 2, killed)
    for process in [killed.pid, *(process_of(killed.pid, rank) for rank in range(2))]:  # a machine that goes down
        os.kill(process, signal.SIGKILL)
    killed.communicate()
    first = answered(root)

    lame = start(root)
    wait_for(root, max(map(len, first)) + 2, lame)
    os.kill(process_of(lame.pid, 1), signal.SIGKILL)
    _, said = lame.communicate(timeout=120)
    assert lame.returncode != 0
    assert "mine: stopped by SIGTERM" in said  # torchrun tells the other, which says what to do
    assert "the same command goes on" in said
    assert not (root / "out" / "mine" / "results.json").exists()
    second = answered(root)
    assert [now[: len(before)] for now, before in zip(second, first, strict=True)] == first  # nothing asked twice
    assert sum(map(len, second)) < QUESTIONS

    last = start(root)
    shown, said = last.communicate(timeout=240)
    assert last.returncode == 0, said
    found = answered(root)
    assert sorted(found[0] + found[1]) == list(range(QUESTIONS))
    assert [len(own) for own in found] == [QUESTIONS // 2] * 2
    made = json.loads((root / "out" / "mine" / "results.json").read_text())
    assert (made["counts"]["answered"], made["counts"]["missing"]) == (QUESTIONS, 0)
    assert made["protocols"]["llava"]["values"] == {"accuracy": pytest.approx(100 * (QUESTIONS - 1) / QUESTIONS)}
    assert len(made["answers"]) == 2
    assert shown.count("97.50") == 1  # one process has something to tell
