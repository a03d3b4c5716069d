"""The nouns of the evaluation room: a Task, its Questions, the answers, the Scores.

A Task is one YAML file that says where its data lie, what the model is asked, how it decodes, how an answer is read
and what is counted, with the source of each. What a file names is in code, once: a reader, a scorer, a writer of
submission files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from lapilli.data.sample import Image

Protocol = Literal["llava", "official"]
"""`llava`: the original's numbers, its quirks included; `official`: what the benchmark's authors define."""
PROTOCOLS: tuple[Protocol, ...] = ("llava", "official")


class Decoding(BaseModel):
    """How a task's answers are generated."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_new_tokens: Annotated[int, Field(gt=0)] = 128
    temperature: Annotated[float, Field(ge=0)] = 0.0
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    num_beams: Annotated[int, Field(gt=0)] = 1


class FollowUp(BaseModel):
    """A second round that goes on behind the model's own first answer, such as `The answer is` behind a reasoning."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    text: str
    """What is written behind the first answer, in the model's own turn."""
    max_new_tokens: Annotated[int, Field(gt=0)] = 64
    joined: str = "\n"
    """What stands between the two answers in the answers file."""


class Task(BaseModel):
    """One benchmark, as its YAML file describes it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    title: str
    about: str
    """What it measures and how an answer is read and counted, in a sentence or two."""
    source: tuple[str, ...]
    """Where the prompt, the parsing and the metric are defined."""
    files: Mapping[str, str]
    """Name of each part of the data (questions, images, truth, ...) to its default place under the data folder."""
    folder: str = ""
    """Its folder under the data folder; by default its name. Tasks over the same files share one."""
    obtain: str = ""
    """Where the files come from, for whoever lacks one."""
    optional: frozenset[str] = frozenset()
    """Parts that may be missing: without `truth`, answers are written for submission and not scored."""
    reader: str
    """Name in `readers.READERS`."""
    scorer: str | None = None
    """Name in `scorers.SCORERS`; null: there is nothing to score here, only a submission or a judge."""
    submission: str | None = None
    """Name in `submissions.SUBMISSIONS`."""
    options: Mapping[str, Any] = Field(default_factory=dict)
    """What reader, scorer and submission want to know besides: a suffix of the prompt, a split, a language."""
    protocols: Mapping[Protocol, Mapping[str, Any]] = Field(default_factory=dict)
    """Options that hold under one protocol only."""
    decoding: Decoding = Decoding()
    follow_up: FollowUp | None = None
    headline: str = "accuracy"
    """The value that stands for the task in tables."""
    higher_is_better: bool = True

    def options_for(self, protocol: Protocol) -> dict[str, Any]:
        """The task's options, with what the protocol changes of them."""
        return {**self.options, **self.protocols.get(protocol, {})}


@dataclass(frozen=True, slots=True)
class Question:
    """One question of a task, ready to be asked."""

    id: str
    """Unique in its task: the benchmark's own id, with the round where a question is asked in several."""
    text: str
    """What the model is asked, with `<image>` where each picture stands."""
    images: tuple[Image, ...] = ()
    """In order; paths are relative to the task's image root."""
    truth: Any = None
    """What the scorer compares with; None where it is not public."""
    choices: tuple[str, ...] = ()
    groups: Mapping[str, str] = field(default_factory=dict)
    """Kinds of grouping (category, subject, type) to the group of this question."""
    record: Mapping[str, Any] = field(default_factory=dict)
    """The benchmark's own record, for submission files and reports; pictures as paths."""
    where: str = ""
    """File and record, for messages."""


@dataclass(frozen=True, slots=True)
class Scores:
    """What a task's answers are worth under one protocol. Values in percent, unless the metric says otherwise."""

    values: dict[str, float]
    items: dict[str, float] = field(default_factory=dict)
    """Question id to the score of its answer, 0 to 1, whose mean is the headline; empty if it is no mean."""
    groups: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    """Kind of grouping, group, value."""
    counts: dict[str, dict[str, int]] = field(default_factory=dict)
    """Kind of grouping, group: how many questions it has."""
    parsed: dict[str, str] = field(default_factory=dict)
    """Question id to the answer as it was read: a letter, a normalised word."""
    notes: tuple[str, ...] = ()
    """What a reader of the numbers must know: answers that could not be read, quirks that made a difference."""
    again: Callable[[np.ndarray], float] | None = None
    """The headline of a resampled set of questions, by indices (n,) into the scored ones in the order of `order`; None:
    the mean of `items`."""
    order: tuple[str, ...] = ()
    """Ids that `again` counts by; empty: those of `items`."""
    ratio: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Where the headline is the ratio of two sums, in percent: question id to what it adds above and below."""
    said: dict[str, str] = field(default_factory=dict)
    """Question id to a judge's reply, word for word."""


Reader = Callable[[Task, Mapping[str, Any], Mapping[str, Any]], list[Question]]
"""(task, its files as paths, its options) to questions, every one checked. Raises DataError."""
Scorer = Callable[[Sequence[Question], Mapping[str, str], Mapping[str, Any]], Scores]
"""(questions, answers by id, options) to scores. Every question given has an answer."""
Submission = Callable[[Sequence[Question], Mapping[str, str], Mapping[str, Any], Any], list[Any]]
"""(questions, answers by id, options, folder) to the files written."""
