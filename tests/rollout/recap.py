"""What Ansible says at the end of a playbook."""

from __future__ import annotations

import re
from dataclasses import dataclass

_LINE = re.compile(r"^(\S+)\s+: ((?:\w+=\d+\s*)+)$", re.MULTILINE)
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


@dataclass(frozen=True)
class Recap:
    """Tasks by how they ended, for each host."""

    hosts: dict[str, dict[str, int]]

    def total(self, ending: str) -> int:
        """The tasks of all hosts that ended so: ``ok``, ``changed``, ``unreachable``, ``failed``, …"""
        return sum(counts.get(ending, 0) for counts in self.hosts.values())


def read_recap(output: str) -> Recap:
    """The recap in a playbook's output; without hosts where there is none."""
    _, _, text = _COLOURS.sub("", output).rpartition("PLAY RECAP")
    found = {}
    for name, counts in _LINE.findall(text):
        found[name] = {ending: int(count) for ending, count in (pair.split("=") for pair in counts.split())}
    return Recap(found)
