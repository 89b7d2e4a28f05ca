"""The Ansible collection: lint, syntax, what its roles say of their settings, and the units that they make. Whether it
rolls out is for `make test-rollout` to say, which has hosts."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml

COLLECTION = Path(__file__).parent.parent / "ansible"
ROLES = sorted(path.name for path in (COLLECTION / "roles").iterdir())
BIN = Path(sys.executable).parent

needs_ansible = pytest.mark.skipif(
    not (BIN / "ansible-lint").exists(), reason="needs ansible-lint: pip install 'laxity[rollout]'"
)


def run(command: str, *arguments: str, cwd: Path = COLLECTION) -> str:
    result = subprocess.run(
        [BIN / command, *arguments],
        cwd=cwd,
        env={**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", "NO_COLOR": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert result.returncode == 0, result.stdout
    return result.stdout


def load(path: str) -> Any:
    return yaml.safe_load((COLLECTION / path).read_text())


@needs_ansible
@pytest.mark.timeout(300)  # it starts ansible-playbook, for its syntax check, once for each playbook and role
def test_lint(tmp_path: Path) -> None:
    # A copy: it leaves files behind.
    shutil.copytree(COLLECTION, tmp_path / "ansible", ignore=shutil.ignore_patterns(".ansible"))
    told = run("ansible-lint", "--offline", cwd=tmp_path / "ansible")
    assert re.search("profile 'production' was required, and it passed", told, re.IGNORECASE), told


@needs_ansible
def test_inventories_have_the_hosts_that_they_say() -> None:
    for inventory, hosts in (("cluster", [3, 3, 4, 16, 1]), ("one-host", [1, 1, 1, 1, 1])):
        groups = json.loads(run("ansible-inventory", "-i", f"inventories/{inventory}", "--list"))
        names = ["etcd", "coordinator", "broker", "gpu_node", "monitoring"]
        assert sorted(groups["laxity"]["children"]) == sorted(names)
        assert [len(groups[name]["hosts"]) for name in names] == hosts


@pytest.mark.parametrize("role", ROLES)
def test_every_setting_is_documented_with_its_default(role: str) -> None:
    defaults = load(f"roles/{role}/defaults/main.yml")
    options = load(f"roles/{role}/meta/argument_specs.yml")["argument_specs"]["main"]["options"]
    made = set(defaults) - set(options)
    assert set(options) <= set(defaults)
    assert all("{" in str(defaults[name]) or name == "laxity_as_user" for name in made), made
    for name, option in options.items():
        if "default" in option:
            assert option["default"] == defaults[name], name
        else:
            assert "{{" in defaults[name], f"{name} has a default that its documentation does not tell"


@needs_ansible
@pytest.mark.parametrize("devices", ["cuda", "emulated:4"])
@pytest.mark.parametrize("role", ["coordinator", "broker", "gpu_node"])
def test_units_are_understood_by_systemd(role: str, devices: str, tmp_path: Path) -> None:
    if not shutil.which("systemd-analyze"):
        pytest.skip("needs systemd-analyze")
    program = tmp_path / f"current-{role.removeprefix('gpu_')}/bin/laxity"
    program.parent.mkdir(parents=True)
    shutil.copy("/bin/true", program)
    known = load("roles/settings/defaults/main.yml") | {"laxity_directory": str(tmp_path), "ansible_managed": "Ansible"}
    known |= {"laxity_devices": devices, "laxity_mps": True}
    if role == "gpu_node":
        known |= load("roles/gpu_node/vars/main.yml")
    known |= load(f"roles/{role}/tasks/main.yml")[-1]["vars"]
    template = (COLLECTION / "roles/common/templates/service.j2").read_text()
    unit = tmp_path / f"laxity-{known['laxity_service']}.service"
    unit.write_text(render(template, resolved(known)))
    said = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True)
    about = [line for line in said.stderr.splitlines() if unit.name in line]
    assert said.returncode == 0, said.stderr
    assert not about
    text = unit.read_text()
    assert ("DeviceAllow=char-nvidia* rw" in text) == (role == "gpu_node" and devices == "cuda")
    assert ("PrivateDevices=yes" in text) != ("DeviceAllow=" in text)


def render(template: str, known: dict[str, Any]) -> Any:
    from jinja2 import StrictUndefined
    from jinja2.nativetypes import NativeEnvironment

    options = {"undefined": StrictUndefined, "trim_blocks": True}
    return NativeEnvironment(**options).from_string(template).render(known)


def resolved(known: dict[str, Any]) -> dict[str, Any]:
    """Those of the variables that can be told without hosts, templates resolved as Ansible does."""
    from jinja2 import TemplateError, Undefined

    plain = {name: value for name, value in known.items() if "{" not in str(value)}
    before = -1
    while before != len(plain):
        before = len(plain)
        for name in known.keys() - plain.keys():
            with suppress(TemplateError):
                value = render(str(known[name]).strip(), plain)
                if not isinstance(value, Undefined):
                    plain[name] = value
    return plain
