"""Reads YAML as plain data and remembers on which line each value stood.

Only what a pipeline file needs is accepted: one document of mappings, lists, texts, numbers and booleans.
What would surprise (duplicate keys, keys that YAML reads as a boolean, merge keys, tags) is refused.
"""

from __future__ import annotations

from typing import Any

import yaml
from yaml.constructor import SafeConstructor

from pipelines.problems import Problem, SpecError, SpecPath

MAX_VALUES = 100_000
"""The most values in a file once its aliases are expanded: an alias of aliases can stand for billions."""
MAX_NUMBER = 1000
"""Characters of a number at most: reading one in YAML's base 60 takes time that grows with their square."""
_TAG = "tag:yaml.org,2002:"
_SCALARS = {_TAG + name for name in ("null", "bool", "int", "float", "str")}


class Document:
    """A YAML file: its value, the line (from 1) of each path in it, and what was wrong."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.value: Any = None
        self.lines: dict[SpecPath, int] = {}
        self.problems: list[Problem] = []

    def line(self, path: SpecPath) -> int:
        """The line of the path, or of the nearest thing around it that the file has; 1 for the file itself."""
        while path and path not in self.lines:
            path = path[:-1]
        return self.lines.get(path, 1)

    def located(self, problem: Problem) -> Problem:
        """The problem with file and line."""
        return Problem(
            problem.path, problem.message, problem.advice, self.file, problem.line or self.line(problem.path)
        )


def read_yaml(text: str, file: str) -> Document:
    """Read one YAML document.

    ``problems`` of the result lists what can be told beside others (duplicate keys and the like). Raises
    :class:`SpecError` where no value can be made of the text at all.
    """
    document = Document(file)
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        if root is not None:
            document.value = _Converter(document).convert(root, (), ())
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise _error(
            file, line, f"character U+{ord(text[error.position]):04X} may not stand in YAML", "remove it"
        ) from error
    except yaml.MarkedYAMLError as error:
        raise _syntax_error(error, file, text) from error
    except RecursionError as error:
        raise _error(file, 1, "lists or mappings nest too deeply", "write a flatter file") from error
    except (ValueError, OverflowError) as error:  # escapes of no character, versions of too many digits
        raise _error(file, 1, f"not YAML: {error}", "look for escapes such as \\U0011ffff in quotes") from error
    return document


def _error(file: str, line: int, message: str, advice: str) -> SpecError:
    return SpecError([Problem((), message, advice, file, line)])


def _syntax_error(error: yaml.MarkedYAMLError, file: str, text: str) -> SpecError:
    mark = error.problem_mark or error.context_mark
    line = mark.line + 1 if mark is not None else 1
    problem = error.problem or error.context or "not YAML"
    lines = text.splitlines()
    here = lines[line - 1] if line <= len(lines) else ""
    if "\t" in here[: len(here) - len(here.lstrip())] or "'\\t'" in problem:
        return _error(file, line, "a tab in the indentation", "indent with spaces")
    if "undefined alias" in problem:
        return _error(file, line, problem, "define it with '&name' above, or write the value out")
    if "single document" in (error.context or ""):
        return _error(file, line, "a second document begins here", "write one pipeline a file, without '---'")
    context = f" {error.context}" if error.context and error.problem else ""
    return _error(file, line, f"not YAML: {problem}{context}", "check indentation, quotes and brackets here")


class _Converter:
    """Turns YAML nodes into plain data."""

    def __init__(self, document: Document) -> None:
        self._document = document
        self._values = 0
        self._scalars = SafeConstructor()

    def convert(self, node: yaml.Node, path: SpecPath, within: tuple[int, ...]) -> Any:
        self._values += 1
        line = node.start_mark.line + 1
        if self._values > MAX_VALUES:
            raise _error(
                self._document.file, line, f"aliases make more than {MAX_VALUES} values", "write the values out"
            )
        if id(node) in within:
            raise _error(self._document.file, line, "an alias contains itself", "write the value out")
        within = (*within, id(node))
        if isinstance(node, yaml.MappingNode) and node.tag == _TAG + "map":
            return self._mapping(node, path, within)
        if isinstance(node, yaml.SequenceNode) and node.tag == _TAG + "seq":
            items = []
            for index, item in enumerate(node.value):
                self._document.lines[(*path, index)] = item.start_mark.line + 1
                items.append(self.convert(item, (*path, index), within))
            return items
        return self._scalar(node, path)

    def _mapping(self, node: yaml.MappingNode, path: SpecPath, within: tuple[int, ...]) -> dict[str | int, Any]:
        mapping: dict[str | int, Any] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            key = self._key(key_node, path, line)
            if key is None:
                continue
            if key in mapping:
                first = self._document.lines[(*path, key)]
                self._report((*path, key), f"written twice, first on line {first}", "keep one of the two", line)
                continue
            self._document.lines[(*path, key)] = line
            mapping[key] = self.convert(value_node, (*path, key), within)
        return mapping

    def _key(self, node: yaml.Node, path: SpecPath, line: int) -> str | int | None:
        if node.tag == _TAG + "merge":
            self._report((*path, "<<"), "merge keys are not supported", "write the fields out", line)
            return None
        key = self._scalar(node, path) if isinstance(node, yaml.ScalarNode) else None
        if isinstance(key, bool) or not isinstance(key, str | int):
            shown = _printable(node.value) if isinstance(node, yaml.ScalarNode) else "a list or mapping"
            self._report(path, f"YAML does not read the key {shown} as a text", f'write it in quotes: "{shown}"', line)
            return None
        return key

    def _scalar(self, node: yaml.Node, path: SpecPath) -> Any:
        line = node.start_mark.line + 1
        if node.tag == _TAG + "timestamp":
            return node.value
        if node.tag not in _SCALARS:
            self._report(path, f"the YAML tag {node.tag} is not allowed", "write the plain value", line)
            return None
        if node.tag == _TAG + "str":
            if node.value != _printable(node.value):
                self._report(path, f"half a character ({_printable(node.value)[:40]})", "write the whole one", line)
                return None
        elif len(node.value) > MAX_NUMBER:
            self._report(path, f"a number of more than {MAX_NUMBER} characters", "write it in quotes", line)
            return None
        try:
            return self._scalars.construct_object(node)
        except (ValueError, OverflowError, LookupError):
            self._report(path, f"{node.value[:40]!r} cannot be read as a number", "write it in quotes", line)
            return None

    def _report(self, path: SpecPath, message: str, advice: str, line: int) -> None:
        self._document.problems.append(Problem(path, message, advice, line=line))


def _printable(text: str) -> str:
    """The text with surrogates, which have no UTF-8 form, as their escapes."""
    return text.encode("utf-8", "backslashreplace").decode()
