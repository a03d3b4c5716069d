# pyright: reportArgumentType=false, reportCallIssue=false, reportReturnType=false, reportIndexIssue=false
"""`report.html` and `metrics.json` of the quickstart: what was measured, on one page that needs nothing else."""

import io
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image

import lapilli
from lapilli.base.atomic import write_json
from lapilli.base.html import Html, image_grid, join, page, section, table, tag, write_page
from lapilli.quickstart.examine import Result
from lapilli.quickstart.plan import Paths, Sizes
from lapilli.train.metrics import read_metrics
from lapilli.train.report import loss_section

CARDS = 18
ENLARGE = 5


def write_metrics(
    paths: Paths, sizes: Sizes, result: Result, seconds: Mapping[str, float], commands: Sequence[str]
) -> dict[str, Any]:
    """Write `metrics.json` and return what it holds."""
    answer, share = result.most_frequent
    metrics = {
        "held_out": {
            "questions": len(result.exams),
            "exact_match": result.exact_match,
            "exact_match_wrong_picture": result.wrong_picture,
            "most_frequent_answer": answer,
            "most_frequent_answer_share": share,
            "by_kind": [
                {"kind": k, "questions": n, "exact_match": seen, "wrong_picture": blind}
                for k, n, seen, blind in result.by_kind()
            ],
        },
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
        "total_seconds": round(sum(seconds.values()), 2),
        "commands": list(commands),
        "sizes": sizes.model_dump(),
        "made_with": {
            "lapilli": lapilli.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
            "machine": platform.machine(),
            "torch_threads": torch.get_num_threads(),
        },
    }
    write_json(paths.metrics, metrics)
    return metrics


def write_report(paths: Paths, metrics: Mapping[str, Any], result: Result) -> None:
    """Write `report.html` from the metrics, the examination and both stages' own loss records."""
    held_out = metrics["held_out"]
    seen, blind = percent(held_out["exact_match"]), percent(held_out["exact_match_wrong_picture"])
    content = page(
        "lapilli quickstart",
        section("Held-out accuracy", *accuracy(held_out)),
        section(
            "Held-out pictures",
            tag("p", "Scans that no part and no stage was trained on.", class_="soft"),
            grid(paths.pictures, result),
        ),
        loss_section("Stage 1: the projector learns to say captions", read_metrics(paths.align / "metrics.jsonl")),
        loss_section("Stage 2: the whole model learns to answer", read_metrics(paths.instruct / "metrics.jsonl")),
        section("Time", times(metrics)),
        section("Commands", tag("pre", "\n".join(metrics["commands"]))),
        lead=f"{seen} of {held_out['questions']} held-out questions answered exactly; {blind} with the wrong picture.",
    )
    write_page(paths.report, content)


def accuracy(held_out: Mapping[str, Any]) -> tuple[Html, Html]:
    """The table of exact matches by kind of question, and what to compare it with."""

    def row(name: object, of: Mapping[str, Any], wrong: str) -> tuple[object, ...]:
        return name, of["questions"], percent(of["exact_match"]), percent(of[wrong])

    rows = [row(kind["kind"], kind, "wrong_picture") for kind in held_out["by_kind"]]
    rows.append(row(tag("strong", "all"), held_out, "exact_match_wrong_picture"))
    note = (
        f'Always answering "{held_out["most_frequent_answer"]}", the most frequent answer, would be right in '
        f"{percent(held_out['most_frequent_answer_share'])} of the questions. With the wrong picture, the same model "
        "gets the same question about the picture of another question."
    )
    return table(("question", "asked", "exact match", "with the wrong picture"), rows), tag("p", note)


def times(metrics: Mapping[str, Any]) -> Html:
    rows: list[tuple[object, str]] = [(name, f"{value:.1f}") for name, value in metrics["seconds"].items()]
    return table(("phase", "seconds"), [*rows, (tag("strong", "all"), f"{metrics['total_seconds']:.1f}")])


def grid(pictures: Path, result: Result) -> Html:
    """Cards of held-out pictures with question, answer and truth: the first ones, wrong answers among them."""
    right = result.right(result.answers)
    wrong = [i for i, ok in enumerate(right) if not ok][: CARDS // 6]
    shown = sorted({*wrong, *[i for i in range(len(right)) if i not in wrong][: CARDS - len(wrong)]})
    cards = []
    for i in shown:
        exam, answer = result.exams[i], result.answers[i]
        verdict = tag("span", answer or "(nothing)", class_="good" if right[i] else "bad")
        lines = [tag("div", exam.question.splitlines()[-1]), tag("div", tag("strong", verdict))]
        lines.append(tag("div", f"truth: {exam.answer}", class_="soft"))
        cards.append(([enlarged(pictures / name) for name in exam.images], join(*lines)))
    return image_grid(cards)


def enlarged(path: Path) -> bytes:
    """The picture as PNG, each pixel a square, so that a page shows what the model sees."""
    with Image.open(path) as picture:
        size = (picture.width * ENLARGE, picture.height * ENLARGE)
        out = io.BytesIO()
        picture.resize(size, Image.Resampling.NEAREST).save(out, "PNG", optimize=True)
    return out.getvalue()


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"
