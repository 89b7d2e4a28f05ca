"""The system that every host begins with: a bare Debian server, made once and kept in the user's cache."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

from rollout.commands import run
from rollout.leftovers import unmount_below

SUITE = "bookworm"
PACKAGES = (
    # What a bare server has.
    *(
        "systemd",
        "systemd-sysv",
        "libpam-systemd",
        "dbus",
        "udev",
        "kmod",
        "openssh-server",
        "sudo",
        "iproute2",
        "procps",
    ),
    *("ca-certificates", "logrotate", "python3", "python3-venv", "acl", "less"),
    # What the collection would install: the hosts reach no mirror.
    *("etcd-server", "etcd-client", "prometheus"),
)
USER = "admin"
"""Who Ansible comes as: may become root without a password."""
_REVISION = "3"
"""Changed with what is done to the system below."""


def base_image(cache: Path) -> Path:
    """The root directory of the system, made if it is not in ``cache``. Raises Failed."""
    digest = hashlib.sha256("\n".join([SUITE, *PACKAGES, _REVISION]).encode()).hexdigest()[:12]
    image = cache / f"base-{digest}"
    if image.exists():
        return image
    cache.mkdir(parents=True, exist_ok=True)
    for old in cache.glob("base-*"):
        unmount_below(old)  # what debootstrap leaves mounted when it is killed
        shutil.rmtree(old)
    unfinished = cache / f"base-unfinished-{os.getpid()}"
    run(
        ["debootstrap", "--variant=minbase", f"--include={','.join(PACKAGES)}", SUITE, unfinished],
        timeout=900,
        env={"DEBIAN_FRONTEND": "noninteractive"},
    )
    _configure(unfinished)
    unfinished.rename(image)
    return image


def _configure(root: Path) -> None:
    run(["chroot", root, "useradd", "--create-home", "--shell", "/bin/bash", USER])
    (root / "etc/sudoers.d" / USER).write_text(f"{USER} ALL=(ALL) NOPASSWD: ALL\n")
    run(["chroot", root, "systemctl", "enable", "ssh", "systemd-networkd"])
    # They start where they were installed; all hosts have these packages here, but few would.
    run(["chroot", root, "systemctl", "disable", "etcd", "prometheus"])
    (root / "etc/resolv.conf").write_text("")
    (root / "etc/default/locale").write_text("LANG=C.UTF-8\n")
    (root / "var/log/journal").mkdir(exist_ok=True)
    run(["chroot", root, "apt-get", "clean"])
