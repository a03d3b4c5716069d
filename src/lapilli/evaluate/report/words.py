"""What a report says in words, the same in every form: limits, notes, scores of one answer."""

from __future__ import annotations

from collections.abc import Sequence

from lapilli.evaluate.report.choose import Chosen, Reply
from lapilli.evaluate.report.gather import Gathered

LONGEST = 1500
"""Characters of an answer or question that are shown."""
_KINDS = {
    "differ": "that models answer differently",
    "wrong": "wrong",
    "partly": "partly right",
    "right": "right",
    "unscored": "not scored",
    "missing": "without an answer",
}


def limits(tasks: Sequence[Gathered], chosen: Sequence[Chosen]) -> list[str]:
    """What of each task's questions is shown, and what can't be."""
    said: list[str] = []
    for task, own in zip(tasks, chosen, strict=True):
        parts = ", ".join(f"{own.shown[name]:,} of {count:,} {_KINDS[name]}" for name, count in own.found.items())
        listed = f" ({parts})" if parts else ""
        said.append(f"{task.name}: {len(own.cases):,} of {sum(own.found.values()):,} questions are shown{listed}")
        said += [f"{task.name}: {note}" for note in task.notes]
    return said


def notes(tasks: Sequence[Gathered]) -> list[str]:
    """What a reader of the numbers must know, of every model and task."""
    return [
        f"{entry.model}, {task.name}: {note}"
        for task in tasks
        for entry in task.entries
        for note in dict.fromkeys(
            (*entry.results.notes, *(n for found in entry.results.protocols.values() for n in found.notes))
        )
    ]


def cut(text: str) -> str:
    """A text as long as a report shows it; what is left out is said."""
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} ... ({len(text) - LONGEST:,} more characters)"


def score_text(reply: Reply) -> str:
    """An answer's score under each protocol, once where they agree; its verdict where it has none."""
    if not reply.scores:
        return reply.verdict
    if len(set(reply.scores.values())) == 1:
        return f"{next(iter(reply.scores.values())):.4g}"
    return ", ".join(f"{protocol} {score:.4g}" for protocol, score in reply.scores.items())


def read_text(reply: Reply) -> str:
    """The answer as it was read for scoring, under each protocol where they differ; empty where it was not."""
    found = set(reply.parsed.values())
    if len(found) <= 1:
        return cut("".join(found))
    return cut(", ".join(f"{protocol}: {parsed}" for protocol, parsed in reply.parsed.items()))


def answer_text(reply: Reply) -> str:
    """What a model said, or why it said nothing; that an answer was cut short is said."""
    if reply.text is None:
        return f"no answer: {reply.reason}"
    return cut(reply.text) + (" (cut at its longest)" if reply.finish in ("length", "context") else "")
