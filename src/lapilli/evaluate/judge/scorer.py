"""The scorer `judge`: a task's answers are given to a judge model, and its reviews are the scores.

What was asked already is not asked again, so that both protocols, a second command and a killed one pay once.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lapilli.base.errors import RecipeError, RunError
from lapilli.base.version import VERSION
from lapilli.evaluate.job import IMAGES
from lapilli.evaluate.judge import run, spending
from lapilli.evaluate.judge.endpoint import Endpoint, Patience, check_url, read_key
from lapilli.evaluate.judge.items import Item, question_items
from lapilli.evaluate.judge.options import JUDGE, JudgeOptions, judge_options
from lapilli.evaluate.judge.prompt import Asking, Request, requests
from lapilli.evaluate.judge.reviews import REVIEWS_FILE, Store
from lapilli.evaluate.judge.rules import load_rules
from lapilli.evaluate.judge.scores import review_scores
from lapilli.evaluate.stopped import Stopped
from lapilli.evaluate.task import Question, Scores

OPTIONS = frozenset({JUDGE})
RULES = "rules"
"""The part of a task's files that holds rules in place of our own, in the form of the original's rule.json."""

log = logging.getLogger(__name__)


def before(questions: Sequence[Question], options: Mapping[str, Any]) -> None:
    """Raise RecipeError or DataError for what would stop the judge at once: address, key, price, rules, references."""
    how = judge_options(options)
    check_url(how.url, read_key(how.key_env, how.url))
    _price(how)
    _requests(how, _items(how, questions, dict.fromkeys((question.id for question in questions), ""), options), options)


def score(questions: Sequence[Question], answers: Mapping[str, str], options: Mapping[str, Any]) -> Scores:
    """Ask the judge of `options` what has no review yet, and score by the reviews (see `scores.review_scores`).

    Replies lie in a folder beside the answers. Raises RunError if a request has no reply, Stopped if the user stops.
    """
    how = judge_options(options)
    if options["folder"] is None:
        raise RecipeError(f"task {options['task']}: a judge's replies are kept; name a folder for them with --out")
    items = _items(how, questions, answers, options)
    store = Store(_folder(options["folder"], how) / REVIEWS_FILE)
    _ask(how, items, store, options)
    made = review_scores(store.path, options["protocol"])
    return replace(made, notes=(f"judged by {how.model}", *made.notes))


def _items(
    how: JudgeOptions, questions: Sequence[Question], answers: Mapping[str, str], options: Mapping[str, Any]
) -> list[Item]:
    rules = load_rules(options["files"].get(RULES))
    items = question_items(options["task"], questions, answers, rules, how.style)
    if how.both_orders and all(item.graded for item in items):
        raise RecipeError(f"task {options['task']}: judge.both_orders: grades are given to one answer at a time")
    return items


def _ask(how: JudgeOptions, items: Sequence[Item], store: Store, options: Mapping[str, Any]) -> None:
    asking, asked = _requests(how, items, options)
    settings = run.Settings(how.concurrency, how.requests_per_minute, _price(how), how.max_cost, forget_others=True)
    left = run.preview(asked, asking, settings, store)
    if left.requests:
        for line in spending.in_words(how.model, left):
            log.warning("%s: %s", options["task"], line)
    patience = Patience(how.attempts, how.timeout, max_wait_seconds=how.max_wait)
    endpoint = Endpoint(how.url, read_key(how.key_env, how.url), patience)
    about = {"lapilli": VERSION, "task": options["task"], **how.model_dump(exclude={"key_env"})}
    made = run.judge(asked, asking, endpoint, settings, store, about)
    task = options["task"]
    if made.signal is not None:
        raise Stopped(f"{task}: stopped by {made.signal}; the same command goes on with the judge", made.signal)
    if made.failed or made.ended is not None:
        lost = len(made.failed) + made.unasked
        why = made.ended or made.failed[0][1]
        raise RunError(
            f"task {task}: {lost} of {made.requests} requests to the judge have no reply: {why}; the answers are kept, "
            "and the same command asks the judge what is left"
        )


def _requests(how: JudgeOptions, items: Sequence[Item], options: Mapping[str, Any]) -> tuple[Asking, list[Request]]:
    images = str(options["files"][IMAGES]) if how.pictures and IMAGES in options["files"] else None
    if how.pictures and (images is None or all(item.image is None for item in items)):
        raise RecipeError(f"task {options['task']}: judge.pictures: the task has none")
    asking = Asking(how.model, how.temperature, how.max_tokens, how.limit_field, images)
    return asking, requests(items, asking, how.both_orders)


def _price(how: JudgeOptions) -> spending.Price | None:
    return spending.choose_price(how.model, how.price_in, how.price_out, None, how.max_cost is not None)


def _folder(folder: Path, how: JudgeOptions) -> Path:
    """Beside the answers, one for each judge, so that what was spent on one is not another's."""
    return folder / f"judge-{re.sub(r'[^A-Za-z0-9._-]+', '-', how.model)}"
