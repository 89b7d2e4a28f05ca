"""Each policy on a real shard and a real agent: what the engine decides can be said on the wire."""

from __future__ import annotations

import msgspec
import pytest

from pipelines.policies import POLICIES


@pytest.mark.parametrize("policy", POLICIES)
def test_requests_are_answered_under_every_policy(cluster, echo, policy):
    cluster.serve(msgspec.structs.replace(echo, policy=policy))
    client = cluster.client()
    futures = [client.submit(echo.name, b"x") for _ in range(20)]
    outcomes = {str(future.reply(60).outcome) for future in futures}
    assert outcomes <= {"ok", "dropped", "expired"}
    cluster.settle()
