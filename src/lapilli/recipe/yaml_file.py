"""YAML as recipes use it: safe, with a line number per key, and no surprises.

PyYAML follows YAML 1.1, where `1e-3` is a string, `no` is false and a repeated key silently wins; each of these has
trained models with values nobody asked for. This reader takes numbers and booleans as YAML 1.2 does and refuses
repeated keys.
"""

import re
from dataclasses import dataclass, field

import yaml

from lapilli.base.errors import RecipeError

Path = tuple[str | int, ...]


class _Loader(yaml.SafeLoader):
    """Scalars of YAML 1.2's core schema; everything else is a string."""


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+(?:_[0-9]+)*|0x[0-9a-fA-F]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:_[0-9]+)*(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
    ("merge", r"<<", ["<"]),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first)


def _decimal(loader: _Loader, node: yaml.ScalarNode) -> int:
    text = str(loader.construct_scalar(node)).replace("_", "")
    return int(text, 16) if text.startswith("0x") else int(text)  # a leading 0 is no octal, as in YAML 1.2


_Loader.add_constructor("tag:yaml.org,2002:int", _decimal)


@dataclass
class Document:
    """A parsed file: plain values, and the line (from 1) of every key and list entry by its path."""

    value: object
    lines: dict[Path, int] = field(default_factory=dict)


def parse(text: str, name: str) -> Document:
    """Parse one YAML document; `name` is what error messages call it.

    Raises RecipeError for text that is not YAML, for a repeated key and for a key that is not a string.
    """
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        reader = _Reader(loader, name)
        value = None if node is None else reader.plain(node, ())
    except yaml.YAMLError as error:
        raise RecipeError(f"{name}: not valid YAML: {_one_line(error)}") from error
    finally:
        loader.dispose()
    return Document(value, reader.lines)


def _one_line(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error).splitlines()[0]
    return f"line {mark.line + 1}: {problem}" if mark else str(problem)


@dataclass
class _Reader:
    """Turns nodes into plain values and notes the line of each key."""

    loader: _Loader
    name: str
    lines: dict[Path, int] = field(default_factory=dict)
    above: list[yaml.Node] = field(default_factory=list)

    def plain(self, node: yaml.Node, path: Path) -> object:
        if any(node is other for other in self.above):
            raise RecipeError(f"{self.name}: line {node.start_mark.line + 1}: an alias that contains itself")
        self.above.append(node)
        value = self._plain(node, path)
        self.above.pop()
        return value

    def _plain(self, node: yaml.Node, path: Path) -> object:
        if isinstance(node, yaml.MappingNode):
            _refuse_repeated_keys(node, self.name)
            self.loader.flatten_mapping(node)  # merges `<<: *anchor`; the mapping's own keys come after and win
            result: dict[str, object] = {}
            for key_node, value_node in node.value:
                self.lines[(*path, key_node.value)] = key_node.start_mark.line + 1
                result[key_node.value] = self.plain(value_node, (*path, key_node.value))
            return result
        if isinstance(node, yaml.SequenceNode):
            for i, child in enumerate(node.value):
                self.lines[(*path, i)] = child.start_mark.line + 1
            return [self.plain(child, (*path, i)) for i, child in enumerate(node.value)]
        return self.loader.construct_object(node)


def _refuse_repeated_keys(node: yaml.MappingNode, name: str) -> None:
    seen: dict[str, int] = {}
    for key_node, _ in node.value:
        line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode):
            raise RecipeError(f"{name}: line {line}: a key must be plain text")
        if key_node.value in seen:
            raise RecipeError(
                f'{name}: line {line}: key "{key_node.value}" is given twice (first on line {seen[key_node.value]}); '
                "remove one"
            )
        seen[key_node.value] = line
