# pyright: reportArgumentType=false, reportCallIssue=false, reportReturnType=false, reportIndexIssue=false
"""The data of both stages and the held-out questions, as a user brings them: LLaVA's JSON and a folder of PNG files.

Stage 1 has captions. Stage 2 has conversations of several turns about one picture, about two pictures, and without
any, each with the picture before or after the first question's words.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from lapilli.data.sample import IMAGE_PLACEHOLDER
from lapilli.quickstart.questions import DESCRIBE, Question, lead, pair_question, questions, text_question
from lapilli.quickstart.scans import Scans
from lapilli.quickstart.scenes import Scene, draw, random_scene

TWO_PICTURES, TEXT_ONLY = 0.15, 0.10
"""Share of the conversations."""


@dataclass(frozen=True)
class Exam:
    """One held-out question: `images` are paths under the picture folder; `question` has `<image>` where they stand."""

    images: tuple[str, ...]
    kind: str
    question: str
    answer: str


def save_pictures(
    scenes: Sequence[Scene], scans: Scans, rng: np.random.Generator, folder: Path, name: str
) -> list[str]:
    """Draw the scenes and write `name-00000.png` ... to `folder`; returns the file names."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"{name}-{i:05d}.png" for i in range(len(scenes))]
    for file, pixels in zip(names, draw(scenes, scans, rng), strict=True):
        Image.fromarray(pixels).save(folder / file, compress_level=1)
    return names


def place(question: str, pictures: int, rng: np.random.Generator) -> str:
    """Put what stands for the pictures before the question, or, one time in three, after it."""
    marks = lead([IMAGE_PLACEHOLDER] * pictures)
    return f"{question}\n{marks}".rstrip("\n") if rng.random() < 1 / 3 else marks + question


def turns(asked: Sequence[Question], pictures: int, rng: np.random.Generator) -> list[dict[str, str]]:
    """Return the conversation in LLaVA's form, its pictures in the first turn."""
    texts = [place(asked[0].text, pictures, rng), *(q.text for q in asked[1:])]
    pairs = zip(texts, asked, strict=True)
    return [t for text, q in pairs for t in ({"from": "human", "value": text}, {"from": "gpt", "value": q.answer})]


def caption_records(scans: Scans, rng: np.random.Generator, count: int, folder: Path, name: str) -> list[dict]:
    """Write `count` pictures and return a stage-1 record for each."""
    scenes = [random_scene(rng) for _ in range(count)]
    return [
        {
            "id": file.removesuffix(".png"),
            "image": file,
            "conversations": [
                {"from": "human", "value": lead([IMAGE_PLACEHOLDER]) + DESCRIBE},
                {"from": "gpt", "value": scene.caption},
            ],
        }
        for scene, file in zip(scenes, save_pictures(scenes, scans, rng, folder, name), strict=True)
    ]


def shown_scenes(rng: np.random.Generator, count: int, text_only: float) -> list[list[Scene]]:
    """Draw the scenes of `count` conversations: one, two of one digit each, or (in the share `text_only`) none."""
    pictures = rng.choice(3, size=count, p=(text_only, 1 - text_only - TWO_PICTURES, TWO_PICTURES))
    return [[random_scene(rng, 1 if n == 2 else None) for _ in range(n)] for n in pictures]


def conversation_records(
    scans: Scans, rng: np.random.Generator, count: int, folder: Path, name: str, questions_each: int
) -> list[dict]:
    """Write the pictures of `count` conversations and return their stage-2 records."""
    shown = shown_scenes(rng, count, TEXT_ONLY)
    files = iter(save_pictures([s for scenes in shown for s in scenes], scans, rng, folder, name))
    records = []
    for number, scenes in enumerate(shown):
        record: dict = {"id": f"{name}-{number:05d}"}
        if len(scenes) == 1:
            record["image"] = next(files)
            asked = questions(scenes[0], rng, questions_each)
        elif scenes:
            record["image"] = [next(files), next(files)]
            asked = list({q.text: q for q in (pair_question(*scenes, rng) for _ in range(questions_each))}.values())
        else:
            asked = [text_question(rng) for _ in range(questions_each)]
        record["conversations"] = turns(asked, len(scenes), rng)
        records.append(record)
    return records


def exam_records(scans: Scans, rng: np.random.Generator, count: int, folder: Path, name: str) -> list[Exam]:
    """Write pictures of held-out scans, no two exams with the same picture, and return one question about each."""
    shown = shown_scenes(rng, count, text_only=0.0)
    files = iter(save_pictures([s for scenes in shown for s in scenes], scans, rng, folder, name))
    exams = []
    for scenes in shown:
        asked = questions(scenes[0], rng, 1)[0] if len(scenes) == 1 else pair_question(scenes[0], scenes[1], rng)
        images = tuple(next(files) for _ in scenes)
        exams.append(Exam(images, asked.kind, lead([IMAGE_PLACEHOLDER] * len(images)) + asked.text, asked.answer))
    return exams


def write_json(path: Path, records: Sequence[dict | Exam]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [asdict(r) if isinstance(r, Exam) else r for r in records]
    path.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def read_exams(path: Path) -> list[Exam]:
    """Read what `write_json` wrote of exams."""
    return [Exam(**{**row, "images": tuple(row["images"])}) for row in json.loads(path.read_text("utf-8"))]
