"""YAML as a configuration means it: no key twice, `1e-3` is a number, `no` is a word.

And plain values only, as many as a person writes: a tag names no class, an alias no alias of a
billion others.
"""

import re
import reprlib
from pathlib import Path
from typing import Any

import yaml

__all__ = ["dump", "load", "load_file", "shorten"]

LONGEST_FILE = 1 << 20
"""Bytes."""

DEEPEST = 50
"""Levels of lists and mappings."""

MOST_VALUES = 100_000
"""Values, each counted as often as an alias repeats it."""

LARGEST_INT = 1 << 64
"""Of which nothing that is counted here has as many."""

_TAGS = ("null", "bool", "int", "float", "str", "seq", "map", "merge")

# The scalars of YAML 1.2. PyYAML's own are those of 1.1, where 1e-3 is text, `off` is false,
# 012 is ten, 1:30 is ninety, and 2024-01-01 is a date.
_SCALARS = {
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (r"[-+]?(?:0|[1-9][0-9_]*)|0x[0-9a-fA-F]+", list("-+0123456789")),
    "float": (
        r"[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
    "merge": ("<<", ["<"]),
}


class _Loader(yaml.SafeLoader):
    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._levels = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self._levels > DEEPEST:
            line = self.peek_event().start_mark.line + 1  # type: ignore[no-untyped-call]
            raise ValueError(f"line {line}: lists and mappings go more than {DEEPEST} levels deep")
        self._levels += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self._levels -= 1

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        if node is not None and _count(node, {}) > MOST_VALUES:
            raise ValueError(f"its aliases (*name) repeat values to more than {MOST_VALUES:,}")
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        if not isinstance(node, yaml.MappingNode):
            raise ValueError(f"line {node.start_mark.line + 1}: {node.tag} is no mapping")
        lines: dict[str, int] = {}
        for key_node, _ in node.value:
            if isinstance(key_node, yaml.ScalarNode):
                key, line = key_node.value, key_node.start_mark.line + 1
                if key in lines:
                    raise ValueError(
                        f"line {line}: the key {key!r} is there twice, first on line {lines[key]}"
                    )
                lines[key] = line
        return super().construct_mapping(node, deep)

    def construct_number(self, node: yaml.ScalarNode) -> int | float:
        line = f"line {node.start_mark.line + 1}: {shorten(node.value)}"
        make = self.construct_yaml_int if node.tag.endswith("int") else self.construct_yaml_float
        try:
            value: int | float = make(node)
        except (ValueError, LookupError):
            if not node.value.strip("+-").isdigit():
                raise ValueError(f"{line} is no number") from None
            value = LARGEST_INT  # more digits than Python reads
        if isinstance(value, int) and abs(value) >= LARGEST_INT:
            raise ValueError(f"{line} is too large for a whole number")
        return value

    def refuse(self, node: yaml.Node) -> None:
        tag = node.tag.replace("tag:yaml.org,2002:", "!!")
        raise ValueError(
            f"line {node.start_mark.line + 1}: the tag {tag}: plain values are needed, and a class "
            "is named by class_path"
        )


def _count(node: yaml.Node, known: dict[int, int]) -> int:
    """The values that a node comes to, aliases written out.

    Raises:
        ValueError: it holds itself.
    """
    if isinstance(node, yaml.ScalarNode):
        return 1
    if id(node) not in known:
        known[id(node)] = 0  # not known yet: whoever asks now is inside of it
        nodes = node.value
        if isinstance(node, yaml.MappingNode):
            nodes = [each for pair in nodes for each in pair]
        known[id(node)] = 1 + sum(_count(each, known) for each in nodes)
    if not known[id(node)]:
        raise ValueError(f"line {node.start_mark.line + 1}: this holds an alias (*name) of itself")
    return known[id(node)]


class _Dumper(yaml.SafeDumper):
    """Quotes what either version would not read back as the text it is."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Loader.yaml_constructors = {
    tag: make
    for tag, make in _Loader.yaml_constructors.items()
    if tag and tag.rpartition(":")[2] in _TAGS
}
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_number)
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.construct_number)
_Loader.add_constructor(None, _Loader.refuse)
_Loader.yaml_implicit_resolvers = {}
for _name, (_pattern, _first) in _SCALARS.items():
    for _class in (_Loader, _Dumper):
        _tag, _regexp = f"tag:yaml.org,2002:{_name}", re.compile(f"(?:{_pattern})$")
        _class.add_implicit_resolver(_tag, _regexp, _first)


def load(text: str) -> Any:
    """Read one YAML document. Raises ValueError, in one line, for what is no YAML."""
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise ValueError(" ".join(f"{line}{error.problem or error.context}".split())) from None
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None
    except (LookupError, TypeError, AttributeError, OverflowError) as error:
        # What PyYAML's constructors say of `!!bool 7` and the like.
        raise ValueError(f"a value is not what its tag says ({error!r})") from None


def load_file(path: Path) -> Any:
    """Read the YAML file `path`. Raises ValueError, naming the file and the line."""
    try:
        with path.open("rb") as file:
            data = file.read(LONGEST_FILE + 1)
        if len(data) > LONGEST_FILE:
            raise ValueError(f"more than {LONGEST_FILE:,} bytes are no configuration")
        return load(data.decode())
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: byte {error.start} is no UTF-8: save the file as UTF-8 text"
        ) from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def shorten(value: Any) -> str:
    """A value for a message, which it does not fill."""
    return _short.repr(value)


_short = reprlib.Repr()
_short.maxstring = _short.maxother = _short.maxlong = 80


def dump(value: Any) -> str:
    """`value` as YAML that `load` reads back as it was."""
    return yaml.dump(
        value, Dumper=_Dumper, sort_keys=False, default_flow_style=None, allow_unicode=True
    )
