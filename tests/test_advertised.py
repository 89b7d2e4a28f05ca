"""Which addresses a shard tells others."""

from __future__ import annotations

import socket

import pytest

from broker.process import advertised

HERE = socket.getfqdn()


@pytest.mark.parametrize(
    ("address", "host", "told"),
    [
        ("tcp://10.0.0.7:7100", "", "tcp://10.0.0.7:7100"),
        ("tcp://10.0.0.7:7100", "gpu-7", "tcp://gpu-7:7100"),
        ("tcp://0.0.0.0:7100", "gpu-7", "tcp://gpu-7:7100"),
        ("tcp://0.0.0.0:7100", "", f"tcp://{HERE}:7100"),
        ("tcp://[::]:7100", "", f"tcp://{HERE}:7100"),
        ("tcp://[::]:7100", "fd00::7", "tcp://[fd00::7]:7100"),
        ("ipc:///run/laxity/s0", "gpu-7", "ipc:///run/laxity/s0"),
    ],
)
def test_others_are_told_what_they_can_reach(address, host, told):
    assert advertised(address, host) == told
