"""What is refused of a spec whose fields are all well-formed."""

import sys
from pathlib import Path
from typing import Any

import pytest

from pipelines import (
    ModelNotFoundError,
    PipelineSpec,
    Profile,
    StageSpec,
    load_spec,
    missing_files,
    resolve_model_file,
    validate,
)
from pipelines.packages import install_advice


def emulated(*inputs: str, ms: float = 1.0, map: bool = False, named: dict[str, str] | None = None) -> StageSpec:
    profile = Profile(alpha_ms=ms, beta_ms=0)
    return StageSpec(executor="emulated", profile=profile, inputs=named or list(inputs) or ["request"], map=map)


def pipeline(output: str | dict[str, str], slo: float = 1.0, root: str = "", **stages: StageSpec) -> PipelineSpec:
    return PipelineSpec(name="video", slo=slo, stages=stages, output=output, root=root)


def said(spec: PipelineSpec) -> list[str]:
    return [str(problem) for problem in validate(spec)]


def only(spec: PipelineSpec) -> str:
    (problem,) = said(spec)
    return problem


def test_chains_forks_joins_and_maps_are_sound() -> None:
    spec = pipeline(
        {"who": "face.name", "all": "join", "id": "request.id"},
        detect=emulated("request.image"),
        face=emulated("detect.faces"),
        pose=emulated("detect.poses", map=True),
        second=emulated("pose", map=True),
        join=emulated(named={"face": "face", "pose": "second", "id": "request.id"}),
    )
    assert said(spec) == []


def test_an_unknown_stage_suggests_the_near_name() -> None:
    assert only(pipeline("b", a=emulated(), b=emulated("aa"))) == (
        "stages.b.inputs[0]: there is no stage 'aa'; write 'a'"
    )
    assert "use one of request, detect" in only(pipeline("zzz.q", detect=emulated()))
    assert only(pipeline({"x": "detct"}, detect=emulated())).startswith(
        "output.x: there is no stage 'detct'; write 'de"
    )


def test_a_cycle_is_named() -> None:
    spec = pipeline("d", a=emulated(), b=emulated("a", "d"), c=emulated("b"), d=emulated("c"))
    assert "b -> c -> d -> b" in only(spec) or "c -> d -> b -> c" in only(spec) or "d -> b -> c -> d" in only(spec)
    assert "a -> a" in only(pipeline("a", a=emulated("a")))


def test_two_cycles_are_told_at_once() -> None:
    spec = pipeline(
        {"x": "a", "y": "c"}, a=emulated("b"), b=emulated("a"), c=emulated("d"), d=emulated("c"), e=emulated("d")
    )
    assert len([problem for problem in said(spec) if "cycle" in problem]) == 2


def test_a_stage_that_feeds_nothing() -> None:
    spec = pipeline("b", a=emulated(), b=emulated("a"), c=emulated("a"), d=emulated("c"))
    assert [problem.partition(":")[0] for problem in said(spec)] == ["stages.c", "stages.d"]
    assert "does not depend on 'a'" in only(pipeline("request", a=emulated()))


def test_request_is_no_name_for_a_stage() -> None:
    assert "rename the stage" in said(pipeline("request", request=emulated()))[0]


def test_inputs_are_counted() -> None:
    nothing = StageSpec(executor="emulated", profile=Profile(alpha_ms=1, beta_ms=1), inputs=[])
    assert "never runs" in only(pipeline("a", a=nothing))
    assert "listed twice" in only(pipeline("a", a=emulated("request", "request")))
    two = emulated("a.x", "a.y", map=True)
    assert "a map stage has one input" in only(pipeline("b", a=emulated(), b=two))
    assert said(pipeline("a", a=emulated(named={"x": "request", "y": "request"}))) == []


def test_an_empty_output() -> None:
    assert "the output is empty" in said(pipeline({}, a=emulated()))[0]


def test_a_field_of_a_list() -> None:
    spec = pipeline("b.text", a=emulated(), b=emulated("a.items", map=True))
    assert only(spec).endswith("its answer is a list and has no field 'text'; write 'b'")
    spec = pipeline({"x": "a.size", "y": "b"}, a=emulated(), b=emulated("a", map=True))
    assert "put the items into a field" in only(spec)
    spec = pipeline({"x": "request.id", "y": "b"}, b=emulated("request", map=True))
    assert "'request.id' is a field of it" in only(spec)


# ---- models --------------------------------------------------------------------------------


@pytest.mark.parametrize("executor", ["python", "onnx", "torch", "triton"])
def test_a_model_is_needed(executor: Any) -> None:
    assert f"{executor} stage needs a model" in only(pipeline("a", a=StageSpec(executor=executor)))


@pytest.mark.parametrize(
    ("executor", "model"),
    [("python", "steps.py"), ("torch", "model"), ("python", "a.pt"), ("triton", "models/a"), ("triton", "../a")],
)
def test_a_model_that_fits_no_executor(executor: Any, model: str) -> None:
    assert "is no model of a" in only(pipeline("a", a=StageSpec(executor=executor, model=model)))


def test_an_emulated_stage_needs_a_profile() -> None:
    assert "needs a profile" in only(pipeline("a", a=StageSpec(executor="emulated")))


def test_a_model_of_a_triton_server_is_no_file() -> None:
    stage = StageSpec(executor="triton", model="resnet50_v1.5")
    assert not validate(pipeline("a", a=stage))
    assert not missing_files(pipeline("a", a=stage))
    assert "sha256 goes with a model at an address" in only(
        pipeline("a", a=StageSpec(executor="triton", model="resnet", sha256="0" * 64))
    )


def with_model(root: Path, model: str, executor: Any = "onnx", **fields: Any) -> PipelineSpec:
    return pipeline("a", root=str(root), a=StageSpec(executor=executor, model=model, **fields))


def test_a_model_file_is_found_beside_the_spec(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "a.onnx").touch()
    (tmp_path / "a.pt2").touch()
    assert resolve_model_file(with_model(tmp_path, "models/a.onnx"), "a") == tmp_path / "models" / "a.onnx"
    assert resolve_model_file(with_model(tmp_path, str(tmp_path / "a.pt2"), "torch"), "a") == tmp_path / "a.pt2"
    assert missing_files(with_model(tmp_path, "models/a.onnx")) == []
    assert missing_files(with_model(tmp_path, "a.pt2", "torch")) == []


def test_a_missing_model_file_names_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "detect.onnx").touch()
    (problem,) = missing_files(with_model(tmp_path, "detct.onnx"))
    assert str(problem).startswith(f"stages.a.model: no file {tmp_path / 'detct.onnx'} (there: detect.onnx); write")
    (tmp_path / "folder.onnx").mkdir()
    assert "is a directory" in str(missing_files(with_model(tmp_path, "folder.onnx"))[0])


def test_a_model_inside_an_installed_package_which_is_not_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "site" / "heavy_package_with_models"
    (package / "sub" / "data").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')\n")
    (package / "sub" / "data" / "a.onnx").touch()
    monkeypatch.syspath_prepend(tmp_path / "site")
    spec = with_model(tmp_path, "heavy_package_with_models:sub/data/a.onnx")
    assert resolve_model_file(spec, "a") == package / "sub" / "data" / "a.onnx"
    assert resolve_model_file(with_model(tmp_path, "heavy_package_with_models.sub:data/a.onnx"), "a").is_file()
    assert "heavy_package_with_models" not in sys.modules
    with pytest.raises(ModelNotFoundError, match="has no file gone"):
        resolve_model_file(with_model(tmp_path, "heavy_package_with_models:gone.onnx"), "a")
    with pytest.raises(ModelNotFoundError, match="leads out of the package"):
        resolve_model_file(with_model(tmp_path, "heavy_package_with_models:../../x.onnx"), "a")


def test_a_package_that_is_not_installed(tmp_path: Path) -> None:
    (problem,) = missing_files(with_model(tmp_path, "no_such_package:a.onnx"))
    assert "the package no_such_package is not installed; pip install no_such_package" in str(problem)


@pytest.mark.parametrize(
    ("package", "advice"),
    [("rapidocr", "'laxity[ocr]'"), ("onnxruntime", "'laxity[onnx]'"), ("tritonclient", "'laxity[triton]'")],
)
def test_a_package_that_an_extra_brings_is_named_by_the_extra(package: str, advice: str) -> None:
    assert install_advice(package) == f"pip install {advice}"


def test_user_code_that_is_missing(tmp_path: Path) -> None:
    (tmp_path / "present_steps.py").write_text("raise RuntimeError\n")
    spec = with_model(tmp_path, "present_steps:Model", "python", before="gone_steps:f", sample="present_steps:s")
    (problem,) = missing_files(spec)
    assert problem.where == "stages.a.before"
    assert "no module 'gone_steps'" in problem.message
    (problem,) = missing_files(with_model(tmp_path, "gone_steps:make", "torch"))
    assert problem.where == "stages.a.model"


def test_an_emulated_stage_keeps_its_model_unread(tmp_path: Path) -> None:
    profile = Profile(alpha_ms=1, beta_ms=1)
    assert missing_files(with_model(tmp_path, "gone.onnx", "emulated", before="gone:f", profile=profile)) == []


# ---- profiles and the SLO -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("profile", "text"),
    [
        (Profile(), "has both alpha_ms and beta_ms"),
        (Profile(alpha_ms=1), "has both alpha_ms and beta_ms"),
        (Profile(alpha_ms=1, beta_ms=1, latency_ms={1: 1}), "remove one of the two"),
        (Profile(alpha_ms=1, beta_ms=float("inf")), "inf is no latency"),
        (Profile(latency_ms={}), "no latencies"),
        (Profile(latency_ms={0: 1.0}), "batches start at 1"),
        (Profile(latency_ms={1: 0.0}), "above zero"),
        (Profile(latency_ms={1: 1.0, 2: float("inf")}), "no measured latency"),
        (Profile(latency_ms={8: 4.0, 1: 1.0, 4: 5.0}), "a batch of 8 is faster (4 ms) than a smaller one (5 ms)"),
        (Profile(alpha_ms=1, beta_ms=1, load_ms=float("nan")), "leave it out where it is not known"),
        (Profile(alpha_ms=1, beta_ms=1, by_type={"T4": Profile(alpha_ms=1)}), "by_type.T4: a profile has both"),
        (
            Profile(alpha_ms=1, beta_ms=1, by_type={"T4": Profile(latency_ms={1: 1}, by_type={"T4": Profile()})}),
            "types inside a type",
        ),
    ],
)
def test_a_profile_that_is_none(profile: Profile, text: str) -> None:
    message = only(pipeline("a", a=StageSpec(executor="emulated", profile=profile)))
    assert message.startswith("stages.a.profile")
    assert text in message


def test_an_slo_that_no_request_can_meet() -> None:
    spec = pipeline(
        "d",
        slo=0.1,
        a=emulated(ms=40),
        b=emulated("a", ms=10),
        c=emulated("a", ms=50),
        d=emulated("b", "c", ms=20),
    )
    message = only(spec)
    assert message.startswith("slo: no request can meet 100ms: in batches of 1 the longest path takes 110ms ")
    assert "(a 40ms + c 50ms + d 20ms), 10ms too long" in message
    assert "well above 110ms" in message


def test_an_slo_that_can_just_be_met_and_one_map_item() -> None:
    assert said(pipeline("b", slo=0.05, a=emulated(ms=25), b=emulated("a.items", ms=25, map=True))) == []
    assert "too long" in only(pipeline("b", slo=0.049, a=emulated(ms=25), b=emulated("a.items", ms=25, map=True)))


def test_stages_without_a_profile_count_nothing(tmp_path: Path) -> None:
    slow = StageSpec(executor="onnx", model="a.onnx")
    assert said(pipeline("b", slo=0.05, a=slow, b=emulated("a", ms=25))) == []


@pytest.mark.parametrize("slo", [0.0, -1.0, float("nan"), float("inf")])
def test_an_slo_that_is_none(slo: float) -> None:
    assert "no latency objective" in only(pipeline("a", slo=slo, a=emulated()))


def test_the_shipped_ocr_pipeline_is_found_with_its_models() -> None:
    pytest.importorskip("rapidocr")
    assert load_spec("ocr").slo > 0
