"""Writes profiles into the text of a pipeline file, and leaves everything else in it as it is, comments too."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping

import msgspec
import yaml

from pipelines.load import parse_spec
from pipelines.spec import Profile

_ONE_LINE = 1_000_000


class CannotEdit(ValueError):
    """The text cannot be edited; the message says why and what to do."""


def profile_block(profile: Profile) -> str:
    """The field ``profile`` as a stage of a pipeline file has it, several lines without indentation."""
    value = {"profile": msgspec.to_builtins(profile)}
    return yaml.safe_dump(value, default_flow_style=None, sort_keys=False, width=_ONE_LINE).rstrip()


def with_profiles(text: str, profiles: Mapping[str, Profile], *, file: str, root: str) -> str:
    """The text with each of these stages' profile in place of the one that it has, if any.

    ``text`` is a valid pipeline file; ``file`` and ``root`` are as for :func:`pipelines.parse_spec`. Raises
    :class:`CannotEdit` where the text uses aliases, and :class:`~pipelines.problems.SpecError` where the spec is not
    valid with these profiles.
    """
    spec = parse_spec(text, file=file, root=root)
    if any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text)):
        raise CannotEdit(f"{file} uses aliases, which may stand for several stages: write the profiles into it by hand")
    document = yaml.compose(text, Loader=yaml.SafeLoader)
    assert document is not None, "a valid spec is a mapping"
    stages = _entries(_entries(document)["stages"][1])
    edited = text
    # From the end, so that the places of the others stay as they are.
    for stage in sorted(profiles, key=lambda name: stages[name][1].start_mark.index, reverse=True):
        edited = _with_profile(edited, stages[stage][1], profiles[stage])
    meant = {
        name: msgspec.structs.replace(stage, profile=profiles.get(name, stage.profile))
        for name, stage in spec.stages.items()
    }
    if parse_spec(edited, file=file, root=root).stages != meant:
        raise CannotEdit(f"{file} is written in a way that this cannot edit: write the profiles into it by hand")
    return edited


def _with_profile(text: str, stage: yaml.Node, profile: Profile) -> str:
    entries = _entries(stage)
    if "profile" in entries:
        key, value = entries["profile"]
        begin, end = key.start_mark.index, _end(value, text)
        column = key.start_mark.column
        comments = re.findall(r"(?:^|\s)(#.*)", text[begin:end])
    else:
        begin = end = _end(stage, text)
        column = stage.start_mark.column
        comments = []
    if isinstance(stage, yaml.MappingNode) and stage.flow_style:
        if begin == end:  # behind the last field, inside the bracket
            begin = end = max(_end(value, text) for _, value in entries.values())
        block = yaml.safe_dump(
            msgspec.to_builtins(profile), default_flow_style=True, sort_keys=False, width=_ONE_LINE
        ).strip()
        return f"{text[:begin]}{', ' if begin == end else ''}profile: {block}{text[end:]}"
    indented = textwrap.indent("\n".join([*comments, profile_block(profile)]), " " * column)
    if begin < end:
        return text[:begin] + indented.lstrip(" ") + text[end:]
    line_end = text.find("\n", end)  # behind a comment on the last field's line
    line_end = len(text) if line_end < 0 else line_end
    return f"{text[:line_end].rstrip()}\n{indented}{text[line_end:]}"


def _entries(mapping: yaml.Node) -> dict[str, tuple[yaml.Node, yaml.Node]]:
    """Key and value nodes by key."""
    return {key.value: (key, value) for key, value in mapping.value}


def _end(node: yaml.Node, text: str) -> int:
    """The index behind the last character of a node. (A block's own mark is where the next token begins, behind all
    comments between the two.)"""
    if isinstance(node, yaml.MappingNode) and not node.flow_style:
        return _end(node.value[-1][1], text)
    if isinstance(node, yaml.SequenceNode) and not node.flow_style:
        return _end(node.value[-1], text)
    return len(text[: node.end_mark.index].rstrip())
