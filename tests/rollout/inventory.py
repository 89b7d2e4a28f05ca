"""What Ansible is given: the inventory of the booted hosts, and its own configuration."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rollout.hosts import Hosts
from rollout.image import USER

CLUSTER = "rollout"


@dataclass(frozen=True)
class Workspace:
    """Where a run's files lie on the runner."""

    source: Path
    directory: Path
    ansible: str
    """The command ``ansible-playbook``."""

    @property
    def wheelhouse(self) -> Path:
        return self.directory / "wheelhouse"

    @property
    def package(self) -> Path:
        """The first version, as the runner uses it itself: the source may be edited meanwhile."""
        return self.directory / "package"

    @property
    def inventory(self) -> Path:
        return self.directory / "inventory.json"

    @property
    def configuration(self) -> Path:
        return self.directory / "ansible.cfg"

    @property
    def secrets(self) -> Path:
        """The certification authority, and the runner's own keys and certificate."""
        return self.directory / "secrets"

    @property
    def logs(self) -> Path:
        return self.directory / "logs"

    @property
    def collection(self) -> Path:
        """Where Ansible finds the collection."""
        return self.directory / "collections/ansible_collections/laxity/laxity"


def write_workspace(workspace: Workspace, hosts: Hosts, version: str = "") -> None:
    """The inventory, Ansible's configuration, and the collection where Ansible looks for it."""
    workspace.inventory.write_text(json.dumps(_inventory(workspace, hosts, version), indent=2))
    workspace.configuration.write_text(_CONFIGURATION.format(directory=workspace.directory))
    workspace.collection.parent.mkdir(parents=True, exist_ok=True)
    if not workspace.collection.is_symlink():
        workspace.collection.symlink_to(workspace.source / "ansible")


def _inventory(workspace: Workspace, hosts: Hosts, version: str) -> dict[str, Any]:
    def group(*names: str) -> dict[str, Any]:
        return {"hosts": {name: {} for name in names}}

    control = [name for name in hosts.hosts if name.startswith("control")]
    gpus = [name for name in hosts.hosts if name.startswith("gpu")]
    return {
        "all": {
            "hosts": {name: {"ansible_host": host.address} for name, host in hosts.hosts.items()},
            "vars": {
                "ansible_user": USER,
                "ansible_become": True,
                "ansible_python_interpreter": "/usr/bin/python3",
                "ansible_ssh_private_key_file": str(hosts.key),
                "ansible_ssh_common_args": " ".join(hosts.ssh_options[2:]),
                "laxity_version": version,
                "laxity_wheelhouse": str(workspace.wheelhouse),
                "laxity_pki": str(workspace.secrets),
                "laxity_cluster": CLUSTER,
                "laxity_devices": "emulated:6",
            },
            "children": {
                "laxity": {
                    "children": {
                        "etcd": group(*control),
                        "coordinator": group(*control[:2]),
                        "broker": group(*control[:2]),
                        "gpu_node": group(*gpus),
                        "monitoring": group(control[2]),
                    }
                }
            },
        }
    }


def store_url(workspace: Workspace, hosts: Hosts) -> str:
    """The cluster's store as the runner reaches it, with its own certificate."""
    members = ",".join(f"{host.address}:2379" for host in hosts.hosts.values() if host.name.startswith("control"))
    files = (("ca", "ca.pem"), ("cert", "operator.pem"), ("key", "operator.key"))
    return f"etcd://{members}?" + "&".join(f"{what}={workspace.secrets / file}" for what, file in files)


_CONFIGURATION = """\
[defaults]
inventory = {directory}/inventory.json
collections_path = {directory}/collections
local_tmp = {directory}/tmp
fact_caching = jsonfile
fact_caching_connection = {directory}/facts
gathering = smart
forks = 8
retry_files_enabled = false
nocows = true
[ssh_connection]
pipelining = true
control_path_dir = {directory}/cp
ssh_args = -o ControlMaster=auto -o ControlPersist=120s -o PreferredAuthentications=publickey
"""
