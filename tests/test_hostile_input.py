"""What reads what others wrote takes it or refuses it with its documented error, whatever it is: the inputs that a
search (``make fuzz``) found once, and some of those that it begins with, changed at random."""

from __future__ import annotations

import random
import resource

import msgpack
import pytest
from fuzz.run import structured
from fuzz.targets import TARGETS

from pipelines.load import find_spec
from pipelines.problems import SpecError, SpecNotFound
from pipelines.yamlfile import read_yaml
from simulation.arrivals import TraceError, parse_source

TRIES = 40


@pytest.mark.parametrize("target", TARGETS.values(), ids=lambda target: target.name)
def test_inputs_that_are_nearly_right(target):
    chance = random.Random(7)
    seeds = target.seeds()
    for seed in seeds:
        target.run(seed)
    for number in range(TRIES):
        raw = seeds[number % len(seeds)]
        for _ in range(chance.randint(1, 3)):
            raw = structured(raw, target.form, target.tokens, chance) or raw[: chance.randint(0, len(raw))]
        target.run(raw)


def packed(*objects):
    return b"".join(msgpack.packb(each) for each in objects)


HEAD = {"laxity_recording": 1}
FOUND = [
    ("recording", packed(HEAD, {"end": "end"})),
    ("recording", packed(HEAD, {"end": []})),
    ("recording", packed(HEAD, {"end": float("nan"), "lost": float("inf")})),
    ("recording", packed(HEAD, {"lost": "many"})),
    ("recording", packed(HEAD, [float("inf"), "ocr", None, 0, None, []])),
    ("recording", packed(HEAD, [0.5, "ocr", None, 0, [0, 2**62], None])),
    ("recording", packed(HEAD) + b"\xdd\x3f\xff\xff\xff"),
    ("spec", b"slo: 1" + b":1" * 400 + b".0"),
    ("spec", b"slo: 1" + b":1" * 100_000),
    ("spec", b"slo: 0x" + b"f" * 100_000),
    ("spec", b'slo: "\\U0011FFFF"'),
    ("spec", b'slo: "\\UFFFFFFFF"'),
    ("spec", b'"\\ud800": "\\udfff"'),
    ("spec", b"%YAML " + b"1" * 5000 + b".1\n---\nx: 1"),
    ("spec", b"slo: !!bool abc"),
    ("spec", b"slo: !!int ''"),
    ("spec", b"slo: !!float ''"),
    ("configuration", b"store: !!int ''\ncluster: 1" + b":1" * 400 + b".0"),
    ("trace_file", b"arrival_s\n1e9\n"),
    ("trace_file", b"arrival_s\n1e19\n"),
    ("text", b"etcd\netcd://a:" + b"9" * 5000),
    ("text", b"source\n:" + b"x" * 5000),
    ("text", b"model\n" + b"9" * 5000 + b"@1/x"),
    ("zap", packed([b"id", b"CURVE", b"xyz"])),
    (
        "key_file",
        b'{"cluster": "", "name": "", "role": "node", "public": "f-BC5d+@ijfPb=wf9]FkqK%kTzKltlbbc+#k?V6O", '
        b'"secret": "+KIARC%N}*x.dR+TIhYoFQqGW/.@Sj<Stj9$+W2R", "servers": []}',
    ),
]
"""(target, input)."""


@pytest.mark.parametrize(("target", "raw"), FOUND, ids=range(len(FOUND)))
def test_inputs_that_were_found(target, raw):
    """Within half a gigabyte of address space more than there is."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as figures:
        there = int(figures.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (there + 512 * 1024**2, hard))
    try:
        TARGETS[target].run(raw)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('x: "\\U0011FFFF"', "not YAML"),
        ("x: 1" + ":1" * 1000, "more than 1000 characters"),
        ("x: !!bool abc", "cannot be read as a number"),
        ('x: "a \\ud800"', r"half a character (a \ud800)"),
    ],
)
def test_what_yaml_files_are_told(text, says):
    try:
        told = "\n".join(str(problem) for problem in read_yaml(text, "x.yaml").problems)
    except SpecError as error:
        told = str(error)
    assert says in told
    told.encode()


def test_a_trace_of_unix_times_says_what_to_do(tmp_path):
    file = tmp_path / "trace.csv"
    file.write_text("arrival_s\n1764000000.5\n1764000001.5\n")
    with pytest.raises(TraceError, match="count them from its begin"):
        parse_source(str(file))


def test_names_that_no_file_can_have():
    with pytest.raises(TraceError, match="no trace file"):
        parse_source("x" * 5000)
    with pytest.raises(SpecNotFound):
        find_spec("x" * 5000)
