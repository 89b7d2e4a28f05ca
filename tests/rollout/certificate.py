"""The runner's own certificate for the store, from the authority that the rollout made on this side."""

from __future__ import annotations

from pathlib import Path

from rollout.commands import run
from rollout.inventory import Workspace


def make_certificate(workspace: Workspace) -> None:
    """Write ``operator.pem`` and ``operator.key`` beside the authority's. Raises Failed."""
    made = workspace.secrets
    key = made / "operator.key"
    run(["openssl", "genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256", "-out", key])
    key.chmod(0o600)
    request = run(["openssl", "req", "-new", "-sha256", "-key", key, "-subj", "/CN=operator"])
    authority: list[str | Path] = [
        "-config",
        made / "openssl.cnf",
        "-extensions",
        "client",
        "-CA",
        made / "ca.pem",
        "-CAkey",
        made / "ca.key",
    ]
    signed = run(["openssl", "req", "-x509", "-in", "/dev/stdin", *authority, "-sha256", "-days", "2"], stdin=request)
    (made / "operator.pem").write_text(signed)
