"""Profiles written into pipeline files."""

from __future__ import annotations

import msgspec
import pytest

from pipelines.edit import CannotEdit, profile_block, with_profiles
from pipelines.load import find_spec, load_spec, parse_spec, read_text, shipped_pipelines
from pipelines.problems import SpecError
from pipelines.spec import Profile

CPU = Profile(latency_ms={1: 5.25, 2: 8.0}, load_ms=3.5, memory_mb=100.0)
PROFILE = msgspec.structs.replace(CPU, by_type={"cpu": CPU})
FILE = """# at the top
name: mine
slo: 1s  # of all
stages:
  # the first
  first:
    executor: python
    model: json:loads  # how

  # the second
  second: {executor: python, model: 'json:loads', inputs: [first],}  # in one line
  third:
    profile:  # by hand
      # on a T4
      alpha_ms: 1
      beta_ms: 2  # 'fixed'
    # what runs
    executor: emulated
    inputs: [second]
    max_batch: 8
output: third
"""


def edit(text: str, **profiles: Profile) -> str:
    return with_profiles(text, profiles, file="mine.yaml", root="")


@pytest.mark.parametrize("name", shipped_pipelines())
def test_shipped_pipelines_get_profiles_and_lose_nothing_else(name: str) -> None:
    file = find_spec(name)
    text = read_text(file)
    stages = load_spec(name).stages
    edited = with_profiles(text, dict.fromkeys(stages, PROFILE), file=str(file), root=str(file.parent))
    assert all(stage.profile == PROFILE for stage in parse_spec(edited, file="", root="").stages.values())
    kept = [line for line in text.splitlines() if "profile:" not in line]
    there = iter(edited.splitlines())
    assert all(line in there for line in kept)  # in this order


def test_comments_stay() -> None:
    edited = edit(FILE, first=PROFILE, second=PROFILE, third=PROFILE)
    comments = [line.partition("#")[2].strip() for line in FILE.splitlines() if "#" in line]
    assert len(comments) == 10
    assert all(f"# {comment}" in edited for comment in comments)
    stages = parse_spec(edited, file="", root="").stages
    assert all(stage.profile == PROFILE for stage in stages.values())


def test_a_profile_takes_the_place_of_another_one() -> None:
    once = edit(FILE, first=CPU, second=CPU, third=CPU)
    assert edit(edit(FILE, first=PROFILE, second=PROFILE, third=PROFILE), first=CPU, second=CPU, third=CPU) == once
    assert edit(once, first=CPU) == once


def test_other_stages_stay_as_they_are() -> None:
    edited = edit(FILE, first=CPU)
    assert edited.replace("    model: json:loads  # how\n    " + profile_block(CPU).replace("\n", "\n    "), "") == (
        FILE.replace("    model: json:loads  # how", "")
    )


def test_a_file_without_an_end_of_line() -> None:
    text = "name: a\nslo: 1s\noutput: b\nstages:\n  b:\n    executor: python\n    model: json:loads"
    assert parse_spec(edit(text, b=CPU), file="", root="").stages["b"].profile == CPU
    assert parse_spec(edit(text.replace("\n", "\r\n"), b=CPU), file="", root="").stages["b"].profile == CPU


def test_aliases_are_not_edited() -> None:
    text = FILE.replace("model: json:loads  # how", "model: json:loads\n    profile: &p {alpha_ms: 1, beta_ms: 1}")
    shared = text.replace("  third:\n", "  third:\n    executor: emulated\n    profile: *p\n    inputs: [second]\n")
    shared = shared[: shared.index("    profile:  # by hand")] + "output: third\n"
    with pytest.raises(CannotEdit, match="by hand"):
        edit(shared, first=CPU)


def test_a_profile_that_the_slo_does_not_allow_is_refused() -> None:
    with pytest.raises(SpecError, match="no request can meet 1s"):
        edit(FILE, first=Profile(latency_ms={1: 2000.0}))
