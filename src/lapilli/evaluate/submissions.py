"""The writers of submission files that task files name: questions and answers to what a benchmark's server takes."""

from lapilli.evaluate.registry import Entry
from lapilli.evaluate.task import Submission

SUBMISSIONS: dict[str, Entry[Submission]] = {}
