"""The examples of docs/protocol.md are what this implementation sends and understands."""

from __future__ import annotations

import json
import re
from pathlib import Path

import msgpack
import msgspec
import pytest

from laxity import protocol
from laxity.node import PayloadError
from laxity.payload import Unpacker, decode, pack

DOCUMENT = Path(__file__).parent.parent / "docs" / "protocol.md"
DECODERS = {
    "service": protocol.decode_from_client,
    "shard": protocol.decode_to_client,
    "agent": protocol.decode_from_agent,
    "shard-to-agent": protocol.decode_to_agent,
}


def examples():
    """(sender, header as JSON, header's bytes, payload frames) of each example."""
    for block in re.findall(r"```example\n(.*?)```", DOCUMENT.read_text(), re.DOTALL):
        first, *rest = block.splitlines()
        sender, header = first.split(" ", 1)
        pieces = [""]
        for line in rest:
            if line.startswith("frame "):
                pieces.append("")
            else:
                pieces[-1] += line
        raw, *frames = [bytes.fromhex(piece) for piece in pieces]
        yield pytest.param(sender, json.loads(header), raw, frames, id=f"{sender}-{json.loads(header)[0]}")


def nodes_of(message):
    if isinstance(message, protocol.Submit):
        return [request.payload for request in message.requests]
    if isinstance(message, protocol.Result):
        return [answer.payload for answer in message.answers]
    if isinstance(message, protocol.Tapped):
        return [request.payload for request in message.requests]
    if isinstance(message, protocol.Grant):
        return [node for task in message.tasks for node in task]
    return message.results if isinstance(message, protocol.Done) else []


@pytest.mark.parametrize(("sender", "header", "raw", "frames"), list(examples()))
def test_an_example_is_what_is_sent(sender, header, raw, frames):
    message = DECODERS[sender](raw)
    assert msgpack.unpackb(raw) == header
    assert protocol.encode(message) == raw
    if isinstance(message, (protocol.Chunk, protocol.Store)):
        assert len(frames) == 1  # as it is, not laid out as a payload
        return
    unpacker = Unpacker(frames)
    payloads = [unpacker.take(node) for node in nodes_of(message)]
    unpacker.finish()
    assert [bytes(frame) for frame in pack(payloads)] == frames


def test_every_kind_has_an_example_and_a_row():
    tags = {
        kind.__struct_config__.tag: name.upper()
        for name, kind in vars(protocol).items()
        if isinstance(kind, type) and issubclass(kind, protocol.Message) and kind is not protocol.Message
    }
    assert {case.values[1][0] for case in examples()} == set(tags)
    text = DOCUMENT.read_text()
    for tag, name in tags.items():
        assert f"| {tag} | {name} |" in text
        assert f"### {name} ({tag})" in text


def test_every_field_has_a_row():
    text = DOCUMENT.read_text()
    structs = [
        kind for kind in vars(protocol).values() if isinstance(kind, type) and issubclass(kind, protocol.Message)
    ]
    for kind in [*structs, protocol.Request, protocol.Answer]:
        rows = "".join(f"| {field.name} |.*\n" for field in msgspec.structs.fields(kind))
        assert re.search(re.sub(r"\|", r"\\|", rows), text), kind


def test_the_arrays_of_the_examples():
    raw, frames = next(case.values[2:] for case in examples() if case.values[1][0] == 2)
    submit = protocol.decode_from_client(raw)
    unpacker = Unpacker(frames)
    first, second = [decode(unpacker.take(request.payload)) for request in submit.requests]
    assert first == b"hello"
    assert second["image"].tolist() == [[1.0], [-2.0]]


def test_a_part_never_crosses_frames():
    raw, frames = next(case.values[2:] for case in examples() if case.values[1][0] == 2)
    nodes = [request.payload for request in protocol.decode_from_client(raw).requests]
    joined = b"".join(frames)
    unpacker = Unpacker([joined[:5], joined[5:]])
    assert decode(unpacker.take(nodes[0])) == b"hello"
    assert decode(unpacker.take(nodes[1]))["size"] == 3
    with pytest.raises(PayloadError, match="crosses"):
        Unpacker([joined[:4], joined[4:]]).take(nodes[0])


def test_the_limits_are_those_of_the_code():
    text = DOCUMENT.read_text()
    assert f"{protocol.MAX_HEADER:,} bytes" in text
    assert f"| {protocol.MAX_SHARED} |" in text
    assert f"| {protocol.MAX_CHUNK:,} |" in text
    assert f"| {protocol.MAX_NAME} characters |" in text
    assert f"{protocol.TAP_WINDOW:,} bytes of TAPPED" in text
