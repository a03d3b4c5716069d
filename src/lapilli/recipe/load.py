"""From a recipe's name and `a.b=value` overrides to a checked `Recipe`, in milliseconds and without torch.

A recipe file is one stage, or a `stages:` list whose entries lie over the file's other keys. Every value keeps its
origin (file and line, or the command line), so that an error names the place to mend and the run folder's copy of the
recipe says where each value came from. All errors of a recipe are reported together.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path as FilePath
from typing import Any

from pydantic import ValidationError

from lapilli.base.errors import RecipeError, nearest
from lapilli.recipe.explain import Problem, explain
from lapilli.recipe.schema import Recipe, Stage
from lapilli.recipe.tree import Origin, Tree
from lapilli.recipe.yaml_file import Path, parse

COMMAND_LINE = "command line"
MAX_CHARACTERS = 100_000
"""A longer JSON file is no recipe."""
_ONE_STAGE = ("name", "start_from", "model", "out")
"""Keys that in a recipe of several stages are not handed on to each of them."""


@dataclass(frozen=True)
class LoadedRecipe:
    """A checked recipe. `origins` maps `stages.<name>.train.learning_rate` to `file.yaml:12` or `command line`;
    a key that it lacks has its default."""

    recipe: Recipe
    origins: dict[str, str]
    path: str

    def stage_origins(self, name: str) -> dict[str, str]:
        """Origins of one stage's values, by dotted keys such as `train.learning_rate`."""
        prefix = f"stages.{name}."
        return {key.removeprefix(prefix): o for key, o in self.origins.items() if key.startswith(prefix)}


def shipped_recipes() -> list[str]:
    """Names of the recipes that come with lapilli, such as `llava-1.5/pretrain`."""
    root = files("lapilli.recipe") / "shipped"
    return sorted(
        f"{system.name}/{stage.name.removesuffix('.yaml')}"
        for system in root.iterdir()
        if system.is_dir()
        for stage in system.iterdir()
        if stage.name.endswith(".yaml")
    )


def is_recipe(path: str) -> bool:
    """Whether this is a shipped recipe's name, or a file that holds a recipe, by what stands in it: data do not."""
    file = FilePath(path).expanduser()
    if not file.is_file():
        return not file.exists() and path in shipped_recipes()
    keys = {*Stage.model_fields, "stages", "start_from"}
    try:
        with file.open(encoding="utf-8") as stream:
            text = stream.read(MAX_CHARACTERS + 1)
    except (OSError, UnicodeDecodeError):
        return False
    if "\0" in text:
        return False
    if text.lstrip()[:1] in ("{", "["):  # JSON is YAML too
        try:
            value = parse(text, path).value if len(text) <= MAX_CHARACTERS else None
        except RecipeError:
            return False
        return isinstance(value, dict) and bool(value) and set(value) <= keys
    return bool(re.search(rf"^({'|'.join(sorted(keys))})[ \t]*:", text, re.MULTILINE))


def load_recipe(path: str, overrides: list[str] | None = None) -> LoadedRecipe:
    """Read a recipe file, or a shipped recipe by its name, and lay `a.b=value` overrides over it.

    An override's value is YAML. In a recipe of several stages it holds for every stage; `stages.NAME.a.b=value` holds
    for one. Relative paths are relative to the recipe file; on the command line and in shipped recipes, to the
    current folder.
    Raises RecipeError with one line per problem, each naming file and dotted key.
    """
    text, source, folder = _read(path)
    document = parse(text, source)
    if not isinstance(document.value, dict):
        raise RecipeError(f"{source}: a recipe is a mapping of keys such as model, out, data, train, run")
    tree = Tree(document.value)
    for key, line in document.lines.items():
        tree.origins[key] = Origin(source, _source_key(document.value, key), line, folder)

    problems: list[Problem] = []
    everywhere, by_stage = _overrides(overrides or [])
    stages = _stages(tree, everywhere, by_stage, source, problems)
    checked: list[tuple[Stage, Tree]] = []
    for stage in stages:
        _absolute_paths(stage)
        try:
            checked.append((Stage.model_validate(stage.value), stage))
        except ValidationError as error:
            problems += explain(error, Stage, stage.value, lambda p, s=stage: _place(s, p, source))
    if not problems:
        problems += [p for stage, _ in checked for p in _missing(stage, source, len(checked) > 1)]
    if problems:
        raise RecipeError("\n".join(dict.fromkeys(str(p) for p in problems)))

    origins = {
        ".".join(map(str, ("stages", stage.name, *path))): str(origin)
        for stage, tree in checked
        for path, origin in tree.origins.items()
    }
    return LoadedRecipe(Recipe(stages=tuple(stage for stage, _ in checked)), origins, path)


def _read(path: str) -> tuple[str, str, FilePath]:
    """Return the recipe's text, what messages call it, and the folder its relative paths start from."""
    file = FilePath(path).expanduser()
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8"), file.name, file.resolve().parent
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"{path}: can't be read: {error}") from error
    names = shipped_recipes()
    if path in names:
        text = (files("lapilli.recipe") / "shipped" / f"{path}.yaml").read_text(encoding="utf-8")
        return text, path, FilePath.cwd()
    raise RecipeError(f"{path}: no such recipe file{nearest(path, names)}; shipped recipes: {', '.join(names)}")


def _source_key(value: dict[str, Any], path: Path) -> str:
    """Dotted key as the file has it, with `stages.<name>` in place of the stage's number."""
    if len(path) > 1 and path[0] == "stages" and isinstance(path[1], int):
        entry = value["stages"][path[1]]
        name = entry.get("name") if isinstance(entry, dict) else None
        path = ("stages", name if isinstance(name, str) else path[1], *path[2:])
    return ".".join(map(str, path))


def _overrides(given: list[str]) -> tuple[Tree, dict[str, Tree]]:
    """Split overrides into those for every stage and those for one stage by its name."""
    everywhere, by_stage = Tree(), {}
    for item in given:
        key, equals, text = item.partition("=")
        path = tuple(key.strip().split("."))
        if not equals or not all(path):
            raise RecipeError(f'{COMMAND_LINE}: "{item}": an override looks like train.learning_rate=1e-4')
        value = parse(text, f"{COMMAND_LINE}: {key}").value
        origin = Origin(COMMAND_LINE, key.strip(), None, FilePath.cwd())
        if path[0] == "stages":
            if len(path) < 3:
                raise RecipeError(f"{COMMAND_LINE}: {key}: name a stage and a key: stages.NAME.train.epochs=2")
            by_stage.setdefault(path[1], Tree()).put(path[2:], value, origin)
        else:
            everywhere.put(path, value, origin)
    return everywhere, by_stage


def _stages(
    tree: Tree, everywhere: Tree, by_stage: dict[str, Tree], source: str, problems: list[Problem]
) -> list[Tree]:
    """Lay each stage over the common keys and the overrides over both; give each its model and its folder."""
    common, listed = tree.without("stages"), tree.value.get("stages")
    if listed is None:
        problems += [Problem(COMMAND_LINE, f"stages.{name}", f"{source} has no stages") for name in by_stage]
        return [common.overlay(everywhere)]
    if not isinstance(listed, list) or not listed or not all(isinstance(s, dict) for s in listed):
        problems.append(Problem(source, "stages", "must be a list of stages, each a mapping with a name"))
        return []
    base = common.overlay(everywhere)
    names = [str(s.get("name", f"stage{i + 1}")) for i, s in enumerate(listed)]
    for name in by_stage:
        if name not in names:
            problems.append(
                Problem(
                    COMMAND_LINE, f"stages.{name}", f"unknown stage{nearest(name, names)}; stages: {', '.join(names)}"
                )
            )
    stages: list[Tree] = []
    folders: dict[str, str] = {}
    for i, name in enumerate(names):
        if "name" not in listed[i] or names.index(name) != i:
            problems.append(Problem(source, f"stages.{i}.name", "each stage of a list needs a name of its own"))
        stage = common.without(*_ONE_STAGE).overlay(tree.part("stages", i)).overlay(everywhere.without(*_ONE_STAGE))
        if name in by_stage:
            stage = stage.overlay(by_stage[name])
        problems += _hand_over(stage, base, names[:i], folders)
        out = _absolute(stage, ("out",)) or _absolute(base, ("out",), name)
        if out:
            twin = next((earlier for earlier, folder in folders.items() if folder == out), None)
            if twin is not None:
                at = stage.origins.get(("out",)) or base.origins[("out",)]
                problems.append(Problem(at.source, at.key, f"stages {twin} and {name} write the same folder, {out}"))
            stage.put(("out",), out, stage.origins.get(("out",)) or base.origins[("out",)])
            folders[name] = out
        stages.append(stage)
    return stages


def _hand_over(stage: Tree, base: Tree, earlier: list[str], folders: dict[str, str]) -> list[Problem]:
    """Decide which model the stage starts from: its own, a named earlier stage's, or the stage's before it."""
    start_at = stage.origins.get(("start_from",))
    start = stage.value.get("start_from")
    stage.drop("start_from")
    if start_at is not None:
        if "model" in stage.value:
            return [Problem(start_at.source, start_at.key, "start_from and model exclude each other")]
        if start not in earlier:
            known = f"; earlier stages: {', '.join(earlier)}" if earlier else "; this is the first stage"
            text = f'"{start}" is no earlier stage{nearest(str(start), earlier)}{known}'
            return [Problem(start_at.source, start_at.key, text)]
        if start in folders:
            stage.put(("model",), folders[start], start_at)
    elif "model" not in stage.value and not earlier:
        if "model" in base.value:
            stage.put(("model",), base.value["model"], base.origins[("model",)])
    elif "model" not in stage.value and earlier[-1] in folders:
        origin = Origin(f"stage {earlier[-1]}", "model", None, FilePath.cwd())
        stage.put(("model",), folders[earlier[-1]], origin)
    return []


def _absolute(tree: Tree, path: Path, *below: str) -> str | None:
    """Return the path given at `path` as an absolute one, or None where no text stands there."""
    value = tree.get(path)
    if not isinstance(value, str) or not value:
        return None
    return str((tree.origins[path].folder / FilePath(value).expanduser()).joinpath(*below).resolve())


def _absolute_paths(stage: Tree) -> None:
    """Make every path of a stage absolute, relative ones against the folder of where they were written."""
    places: list[Path] = [("model",), ("out",), ("data", "images"), ("data", "index"), ("run", "deepspeed", "config")]
    if str(stage.get(("data", "template"))).endswith((".yaml", ".yml")):
        places.append(("data", "template"))
    for split in ("train", "validation"):
        given = stage.get(("data", split))
        at: Path = ("data", split)
        if isinstance(given, str):
            places.append(at)
        for here in [at, *((*at, i) for i in range(len(given)))] if isinstance(given, list) else [at]:
            places += [here, (*here, "path"), (*here, "images")]
            if str(stage.get((*here, "template"))).endswith((".yaml", ".yml")):
                places.append((*here, "template"))
    followed = stage.get(("train", "evaluate"))
    for i, one in enumerate(followed if isinstance(followed, list) else ()):
        places.append(("train", "evaluate", i, "data"))
        if isinstance(one, dict) and str(one.get("task")).endswith((".yaml", ".yml")):
            places.append(("train", "evaluate", i, "task"))
    for path in dict.fromkeys(places):
        if (resolved := _absolute(stage, path)) is not None:
            stage.put(path, resolved, stage.origins[path])


def _place(stage: Tree, path: Path, source: str) -> tuple[str, str]:
    """Source and dotted key for an error at `path`: as written, or where the missing key belongs."""
    for n in range(len(path), 0, -1):
        origin = stage.origins.get(path[:n])
        if origin is not None:
            return origin.source, ".".join(map(str, (origin.key, *path[n:])))
    return source, ".".join(map(str, path))


def _missing(stage: Stage, source: str, several: bool) -> list[Problem]:
    prefix = f"stages.{stage.name}." if several else ""
    needed = {
        "model": (stage.model, "the folder that `lapilli build` made, or an earlier run's folder"),
        "out": (stage.out, "the run folder to write"),
        "data.train": (stage.data.train, "the data to learn from, a LLaVA JSON or JSONL file"),
    }
    return [
        Problem(source, prefix + key, f"is missing: {what} (in the recipe, or {key}=... on the command line)")
        for key, (value, what) in needed.items()
        if not value
    ]
