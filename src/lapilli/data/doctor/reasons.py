"""What can be wrong with data, as a fixed list that a report counts by.

Every refusal already has a message for the person who mends it. A report over a million records needs fewer words, so
each message is filed under one reason, by the stage that raised it and what it says. A message that fits no reason is
filed under its stage, so nothing is lost.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

Stage = Literal["record", "row", "picture", "encode"]
Level = Literal["bad", "note"]


@dataclass(frozen=True, slots=True)
class Reason:
    """`bad` records would stop a run (or spoil its validation); a `note` is worth knowing."""

    code: str
    level: Level
    title: str


REASONS = {
    reason.code: reason
    for reason in (
        Reason("file", "bad", "file can't be read to its end"),
        Reason("json", "bad", "not JSON"),
        Reason("record", "bad", "a field is missing or of the wrong kind"),
        Reason("row", "bad", "row of prepared data that does not hold together"),
        Reason("vocabulary", "bad", "token ids outside the vocabulary"),
        Reason("places", "bad", "picture places that are not a picture's"),
        Reason("counts", "bad", "placeholders and pictures differ in number"),
        Reason("roles", "bad", "unknown role, or roles in the wrong order"),
        Reason("empty", "bad", "empty answer or conversation"),
        Reason("no_supervised", "bad", "no supervised token"),
        Reason("too_long", "bad", "longer than max_length"),
        Reason("encode", "bad", "refused by the template or the tokenizer"),
        Reason("missing", "bad", "picture file missing"),
        Reason("outside", "bad", "picture path leaves the image folder"),
        Reason("truncated", "bad", "picture truncated or damaged"),
        Reason("format", "bad", "not a picture in a known format"),
        Reason("oversized", "bad", "picture oversized"),
        Reason("mode", "bad", "picture of a wrong mode"),
        Reason("changed", "bad", "picture has another size than when it was prepared"),
        Reason("picture", "bad", "picture can't be opened"),
        Reason("leak", "bad", "training record that is in the validation data too"),
        Reason("duplicate", "note", "the same conversation and pictures again"),
        Reason("leaked_picture", "note", "training picture that is in the validation data too"),
        Reason("animated", "note", "animated picture: its first frame is used"),
        Reason("dropped", "note", "left out by data.too_long"),
        Reason("cut", "note", "part of the conversation is not used"),
    )
}
"""Reasons by code, in the order in which reports list them."""

_WORDS: dict[Stage, tuple[tuple[str, str], ...]] = {
    "record": (
        (r"not JSON|can't be read as JSON", "json"),
        (r"<image>.*(`image`|picture)|picture.*<image>", "counts"),
        (r"unknown role|are both from the|system message", "roles"),
        (r"\bis empty\b", "empty"),
    ),
    "row": (),
    "picture": (
        (r"there is no file|has no member|names no image folder", "missing"),
        (r"leaves the image folder", "outside"),
        (r"can't be decoded|the file is empty|picture is empty|is damaged|ends before byte", "truncated"),
        (r"known format|header can't be read", "format"),
        (r"more than [\d,]+|more pixels than|too long and thin", "oversized"),
        (r"picture of mode", "mode"),
    ),
    "encode": (
        (r"nothing to learn|no answer is supervised", "no_supervised"),
        (r"but max_length is", "too_long"),
    ),
}


def reason_of(stage: Stage, message: str) -> str:
    """The code of the reason that a refusal at `stage` is filed under; the stage's own where no other fits."""
    return next((code for words, code in _WORDS[stage] if re.search(words, message)), stage)
