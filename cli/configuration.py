"""The file of ``--config``: the options of the services, by section, checked as a whole before any of it is used."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import click

from pipelines.problems import Problem, SpecError
from pipelines.yamlfile import Document, read_yaml

LOGS = ("log_format", "log_level")
"""Keys that a section may have as well, which counts for more then."""
COMMON = ("store", "cluster", *LOGS)
"""Keys at the top of the file, for all sections."""


class ConfigurationError(Exception):
    """The file cannot be used; the text has a line for everything that is wrong with it."""


def read_configuration(file: Path, services: Mapping[str, click.Command]) -> dict[str, dict[str, str | bool]]:
    """The values that a YAML file has for each service's options, by section and option name: those of the section,
    and the common ones beside them. Keys are the options' names with '_' for '-'.

    Raises :class:`ConfigurationError` for a file that cannot be read, unknown keys, and values that an option does not
    take.
    """
    try:
        document = read_yaml(file.read_text(), str(file))
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no UTF-8 text"
        raise ConfigurationError(f"{file} cannot be read: {why}") from None
    except SpecError as error:
        raise ConfigurationError(str(error)) from None
    reader = _Reader(document, services)
    found = reader.read()
    if document.problems:
        raise ConfigurationError("\n".join(str(document.located(problem)) for problem in document.problems))
    return found


class _Reader:
    """Goes through one file; what is wrong is added to the document's problems."""

    def __init__(self, document: Document, services: Mapping[str, click.Command]) -> None:
        self._document = document
        self._services = services
        self._options = {section: _options(command) for section, command in services.items()}

    def read(self) -> dict[str, dict[str, str | bool]]:
        top = self._mapping((), self._document.value)
        found: dict[str, dict[str, str | bool]] = {section: {} for section in self._services}
        common: dict[str, str | bool] = {}
        for key, value in top.items():
            if key in COMMON:
                self._take(common, next(iter(self._services)), (key,), value)
            elif key in self._services:
                known = [name for name in self._options[key] if name not in COMMON] + [*LOGS]
                for name, setting in self._mapping((key,), value).items():
                    if name in known:
                        self._take(found[key], key, (key, name), setting)
                    elif name in COMMON:
                        self._wrong((key, name), "this key is for all sections", "write it at the top of the file")
                    else:
                        self._wrong((key, name), "unknown key", _instead(name, known))
            else:
                self._wrong((key,), "unknown key", _instead(key, [*COMMON[:2], *self._services, *LOGS]))
        return {section: {**common, **values} for section, values in found.items()}

    def _mapping(self, path: tuple[str, ...], value: Any) -> dict[Any, Any]:
        if value is None:
            return {}
        if not isinstance(value, dict):
            self._wrong(path, "a mapping is needed here", "write lines such as `key: value`")
            return {}
        return value

    def _take(self, into: dict[str, str | bool], section: str, path: tuple[str, ...], value: Any) -> None:
        """Note a value if its option takes it."""
        command = self._services[section]
        option = self._options[section][path[-1]]
        advice = f"see `laxity {section} run --help`"
        if isinstance(value, dict | list) or value is None:
            self._wrong(path, "a single value is needed here", advice)
        elif isinstance(value, bool) != option.is_flag:
            wanted = "true or false is" if option.is_flag else "a number or a text (in quotes) is"
            self._wrong(path, f"{wanted} needed here, not {str(value).lower()}", advice)
        else:
            given = value if option.is_flag else str(value)
            try:
                option.process_value(click.Context(command), given)
            except click.BadParameter as error:
                self._wrong(path, error.message.rstrip("."), advice)
            else:
                into[path[-1]] = given

    def _wrong(self, path: tuple[Any, ...], message: str, advice: str) -> None:
        self._document.problems.append(Problem(path, message, advice))


def _options(command: click.Command) -> dict[str, click.Option]:
    """What a file may set: every option but the file's own name."""
    return {
        option.name: option
        for option in command.params
        if isinstance(option, click.Option) and option.name is not None and option.name != "config"
    }


def _instead(name: object, known: list[str]) -> str:
    near = get_close_matches(str(name), known, 1)
    return f"did you mean {near[0]!r}?" if near else f"known are: {', '.join(known)}"
