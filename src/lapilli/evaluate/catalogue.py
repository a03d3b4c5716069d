"""Tasks by name: the published benchmarks that lapilli knows, and users' own in YAML files.

A task is checked completely when it is read: keys, the names of its parts, and every option.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path

from pydantic import ValidationError

from lapilli.base.errors import RecipeError, unknown
from lapilli.evaluate.judge.options import JUDGE, JUDGED, read_settings
from lapilli.evaluate.readers import READERS
from lapilli.evaluate.registry import Entry, unknown_options
from lapilli.evaluate.scorers import SCORERS
from lapilli.evaluate.submissions import SUBMISSIONS
from lapilli.evaluate.task import Task
from lapilli.recipe.explain import explain
from lapilli.recipe.yaml_file import parse


@cache
def task_names() -> tuple[str, ...]:
    """Names of the tasks that come with lapilli."""
    folder = files("lapilli.evaluate") / "tasks"
    found = (entry.name for entry in folder.iterdir()) if folder.is_dir() else iter(())
    return tuple(sorted(name.removesuffix(".yaml") for name in found if name.endswith(".yaml")))


def all_tasks() -> list[Task]:
    """Every task that comes with lapilli, by name."""
    return [load_task(name) for name in task_names()]


def load_task(name: str) -> Task:
    """A task by its name, or from a YAML file of the user's.

    Raises RecipeError for a name that is not known, naming the nearest one, and for whatever is wrong in a file.
    """
    if is_own(name):
        file = Path(name).expanduser()
        try:
            return read_task(file.read_text(encoding="utf-8"), str(name))
        except OSError as error:
            raise RecipeError(f"{name}: can't be read ({error.strerror})") from error
        except UnicodeDecodeError as error:
            raise RecipeError(f"{name}: not UTF-8 ({error.reason} at byte {error.start})") from error
    if name not in task_names():
        raise RecipeError(f"{unknown('task', name, task_names())}; a task of your own is a file that ends in .yaml")
    text = (files("lapilli.evaluate") / "tasks" / f"{name}.yaml").read_text(encoding="utf-8")
    task = read_task(text, f"task {name}")
    if task.name != name:
        raise RecipeError(f'task {name}: its file says name: "{task.name}"')
    return task


def judged_by(task: Task, settings: Sequence[str]) -> Task:
    """The task with a judge to score it, or with some of its judge's settings changed: `name=value` texts.

    Raises RecipeError for a setting that is not known or not of its kind, and for a task that has another scorer.
    """
    if task.scorer not in (None, JUDGE):
        raise RecipeError(
            f"--judge: task {task.name} is scored by {task.scorer}; a judge is for tasks without a scorer"
        )
    given = read_settings(settings)
    options = {**task.options, JUDGE: {**task.options.get(JUDGE, {}), **given}}
    headline = task.headline if task.scorer == JUDGE else JUDGED
    made = task.model_copy(update={"scorer": JUDGE, "headline": headline, "options": options})
    if wrong := _problems(made):
        raise RecipeError("\n".join(f"--judge, task {task.name}: {line}" for line in wrong))
    return made


def is_own(name: str) -> bool:
    """Whether this names a user's YAML file, not a task that comes with lapilli."""
    return name.endswith((".yaml", ".yml"))


def read_task(text: str, source: str) -> Task:
    """A task from the text of its file; `source` is what messages call it. Raises RecipeError."""
    document = parse(text, source).value
    if not isinstance(document, dict):
        raise RecipeError(f"{source}: a task is a mapping of keys: {', '.join(Task.model_fields)}")
    if document.get("scorer") == JUDGE:
        document = {"headline": JUDGED, **document}
    try:
        task = Task.model_validate(document)
    except ValidationError as error:
        problems = explain(error, Task, document, lambda path: (source, ".".join(map(str, path))))
        raise RecipeError("\n".join(map(str, problems))) from error
    wrong = _problems(task)
    if wrong:
        raise RecipeError("\n".join(f"{source}: {line}" for line in wrong))
    return task


def parts(task: Task) -> list[Entry]:
    """The registered parts that a task names: reader, scorer, submission."""
    named = ((READERS, task.reader), (SCORERS, task.scorer), (SUBMISSIONS, task.submission))
    return [registry[name] for registry, name in named if name is not None and name in registry]


def _problems(task: Task) -> list[str]:
    wrong: list[str] = []
    for key, registry, name in (
        ("reader", READERS, task.reader),
        ("scorer", SCORERS, task.scorer),
        ("submission", SUBMISSIONS, task.submission),
    ):
        if name is not None and name not in registry:
            wrong.append(f"{key}: {unknown(key, name, registry)}")
    if not wrong:
        wrong += [f"options: {line}" for line in unknown_options(task.options, parts(task))]
        wrong += [f"options.{line}" for part in parts(task) if part.faults for line in part.faults(task.options)]
        for protocol, options in task.protocols.items():
            wrong += [f"protocols.{protocol}: {line}" for line in unknown_options(options, parts(task))]
            wrong += [f"protocols.{protocol}.{line}" for p in parts(task) if p.faults for line in p.faults(options)]
    for part in sorted(task.optional - set(task.files)):
        wrong.append(f'optional: "{part}" is not one of its files ({", ".join(task.files)})')
    if not task.name or any(c in task.name for c in "/\\ ,") or task.name.startswith("."):
        wrong.append(f'name: "{task.name}" can\'t name a folder; use letters, digits, - and _')
    return wrong
