"""The ``onnx`` executor on small models made here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from executing import run_batch
from onnx import TensorProto, helper, numpy_helper, save

from nodes.executors.base import Executor, ItemError
from nodes.executors.build import build_executor
from nodes.executors.onnx import BoundSession, OnnxModel
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
    with pytest.raises(ValueError, match="the option 'threads' of the executor 'onnx': Expected `int` >= 1, not 0"):
        build(doubler, options={"threads": 0})
    assert run_batch(build(doubler, options={"threads": 2}), [np.ones(1, np.float32)])[0].tolist() == [2]


def test_a_file_that_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(b"not a model")
    with pytest.raises(Exception, match=r"m\.onnx"):
        build(tmp_path)


def test_paged_out_and_in_again_it_answers_the_same(doubler: Path) -> None:
    executor = build(doubler)
    before = run_batch(executor, [np.ones(2, np.float32)])
    (doubler / "m.onnx").unlink()  # what is held needs no file any more
    for _ in range(2):
        executor.unload()
        executor.load()
        np.testing.assert_array_equal(run_batch(executor, [np.ones(2, np.float32)]), before)


def test_weights_beside_the_file_are_held_and_counted(tmp_path: Path) -> None:
    weights = np.arange(512 * 512, dtype=np.float32).reshape(512, 512)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 512])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 512])],
        [numpy_helper.from_array(weights, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    save(model, str(tmp_path / "m.onnx"), save_as_external_data=True, location="weights.bin")
    assert (tmp_path / "m.onnx").stat().st_size < 10_000
    executor = build(tmp_path)
    (tmp_path / "weights.bin").unlink()
    executor.unload()
    executor.load()
    assert executor.memory_mb() == pytest.approx(1.0, rel=0.1)
    (answer,) = run_batch(executor, [np.eye(512, dtype=np.float32)[3]])
    np.testing.assert_array_equal(answer, weights[3])


def test_inputs_and_outputs_bound_to_a_device(two_by_two: Path) -> None:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(two_by_two / "m.onnx"), providers=["CPUExecutionProvider"])
    bound = BoundSession(onnxruntime, session, onnxruntime.RunOptions(), ["total", "difference"], "cpu")
    a, b = np.array([[3, 4], [1, 2]], np.float32), np.ones((2, 2), np.float32)
    total, difference = bound.download(bound.run(bound.upload({"a": a, "b": b[:, ::-1]})))
    np.testing.assert_array_equal(total, a + 1)
    np.testing.assert_array_equal(difference, a - 1)


SESSIONS = """
import sys
from pathlib import Path
import numpy as np
from nodes.executors.onnx import OnnxModel

def resident_mb():
    return int(Path("/proc/self/statm").read_text().split()[1]) / 256

def run(model):
    return model.download(model.run(model.upload(np.ones((1024, 1024), np.float32))))

models = [OnnxModel(Path(sys.argv[1]), "cpu", {}, 8) for _ in range(16)]
threads = []
for model in models:
    model.hold()
    model.load()
    threads.append(len(list(Path("/proc/self/task").iterdir())))
print(threads[-1] - threads[0])
run(models[0])
before = resident_mb()
for model in models[1:]:
    run(model)
print(resident_mb() - before)
"""


def test_sessions_share_their_arena_and_bring_no_threads_of_their_own(tmp_path: Path) -> None:
    # Each run has some 12 MB under way.
    nodes = [helper.make_node("Sin", ["x"], ["a"]), helper.make_node("Cos", ["a"], ["b"])]
    nodes.append(helper.make_node("MatMul", ["a", "b"], ["y"]))
    make_model(tmp_path / "m.onnx", nodes, {"x": ["n", 1024]}, {"y": ["n", 1024]})
    command = [sys.executable, "-c", SESSIONS, str(tmp_path / "m.onnx")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    threads, grown = done.stdout.split()
    assert int(threads) == 0
    assert float(grown) < 40


def test_released_it_can_be_held_again(doubler: Path) -> None:
    model = OnnxModel(doubler / "m.onnx", "cpu", {}, 8)
    for _ in range(2):
        model.hold()
        model.load()
        assert model.download(model.run(model.upload(np.ones((1, 1), np.float32)))).tolist() == [[2]]
        model.unload()
        model.release()
