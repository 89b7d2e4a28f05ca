"""Reads the documentation as somebody does who tries everything: files to be written, commands to be run, in order."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

COMMAND = re.compile(
    r"(\$ )?((?:[A-Z_]+=\S+ )*(?:laxity|make|pip|python3?|export|promtool|etcdctl|curl|openssl|\.) \S.*)"
)
NAMED = re.compile(r"`([\w./-]+\.(?:py|ya?ml))`")
INLINE = re.compile(r"(?<!`)`(laxity (?:[a-z][\w-]*)[^`]*)`(?!`)")


@dataclass(frozen=True)
class Command:
    """A line in a block, to be run as it stands."""

    line: int
    text: str


@dataclass(frozen=True)
class File:
    """A fenced block that the text before it names, to be written under that name."""

    line: int
    name: str
    text: str


@dataclass(frozen=True)
class Program:
    """A fenced block of Python that uses the SDK."""

    line: int
    text: str


@dataclass(frozen=True)
class Mention:
    """A command inside a sentence: it must be one, with options that exist."""

    line: int
    text: str


def read(page: Path) -> Iterator[Command | File | Program | Mention]:
    """What a page tells people to do, from top to bottom."""
    lines = page.read_text().splitlines()
    paragraph = ""
    number = 0
    while number < len(lines):
        line = lines[number]
        number += 1
        fence = re.fullmatch(r"\s*```(\w*)", line)
        if fence is not None:
            begins = number
            while not re.fullmatch(r"\s*```", lines[number]):
                number += 1
            yield from _block(begins, fence[1], lines[begins:number], paragraph)
            number += 1
            continue
        if line.startswith("    ") and (lines[number - 2] == "" or lines[number - 2].startswith("    ")):
            begins = number
            text = line.strip()
            while text.endswith("\\"):
                text = f"{text[:-1].rstrip()} {lines[number].strip()}"
                number += 1
            command = COMMAND.fullmatch(text)
            if command is not None:
                yield Command(begins, command[2])
            continue
        if line:
            # A command may go on in the next line of its paragraph.
            whole = f"{line} {lines[number].strip()}" if line.count("`") % 2 and number < len(lines) else line
            for found in INLINE.findall(whole):
                yield Mention(number, found)
        elif number < len(lines) and lines[number].startswith("```"):
            # The text right before a block may name it.
            paragraph = _before(lines, number)


def _before(lines: list[str], number: int) -> str:
    """The last paragraph that ends before this line."""
    end = number - 1
    while end > 0 and lines[end - 1]:
        end -= 1
    return " ".join(lines[end:number])


def _block(line: int, language: str, block: list[str], paragraph: str) -> Iterator[Command | File | Program]:
    text = "\n".join(block) + "\n"
    if language in ("", "sh", "bash", "console"):
        for offset, one in enumerate(block):
            command = COMMAND.fullmatch(one)
            if command is not None:
                yield Command(line + offset + 1, command[2])
    elif language == "python" and re.match(r"(import|from) (laxity|tritonclient)", text):
        yield Program(line, text)
    elif language in ("python", "yaml"):
        comment = re.match(r"# (\S+\.\w+)\n", text)
        named = [comment[1]] if comment else NAMED.findall(paragraph)
        if named:
            yield File(line, named[-1], text)


def words(command: str) -> list[str]:
    """A command's words, without its comment."""
    return shlex.split(command, comments=True)
