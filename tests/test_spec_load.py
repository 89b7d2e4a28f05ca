"""Reading pipeline files: what is accepted, and what is said about what is not."""

import textwrap
from pathlib import Path

import pytest

from pipelines import PipelineSpec, Problem, Profile, SpecError, load_spec, parse_spec, shipped_pipelines

GOOD = """
name: video
slo: 400ms
stages:
  detect:
    executor: emulated
    profile: {alpha_ms: 1.5, beta_ms: 4}
  recognize:
    executor: emulated
    profile:
      latency_ms:
        1: 5
        8: 20.5
    inputs: [detect.crops]
    map: yes
    max_items: 20
output:
  boxes: detect.boxes
  lines: recognize
"""


def parse(text: str) -> PipelineSpec:
    return parse_spec(textwrap.dedent(text).removeprefix("\n"), file="video.yaml", root="")


def problems(text: str) -> list[Problem]:
    with pytest.raises(SpecError) as caught:
        parse(text)
    assert str(caught.value) == "\n".join(map(str, caught.value.problems))
    for problem in caught.value.problems:
        assert problem.file == "video.yaml"
        assert problem.line >= 1
        assert problem.advice
    return caught.value.problems


def only(text: str) -> str:
    (problem,) = problems(text)
    return str(problem)


def changed(old: str, new: str) -> str:
    assert GOOD.count(old) == 1
    return GOOD.replace(old, new)


def test_a_good_file() -> None:
    spec = parse(GOOD)
    assert (spec.name, spec.slo, list(spec.stages)) == ("video", 0.4, ["detect", "recognize"])
    assert spec.stages["detect"].profile == Profile(alpha_ms=1.5, beta_ms=4)
    recognize = spec.stages["recognize"]
    assert recognize.profile == Profile(latency_ms={1: 5.0, 8: 20.5})
    assert (recognize.inputs, recognize.map, recognize.max_items, recognize.max_batch) == (
        ["detect.crops"],
        True,
        20,
        32,
    )
    assert spec.outputs() == {"boxes": ("detect", "boxes"), "lines": ("recognize", "")}


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("400ms", 0.4), ("5s", 5.0), ("1.5s", 1.5), ("1m", 60.0), ("2", 2.0), ("0.25", 0.25), ("'3'", 3.0), ("1 s", 1.0)],
)
def test_durations(text: str, seconds: float) -> None:
    assert parse(changed("400ms", text)).slo == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["0", "-1s", "-2", "5 parsecs", ".inf", ".nan", "yes", "[1]", "''", "1e999s", "٣s"])
def test_what_is_no_duration(text: str) -> None:
    message = only(changed("400ms", text))
    assert message.startswith("video.yaml:2: slo: ")
    assert "400ms, 5s, 1m or 24h" in message


def test_aliases_are_expanded() -> None:
    spec = parse(changed("{alpha_ms: 1.5, beta_ms: 4}", "&p {alpha_ms: 1.5, beta_ms: 4}") + "description: &d text\n")
    assert spec.stages["detect"].profile == Profile(alpha_ms=1.5, beta_ms=4)
    text = changed("{alpha_ms: 1.5, beta_ms: 4}", "&p {alpha_ms: 1.5, beta_ms: 4}")
    text = text[: text.index("    profile:\n")] + "    profile: *p\n" + text[text.index("    inputs") :]
    assert parse(text).stages["recognize"].profile == Profile(alpha_ms=1.5, beta_ms=4)


# ---- YAML that is none, or surprises ---------------------------------------------------------


@pytest.mark.parametrize("text", ["", "\n\n", "# nothing\n", "---\n"])
def test_an_empty_file(text: str) -> None:
    assert "the file is empty" in only(text)


@pytest.mark.parametrize("text", ["- a\n- b\n", "just text\n", "3\n"])
def test_a_file_that_is_no_mapping(text: str) -> None:
    assert "not a mapping" in only(text)


def test_duplicate_keys_are_told_with_both_lines() -> None:
    found = problems(GOOD + "slo: 5s\nname: other\n")
    assert [(p.line, p.where) for p in found] == [(19, "slo"), (20, "name")]
    assert "first on line 2" in str(found[0])


def test_tabs() -> None:
    for text in ("name: a\nstages:\n\tdetect: 1\n", "name:\ta\n\tb: 1\n"):
        message = only(text)
        assert "a tab in the indentation; indent with spaces" in message
    assert only("name: a\nstages:\n\tdetect: 1\n").startswith("video.yaml:3: ")


def test_broken_yaml_names_the_line() -> None:
    assert only("name: a\nstages: {detect: [\nslo: 1\n").startswith("video.yaml:")
    assert only("name: a\n  slo: 1\n").startswith("video.yaml:2: not YAML")
    assert only("name: 'a\n").startswith("video.yaml:")


def test_an_undefined_alias() -> None:
    assert only("name: *gone\n").startswith("video.yaml:1: found undefined alias 'gone'; define it")


def test_two_documents() -> None:
    assert "one pipeline a file" in only(GOOD + "---\n" + GOOD)


def test_a_control_character() -> None:
    assert only("name: a\nslo: \x07\n").startswith("video.yaml:2: character U+0007")


def test_an_alias_bomb() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 30)]
    assert "aliases make more than" in only("\n".join(lines))


def test_an_alias_that_contains_itself() -> None:
    assert "an alias contains itself" in only("name: &a [*a]\n")


def test_deep_nesting() -> None:
    assert "too deeply" in only("name: " + "[" * 50_000)


@pytest.mark.parametrize("key", ["no", "~", "1.5", "[a]"])
def test_a_key_that_yaml_does_not_read_as_text(key: str) -> None:
    assert "in quotes" in only(GOOD + f"? {key}\n: 1\n")


def test_merge_keys_and_tags_are_refused() -> None:
    assert "merge keys" in only(GOOD + "<<: {description: a}\n")
    assert "tag" in str(problems(changed("video", "!!python/object/apply:os.system [echo]"))[0])
    assert "tag" in str(problems(changed("video", "!mine video"))[0])


# ---- fields -------------------------------------------------------------------------------


def test_unknown_fields_suggest_the_near_name() -> None:
    text = GOOD.replace("max_items", "max_item").replace("name:", "nam:").replace("alpha_ms", "alpha")
    found = [str(p) for p in problems(text)]
    assert found == [
        "video.yaml:1: nam: unknown field 'nam'; write 'name'",
        "video.yaml:6: stages.detect.profile.alpha: unknown field 'alpha'; write 'alpha_ms'",
        "video.yaml:15: stages.recognize.max_item: unknown field 'max_item'; write 'max_items'",
    ]
    assert "use one of name, slo," in only(GOOD + "zzz: 1\n")


@pytest.mark.parametrize("field", ["name", "slo", "output"])
def test_missing_fields(field: str) -> None:
    text = {"name": changed("name: video\n", ""), "slo": changed("slo: 400ms\n", "")}.get(field)
    text = text or GOOD[: GOOD.index("output:")]
    assert f"{field} is missing; write for instance `{field}: " in only(text)


def test_missing_stages() -> None:
    assert "stages is missing" in only("name: a\nslo: 1\noutput: b\n")
    for value in ("{}", "[a]", "3"):
        assert "no mapping with one stage" in only(f"name: a\nslo: 1\noutput: b\nstages: {value}\n")
    assert "a stage is a mapping, not a text" in only("name: a\nslo: 1\noutput: b\nstages: {b: onnx}\n")


def test_a_missing_executor() -> None:
    assert only("name: a\nslo: 1\noutput: b\nstages:\n  b: {inputs: [request]}\n").startswith(
        "video.yaml:5: stages.b.executor: executor is missing; write for instance `executor: onnx`"
    )


def test_the_root_is_not_for_the_author() -> None:
    assert "root: root is the directory of the file itself; remove it" in only(GOOD + "root: /tmp\n")


@pytest.mark.parametrize(
    ("old", "new", "where"),
    [
        ("video", "Video", "name"),
        ("video", "5", "name"),
        ("video", '"video\\n"', "name"),
        ("map: yes", "map: 1", "stages.recognize.map"),
        ("max_items: 20", "max_items: 0", "stages.recognize.max_items"),
        ("max_items: 20", "max_items: many", "stages.recognize.max_items"),
        ("max_items: 20", "max_batch: 1.5", "stages.recognize.max_batch"),
        ("max_items: 20", "before: steps.f", "stages.recognize.before"),
        ("max_items: 20", "options: [1]", "stages.recognize.options"),
        ("max_items: 20", "model: 3", "stages.recognize.model"),
        ("beta_ms: 4", "beta_ms: -4", "stages.detect.profile.beta_ms"),
        ("{alpha_ms: 1.5, beta_ms: 4}", "5ms", "stages.detect.profile"),
        ("8: 20.5", "8: fast", "stages.recognize.profile.latency_ms[8]"),
        ("[detect.crops]", "detect.crops", "stages.recognize.inputs"),
        ("[detect.crops]", "[detect.crops.x]", "stages.recognize.inputs[0]"),
        ("[detect.crops]", "[3]", "stages.recognize.inputs[0]"),
        ("[detect.crops]", "{a: Detect}", "stages.recognize.inputs.a"),
        ("boxes: detect.boxes", "boxes: 3", "output.boxes"),
    ],
)
def test_a_wrong_value_is_told_where_it_stands(old: str, new: str, where: str) -> None:
    (problem,) = problems(changed(old, new))
    assert problem.where == where
    text = textwrap.dedent(changed(old, new)).removeprefix("\n")
    assert new.split("\n")[0] in text.splitlines()[problem.line - 1]


def test_independent_problems_are_told_at_once() -> None:
    text = """
        name: Video
        slo: soon
        stages:
          Detect:
            executor: emulatd
          a:
            executor: emulated
            inputs: [b]
            max_batch: 0
          b:
            executor: onnx
            inputs:
              - a
              - gone
        output: a
        """
    found = {p.where: p.line for p in problems(text)}
    assert found == {
        "name": 1,
        "slo": 2,
        "stages.Detect": 4,
        "stages.Detect.executor": 5,
        "stages.a": 6,  # no profile
        "stages.a.inputs": 8,  # a cycle
        "stages.a.max_batch": 9,
        "stages.b": 10,  # no model
        "stages.b.inputs[1]": 14,
    }


def test_a_misspelt_executor_is_guessed() -> None:
    (problem,) = problems("name: a\nslo: 1s\nstages: {b: {executor: pyhton, model: 'json:loads'}}\noutput: b\n")
    assert str(problem).endswith("stages.b.executor: 'pyhton' does not fit here; write 'python'")


# ---- files --------------------------------------------------------------------------------


def test_a_file_is_read_and_its_directory_is_the_root(tmp_path: Path) -> None:
    file = tmp_path / "video.yaml"
    file.write_text("\ufeff" + GOOD.removeprefix("\n"), encoding="utf-8")
    spec = load_spec(str(file))
    assert spec.root == str(tmp_path.resolve())
    assert spec.name == "video"


def test_unusable_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def said(path: Path) -> str:
        with pytest.raises(SpecError) as caught:
            load_spec(str(path))
        return str(caught.value)

    assert "there is no such file" in said(tmp_path / "gone.yaml")
    assert "this is a directory" in said(tmp_path)
    (tmp_path / "huge.yaml").write_bytes(b"#" * (1024 * 1024 + 1))
    assert "larger than 1024 KiB" in said(tmp_path / "huge.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"name: a\nslo: \xe9\n")
    assert "not UTF-8 text (line 2)" in said(tmp_path / "latin.yaml")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.yaml").write_text("name: 3\n")
    assert "bad.yaml:1: name: " in said(Path("bad.yaml"))


def test_an_unknown_name_lists_the_shipped_pipelines() -> None:
    with pytest.raises(SpecError) as caught:
        load_spec("ehco")
    assert str(caught.value) == (
        "ehco: neither a file nor a shipped pipeline (those are classify, da, echo, ga, lv, ocr, tm); "
        "write 'echo', or give the path of a YAML file"
    )


def test_a_shipped_name_goes_before_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "echo").write_text(GOOD)
    assert load_spec("echo").name == "echo"
    assert load_spec("./echo").name == "video"


@pytest.mark.parametrize(
    ("name", "slo", "stages"), [("tm", 0.4, 3), ("lv", 0.5, 5), ("ga", 0.6, 5), ("da", 0.42, 4), ("echo", 1.0, 1)]
)
def test_the_shipped_emulated_pipelines(name: str, slo: float, stages: int) -> None:
    assert name in shipped_pipelines()
    spec = load_spec(name)
    assert (spec.name, spec.slo, len(spec.stages)) == (name, slo, stages)
    assert {stage.executor for stage in spec.stages.values()} == {"emulated"}
    assert min(stage.max_batch for stage in spec.stages.values()) >= 64
