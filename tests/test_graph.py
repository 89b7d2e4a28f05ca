from graphlib import CycleError
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines import Graph, PipelineSpec, StageSpec


def spec(output: str | dict[str, str], **stages: StageSpec) -> PipelineSpec:
    return PipelineSpec(name="video", slo=1.0, stages=stages, output=output)


def stage(*inputs: str, map: bool = False) -> StageSpec:
    return StageSpec(executor="emulated", inputs=list(inputs), map=map)


def diamond() -> Graph:
    """Written in an order that is not topological."""
    return Graph(
        spec(
            {"all": "join", "boxes": "detect.boxes", "id": "request.id"},
            join=stage("pose", "face.name", "request.id"),
            face=stage("detect.faces", map=True),
            pose=stage("detect.people"),
            detect=stage("request"),
        )
    )


def test_order_parents_children_and_roots() -> None:
    graph = diamond()
    assert graph.order[0] == "detect"
    assert graph.order[-1] == "join"
    assert set(graph.order) == {"detect", "face", "pose", "join"}
    assert graph.parents == {"join": ("pose", "face"), "face": ("detect",), "pose": ("detect",), "detect": ()}
    assert set(graph.children["detect"]) == {"face", "pose"}
    assert graph.children["join"] == ()
    assert graph.roots == ("detect",)


def test_two_references_to_one_stage_are_one_edge() -> None:
    graph = Graph(spec("b", a=stage("request"), b=stage("a.x", "a.y")))
    assert graph.parents["b"] == ("a",)
    assert graph.children["a"] == ("b",)


def test_fields() -> None:
    graph = diamond()
    assert graph.fields_used("detect") == {"faces", "people", "boxes"}
    assert graph.list_fields("detect") == {"faces"}
    assert graph.fields_used("join") == {""}
    assert graph.fields_used("request") == {"", "id"}
    assert graph.list_fields("join") == set()
    whole = Graph(spec("b", a=stage("request"), b=stage("a", map=True)))
    assert whole.list_fields("a") == whole.fields_used("a") == {""}


def test_paths() -> None:
    graph = diamond()
    assert set(graph.paths_after("detect")) == {("face", "join"), ("pose", "join")}
    assert list(graph.paths_after("join")) == [()]
    seconds = {"detect": 1.0, "face": 2.0, "pose": 3.0, "join": 0.5}
    assert graph.longest_path(seconds) == (4.5, ("detect", "pose", "join"))
    assert graph.longest_after(seconds) == {"join": 0.0, "face": 0.5, "pose": 0.5, "detect": 3.5}
    assert graph.longest_path({"face": 1.0}) == (1.0, ("detect", "face", "join"))


def test_a_cycle_is_no_graph() -> None:
    with pytest.raises(CycleError):
        Graph(spec("a", a=stage("b"), b=stage("a")))


@st.composite
def graphs(draw: st.DrawFn) -> tuple[PipelineSpec, dict[str, float]]:
    """DAGs of up to seven stages, written in any order, with a time for each."""
    names = [f"s{i}" for i in range(draw(st.integers(1, 7)))]
    stages = {}
    for index, name in enumerate(names):
        parents = draw(st.lists(st.sampled_from(["request", *names[:index]]), min_size=1, unique=True))
        stages[name] = stage(*parents)
    shuffled = draw(st.permutations(names))
    seconds = {name: draw(st.integers(0, 1000)) / 8 for name in names}
    return spec(names[-1], **{name: stages[name] for name in shuffled}), seconds


@given(graphs())
def test_any_dag(case: tuple[PipelineSpec, dict[str, float]]) -> None:
    pipeline, seconds = case
    graph = Graph(pipeline)
    place = {name: index for index, name in enumerate(graph.order)}
    assert set(place) == set(pipeline.stages)
    for name, parents in graph.parents.items():
        assert all(place[parent] < place[name] for parent in parents)
        assert all(name in graph.children[parent] for parent in parents)
    after = graph.longest_after(seconds)
    for name in pipeline.stages:
        assert after[name] == max(sum(seconds[one] for one in path) for path in graph.paths_after(name))
    total, path = graph.longest_path(seconds)
    assert total == sum(seconds[name] for name in path)
    assert total == max(seconds[root] + after[root] for root in graph.roots)
    assert path[0] in graph.roots
    assert graph.children[path[-1]] == ()
    assert all(before in graph.parents[name] for before, name in pairwise(path))
