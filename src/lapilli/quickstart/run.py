# pyright: reportArgumentType=false, reportCallIssue=false, reportReturnType=false, reportIndexIssue=false
"""The quickstart from first scan to report.

The two parts are made here, because they can't be downloaded offline. From there on only the public commands run, each
in a process of its own and printed as a user would type it; the held-out questions go through `lapilli.load`.
"""

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.utils import logging as transformers_logging

import lapilli
from lapilli.base.errors import RunError
from lapilli.data.template import get_template
from lapilli.quickstart import questions
from lapilli.quickstart.examine import examine
from lapilli.quickstart.language import train_tokenizer
from lapilli.quickstart.parts import make_parts
from lapilli.quickstart.plan import Paths, Sizes
from lapilli.quickstart.records import caption_records, conversation_records, exam_records, read_exams, write_json
from lapilli.quickstart.report import percent, write_metrics, write_report
from lapilli.quickstart.scans import load_scans

TEMPLATE = "vicuna_v1"
RECIPES = ("align.yaml", "instruct.yaml")
TOKENIZER_DIALOGUES = 500

Say = Callable[[str], None]


class Quickstart:
    """One run. `say` takes each line; phases and their seconds are kept for the report."""

    def __init__(self, out: Path, sizes: Sizes, say: Say) -> None:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise RunError(f"{out}: exists already; give another folder with --out, or remove it")
        self.paths, self.sizes, self.say = Paths(out), sizes, say
        self.seconds: dict[str, float] = {}
        self.commands: list[str] = []

    def run(self) -> dict[str, Any]:
        """Do everything in order; returns what `metrics.json` holds."""
        with self.phase("draw the pictures"):
            self.scans, self.held_out_scans = load_scans(self.sizes.seed)
            self.write_data()
        with self.phase("make the parts"):
            self.make_tokenizer()
            make_parts(self.paths.root, self.sizes)
        with self.phase("build"):
            self.lapilli(
                "build", "--vision-encoder", self.paths.vision_encoder, "--language-model", self.paths.language_model,
                "--projector", "mlp2x_gelu", "--template", TEMPLATE, "--out", self.paths.model,
            )  # fmt: skip
        for name, recipe in zip(("train stage 1", "train stage 2"), RECIPES, strict=True):
            with self.phase(name):
                self.lapilli("train", self.paths.recipes / recipe)
        with self.phase("examine"):
            exams = read_exams(self.paths.exam)
            result = examine(lapilli.load(self.paths.instruct), exams, self.paths.pictures, self.sizes.seed)
        metrics = write_metrics(self.paths, self.sizes, result, self.seconds, self.commands)
        write_report(self.paths, metrics, result)
        return metrics

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self.say(f"\n== {name}")
        began = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - began
        self.say(f"   {self.seconds[name]:.1f} s")

    def write_data(self) -> None:
        """Draw the pictures and write data and recipes. Training data has train scans only, all else held-out ones."""
        train, held_out, sizes = self.scans, self.held_out_scans, self.sizes
        if set(train.ids) & set(held_out.ids):
            raise AssertionError("a scan is both in training and held out")
        rng = np.random.default_rng(sizes.seed)
        pictures = self.paths.pictures
        each = sizes.questions_each
        written = {
            "captions.json": caption_records(train, rng, sizes.captions, pictures, "caption"),
            "conversations.json": conversation_records(train, rng, sizes.conversations, pictures, "talk", each),
            "held_out_captions.json": caption_records(held_out, rng, sizes.held_out, pictures, "held-out-caption"),
            "held_out_conversations.json": conversation_records(
                held_out, rng, sizes.held_out, pictures, "held-out-talk", each
            ),
            self.paths.exam.name: exam_records(held_out, rng, sizes.exams, pictures, "exam"),
        }
        for name, records in written.items():
            write_json(self.paths.data / name, records)
        self.paths.recipes.mkdir(parents=True)
        for name in RECIPES:
            text = (files("lapilli.quickstart") / "recipes" / name).read_text("utf-8")
            (self.paths.recipes / name).write_text(text, encoding="utf-8")
        counts = ", ".join(f"{len(records):,} in {name}" for name, records in written.items())
        self.say(f"{len(train.ids):,} scans to train on, {len(held_out.ids)} held out; records: {counts}")

    def make_tokenizer(self) -> None:
        """Train the tokenizer and put it where the language model will be."""
        rng = np.random.default_rng(self.sizes.seed)
        turns = [turn for _ in range(TOKENIZER_DIALOGUES) for turn in questions.random_dialogue(rng).turns()]
        # The template's own words are in the tokenizer's text, so that each is one token here as it is for Vicuna.
        system = [get_template(TEMPLATE).system] * 100
        texts = [*system, *questions.all_words() * 20, *(text for turn in turns for text in turn)]
        train_tokenizer(texts).save_pretrained(self.paths.language_model)

    def lapilli(self, *arguments: str | Path) -> None:
        """Run a public command in a process of its own, offline. Raises RunError if it fails."""
        words = [str(a) for a in arguments]
        line = shlex.join(["lapilli", *words])
        self.commands.append(line)
        self.say(f"$ {line}")
        # A thread that waits by spinning is worse than none when something else runs on its core.
        environment = {"OMP_WAIT_POLICY": "PASSIVE"} | os.environ | {"HF_HUB_OFFLINE": "1"}
        done = subprocess.run([sys.executable, "-m", "lapilli.cli", *words], env=environment, check=False)
        if done.returncode:
            raise RunError(f"`{line}` ended with status {done.returncode}; its message is above")


def quickstart(out: Path, say: Say, sizes: Sizes | None = None, threads: int = 2) -> dict[str, Any]:
    """Make, train and examine a small assistant in the new folder `out`; returns what `metrics.json` holds.

    `threads` are PyTorch's, in this process; the recipes name the same number. Raises RunError if `out` holds anything,
    scikit-learn is missing, or a command fails.
    """
    torch.set_num_threads(threads)
    transformers_logging.disable_progress_bar()
    run = Quickstart(out, sizes or Sizes(), say)
    metrics = run.run()
    held_out = metrics["held_out"]
    say(
        f"\nheld-out exact match        {percent(held_out['exact_match'])} of {held_out['questions']} questions\n"
        f"with the wrong picture      {percent(held_out['exact_match_wrong_picture'])}\n"
        f"most frequent answer alone  {percent(held_out['most_frequent_answer_share'])}\n"
        f"time                        {metrics['total_seconds']:.0f} s\n"
        f"report                      {run.paths.report}"
    )
    picture = next(iter(sorted(run.paths.pictures.glob("exam-*.png"))))
    talk = run.paths.data / "held_out_conversations.json"
    say("\nTry next:")
    for command in (
        ("chat", run.paths.instruct, "--image", picture),
        ("train", run.paths.recipes / "instruct.yaml", f"out={out / 'instruct-again'}", "train.learning_rate=1e-3"),
        (
            "data",
            "show",
            talk,
            "--images",
            run.paths.pictures,
            "--model",
            run.paths.model,
            "--template",
            TEMPLATE,
        ),
    ):
        say(f"  {shlex.join(['lapilli', *(str(word) for word in command)])}")
    return metrics
