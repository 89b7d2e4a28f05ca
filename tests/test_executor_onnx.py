"""The ``onnx`` executor on small models made here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from onnx import TensorProto, helper, save

from nodes.executors.base import Executor, ItemError, run_batch
from nodes.executors.build import build_executor
from pipelines.spec import PipelineSpec


def make_model(file: Path, nodes: list[Any], inputs: dict[str, list[Any]], outputs: dict[str, list[Any]]) -> None:
    def infos(shapes: dict[str, list[Any]]) -> list[Any]:
        return [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()]

    graph = helper.make_graph(nodes, "g", infos(inputs), infos(outputs))
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), str(file))


def build(tmp_path: Path, **stage: Any) -> Executor:
    stage = {"executor": "onnx", "model": "m.onnx", **stage}
    spec = {"name": "p", "slo": 1.0, "stages": {"s": stage}, "output": "s", "root": str(tmp_path)}
    executor = build_executor(msgspec.convert(spec, PipelineSpec), "s", "cpu")
    executor.hold()
    executor.load()
    return executor


@pytest.fixture
def doubler(tmp_path: Path) -> Path:
    node = helper.make_node("Add", ["x", "x"], ["y"])
    make_model(tmp_path / "m.onnx", [node], {"x": ["n", "w"]}, {"y": ["n", "w"]})
    return tmp_path


@pytest.fixture
def two_by_two(tmp_path: Path) -> Path:
    nodes = [helper.make_node("Add", ["a", "b"], ["total"]), helper.make_node("Sub", ["a", "b"], ["difference"])]
    shape = ["n", 2]
    inputs = {"a": shape, "b": shape}
    make_model(tmp_path / "m.onnx", nodes, inputs, {"total": shape, "difference": shape})
    return tmp_path


def test_bare_arrays_of_mixed_shapes(doubler: Path) -> None:
    batch = [np.full(width, width, np.float32) for width in (1, 3, 1, 2)]
    answers = run_batch(build(doubler), batch)
    assert [answer.tolist() for answer in answers] == [[2.0], [6.0] * 3, [2.0], [4.0] * 2]


def test_several_inputs_and_outputs_go_by_name(two_by_two: Path) -> None:
    a, b = np.array([3, 4], np.float32), np.array([1, 1], np.float32)
    answers = run_batch(build(two_by_two), [{"a": a, "b": b}, {"b": a, "a": b}])
    assert answers[0]["total"].tolist() == [4, 5]
    assert answers[1]["difference"].tolist() == [-2, -3]


@pytest.mark.parametrize(
    ("feed", "says"),
    [
        (np.zeros(2), "input 'x' takes float32, not float64: return array.astype(numpy.float32) from 'before'"),
        (np.zeros((2, 2), np.float32), "input 'x' takes [any] for one element, not [2, 2]"),
        (b"png", "the feed is a bytes; return an array, or a dict of arrays, from 'before'"),
        ([[1.0], [1.0, 2.0]], "the feed is no array"),
        ({"z": np.zeros(2, np.float32)}, "the model has the inputs 'x', the feed has 'z': rename them"),
    ],
)
def test_a_feed_that_does_not_fit_fails_alone(doubler: Path, feed: Any, says: str) -> None:
    bad, good = run_batch(build(doubler), [feed, np.ones(2, np.float32)])
    assert isinstance(bad, ItemError)
    assert says in bad.detail
    assert good.tolist() == [2, 2]


def test_a_bare_array_for_two_inputs_and_a_wrong_extent(two_by_two: Path) -> None:
    row = np.zeros(2, np.float32)
    bare, long = run_batch(build(two_by_two), [row, {"a": row, "b": np.zeros(3, np.float32)}])
    assert "the model has the inputs 'a', 'b': return a dict with these names" in bare.detail
    assert "input 'b' takes [2] for one element, not [3]" in long.detail


def test_a_fixed_batch_needs_max_batch(tmp_path: Path) -> None:
    node = helper.make_node("Add", ["x", "x"], ["y"])
    make_model(tmp_path / "m.onnx", [node], {"x": [1, 2]}, {"y": [1, 2]})
    with pytest.raises(ValueError, match="takes batches of 1 only: set max_batch: 1"):
        build(tmp_path)
    (answer,) = run_batch(build(tmp_path, max_batch=1), [np.ones(2, np.float32)])
    assert answer.tolist() == [2, 2]


def test_a_model_that_answers_too_few_rows(tmp_path: Path) -> None:
    node = helper.make_node("ReduceSum", ["x"], ["y"], keepdims=1)
    make_model(tmp_path / "m.onnx", [node], {"x": ["n", "w"]}, {"y": [1, 1]})
    with pytest.raises(ValueError, match="returned 1 outputs for a batch of 2"):
        run_batch(build(tmp_path), [np.ones(2, np.float32)] * 2)


def test_options_are_checked(doubler: Path) -> None:
    with pytest.raises(ValueError, match="no option 'thread'; it has 'threads'"):
        build(doubler, options={"thread": 2})
    with pytest.raises(ValueError, match="must be 1 or more"):
        build(doubler, options={"threads": 0})
    assert run_batch(build(doubler, options={"threads": 2}), [np.ones(1, np.float32)])[0].tolist() == [2]


def test_a_file_that_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(b"not a model")
    with pytest.raises(Exception, match=r"m\.onnx"):
        build(tmp_path)
