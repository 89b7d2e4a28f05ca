"""The steps of the test; each asserts what it shows."""

from __future__ import annotations

from collections.abc import Sequence

from rollout.hosts import Hosts
from rollout.inventory import Workspace

STEPS = ("site",)


class Rollout:
    def __init__(self, hosts: Hosts, workspace: Workspace) -> None:
        self.hosts = hosts
        self.workspace = workspace

    def take(self, steps: Sequence[str]) -> None:
        raise NotImplementedError
