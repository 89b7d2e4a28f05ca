"""Which addresses processes tell others, and which they take for HTTP."""

from __future__ import annotations

import socket

import pytest

from cluster.addresses import advertised, split_address

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
        ("http://127.0.0.1:9100", "", "http://127.0.0.1:9100"),
        ("http://*:9100", "", f"http://{HERE}:9100"),
        ("http://0.0.0.0:9100", "fd00::7", "http://[fd00::7]:9100"),
    ],
)
def test_others_are_told_what_they_can_reach(address, host, told):
    assert advertised(address, host) == told


@pytest.mark.parametrize(
    ("address", "parts"),
    [
        ("127.0.0.1:9100", ("127.0.0.1", 9100)),
        ("gpu-7:*", ("gpu-7", 0)),
        ("*:0", ("*", 0)),
        ("[::1]:9100", ("[::1]", 9100)),
    ],
)
def test_an_address_for_http_has_a_host_and_a_port(address, parts):
    assert split_address(address) == parts


@pytest.mark.parametrize("address", ["9100", "host", "host:", ":9100", "h:65536", "http://h:1", "::1:80", "a b:1"])
def test_what_is_no_address_is_refused_with_an_example(address):
    with pytest.raises(ValueError, match="write HOST:PORT"):
        split_address(address)
