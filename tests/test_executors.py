"""Executors with real models: Python callables, and what surrounds every model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from executing import run_batch

from laxity.node import PayloadError
from nodes.executors.base import Executor, ItemError, MissingExtra, Unavailable
from nodes.executors.build import build_executor
from nodes.executors.errors import describe_error, error_code
from nodes.executors.garbage import settle
from nodes.executors.steps import split, stack
from pipelines.spec import PipelineSpec

CODE = """
import collections
import weakref

import numpy as np

class Scale:
    def __init__(self, factor):
        self.factor = factor
    def __call__(self, feeds):
        return [feed * self.factor for feed in feeds]

def double(feeds):
    return [feed * 2 for feed in feeds]

def tuples(feeds):
    return tuple((feed, -feed) for feed in feeds)

def one_short(feeds):
    return feeds[1:]

def no_list(feeds):
    return 7

def broken(feeds):
    raise RuntimeError("out of order")

def leaves(feeds):
    raise SystemExit(3)

def positive(value):
    if value < 0:
        raise ValueError(f"{value} is negative")
    return value

def with_kept(value):
    return value["x"], value["name"]

def three(value):
    return value, value, value

def named(output, kept):
    if output == 13:
        raise KeyError("thirteen")
    return {"name": kept, "output": output}

def column(feeds):
    return np.array(feeds)[:, None]

def row_sums(batch):
    assert batch.ndim == 2, batch
    return batch.sum(axis=1)

class Knots:
    # Refers to itself, as many a model does.
    made = []
    def __init__(self):
        self.call = self.__call__
        self.made.append(weakref.ref(self))
    def __call__(self, feeds):
        return [[knot() is not None for knot in self.made]] * len(feeds)

class Pages:
    def __init__(self, word):
        self.word = word
        self.said = []
    def load(self):
        self.said.append("load")
    def unload(self):
        self.said.append("unload")
    def memory_mb(self):
        return 12
    def __call__(self, feeds):
        return [[self.word, *self.said]] * len(feeds)

class Keeps:
    # Answers in memory that it keeps.
    def __init__(self):
        row = np.zeros(2)
        self.raw = bytearray(8)
        self.objects = np.array([None, {"row": row}], object)
        self.kept = [Row(row, "a"), collections.OrderedDict(row=[row]), self.objects, self.raw, memoryview(self.raw)]
        self.row = row
    def __call__(self, feeds):
        self.row += 1
        self.raw[0] += 1
        self.objects[0] = self.raw[0]
        return self.kept

Row = collections.namedtuple("Row", "row name")

constant = 3
"""


def build(tmp_path: Path, **stage: Any) -> Executor:
    (tmp_path / "code.py").write_text(CODE)
    stage = {"executor": "python", **stage}
    spec = msgspec.convert({"name": "p", "slo": 1.0, "stages": {"s": stage}, "output": "s"}, PipelineSpec)
    executor = build_executor(msgspec.structs.replace(spec, root=str(tmp_path)), "s", "cpu")
    executor.hold()
    executor.load()
    return executor


def test_a_function_is_called_with_the_feeds_and_a_class_is_made_with_the_options(tmp_path: Path) -> None:
    assert run_batch(build(tmp_path, model="code:double"), [1, 2, 3]) == [2, 4, 6]
    assert run_batch(build(tmp_path, model="code:Scale", options={"factor": 5}), [1, 2]) == [5, 10]


def test_a_class_is_made_anew_whenever_it_is_paged_in_and_what_it_leaves_is_freed(tmp_path: Path) -> None:
    executor = build(tmp_path, model="code:Knots")
    settle()  # as a worker does: what is there is looked through no more
    executor.unload()
    executor.load()
    assert run_batch(executor, [0]) == [[False, True]]
    assert executor.memory_mb() == 0


def test_a_class_that_pages_itself_is_made_once(tmp_path: Path) -> None:
    executor = build(tmp_path, model="code:Pages", options={"word": "once"})
    assert executor.memory_mb() == 12
    executor.unload()
    executor.load()
    assert run_batch(executor, [0]) == [["once", "load", "unload", "load"]]
    executor.unload()
    executor.release()


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (MemoryError(), "out_of_memory"),
        (RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"), "out_of_memory"),
        (RuntimeError("failed to allocate pinned system memory"), "out_of_memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "out_of_memory"),
        (RuntimeError("[ONNXRuntimeError] : 6 : Failed to allocate memory for requested buffer"), "out_of_memory"),
        (Unavailable("the server is away"), "unavailable"),
        (PayloadError("a frame is missing"), "bad_input"),
        (ValueError("no such shape"), "model_error"),
        (SystemExit(3), "model_error"),
    ],
)
def test_errors_are_told_apart_also_by_what_caused_them(error: BaseException, code: str) -> None:
    assert error_code(error) == code
    around = RuntimeError("a batch failed")
    around.__cause__ = error
    assert error_code(around) == code


def test_an_output_may_be_a_tuple(tmp_path: Path) -> None:
    assert run_batch(build(tmp_path, model="code:tuples"), [1, 2, 3]) == [(1, -1), (2, -2), (3, -3)]


def test_outputs_outlive_the_next_run_whatever_holds_them(tmp_path: Path) -> None:
    executor = build(tmp_path, model="code:Keeps")
    first = run_batch(executor, [0] * 5)
    run_batch(executor, [0] * 5)
    pair, named, objects, raw, view = first
    assert (pair.row.tolist(), pair.name) == ([1, 1], "a")
    assert type(named).__name__ == "OrderedDict"
    assert named["row"][0].tolist() == [1, 1]
    assert objects[0] == raw[0] == bytes(view)[0] == 1
    assert objects[1]["row"].tolist() == [1, 1]


def test_options_for_a_function_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="options are given to classes"):
        build(tmp_path, model="code:double", options={"factor": 5})


def test_what_cannot_be_called_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="code:constant cannot be called"):
        build(tmp_path, model="code:constant")
    with pytest.raises(TypeError, match="code:constant is a int"):
        build(tmp_path, model="code:double", before="code:constant")


def test_an_error_before_the_model_fails_its_element_alone(tmp_path: Path) -> None:
    answers = run_batch(build(tmp_path, model="code:double", before="code:positive"), [1, -2, 3])
    assert (answers[0], answers[2]) == (2, 6)
    assert isinstance(answers[1], ItemError)
    assert answers[1].detail.startswith("before code:positive: ValueError: -2 is negative (code.py, line ")
    assert answers[1].detail.endswith("in positive)")


def test_when_every_element_fails_beforehand_the_model_is_not_run(tmp_path: Path) -> None:
    answers = run_batch(build(tmp_path, model="code:broken", before="code:positive"), [-1, -2])
    assert [type(answer) for answer in answers] == [ItemError, ItemError]


def test_an_error_after_the_model_fails_its_element_alone(tmp_path: Path) -> None:
    executor = build(tmp_path, model="code:double", before="code:with_kept", after="code:named")
    answers = run_batch(executor, [{"x": 1, "name": "a"}, {"x": 6.5, "name": "b"}])
    assert answers[0] == {"name": "a", "output": 2}
    assert isinstance(answers[1], ItemError)
    assert "after code:named: KeyError: 'thirteen'" in answers[1].detail


def test_the_stage_s_input_is_kept_where_before_returns_the_feed_alone(tmp_path: Path) -> None:
    executor = build(tmp_path, model="code:double", before="code:positive", after="code:named")
    assert run_batch(executor, [4]) == [{"name": 4, "output": 8}]


def test_a_tuple_of_three_from_before_is_an_error(tmp_path: Path) -> None:
    (answer,) = run_batch(build(tmp_path, model="code:double", before="code:three"), [1])
    assert isinstance(answer, ItemError)
    assert "tuple of 3" in answer.detail


def test_collate_makes_the_batch_and_its_outputs_are_split(tmp_path: Path) -> None:
    assert run_batch(build(tmp_path, model="code:row_sums", collate="code:column"), [3, 4]) == [3, 4]


def test_the_wrong_number_of_outputs_fails_the_batch(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="returned 3 outputs for a batch of 4: a model must return one output"):
        run_batch(build(tmp_path, model="code:one_short"), [1, 2, 3, 4])
    with pytest.raises(ValueError, match="code:no_list returned a int: return a list"):
        run_batch(build(tmp_path, model="code:no_list"), [1])


@pytest.mark.parametrize(("model", "error"), [("code:broken", RuntimeError), ("code:leaves", SystemExit)])
def test_what_the_model_raises_reaches_the_worker(tmp_path: Path, model: str, error: type[BaseException]) -> None:
    with pytest.raises(error) as raised:
        run_batch(build(tmp_path, model=model), [1])
    name = model.removeprefix("code:")
    assert describe_error(raised.value, "model").endswith(f"in {name})")


def test_stacking_groups_by_shape_and_type() -> None:
    feeds = [np.zeros(2), np.zeros(3), np.ones(2), np.zeros(2, np.int64)]
    groups = stack(feeds)
    assert [(members, batch.shape) for members, batch in groups] == [([0, 2], (2, 2)), ([1], (1, 3)), ([3], (1, 2))]
    assert groups[0][1].tolist() == [[0, 0], [1, 1]]


def test_stacking_dicts_keeps_their_names_apart() -> None:
    groups = stack([{"a": np.zeros(2), "b": np.zeros(1)}, {"a": np.ones(2), "b": np.zeros(1)}])
    assert len(groups) == 1
    assert {name: array.shape for name, array in groups[0][1].items()} == {"a": (2, 2), "b": (2, 1)}


def test_splitting_dicts_and_tuples_of_outputs() -> None:
    assert split({"a": np.array([1, 2]), "b": ["x", "y"]}, 2) == [{"a": 1, "b": "x"}, {"a": 2, "b": "y"}]
    assert split((np.array([1, 2]), np.array([3, 4])), 2) == [(1, 3), (2, 4)]
    with pytest.raises(ValueError, match="returned 2 outputs for a batch of 3"):
        split({"a": np.zeros((3, 1)), "b": np.zeros((2, 1))}, 3)
    with pytest.raises(ValueError, match="returned a ndarray for a batch of 1"):
        split(np.array(1.0), 1)


def test_a_stage_without_a_model_and_an_emulated_one_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no model"):
        build(tmp_path)
    with pytest.raises(ValueError, match="inside the agent"):
        build(tmp_path, executor="emulated")


def test_importing_the_executors_imports_no_runtime() -> None:
    program = (
        "import sys, nodes.executors.build, nodes.worker, pipelines.ocr.detect\n"
        "heavy = {'onnxruntime', 'torch', 'cv2', 'rapidocr', 'PIL'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize(("package", "model"), [("onnxruntime", "m.onnx"), ("torch", "m.pt")])
def test_a_missing_runtime_says_what_to_install(tmp_path: Path, package: str, model: str) -> None:
    (tmp_path / model).write_bytes(b"")
    extra = "onnx" if package == "onnxruntime" else "torch"
    program = f"""
import sys
sys.modules[{package!r}] = None
import msgspec
from nodes.executors.base import MissingExtra
from nodes.executors.build import build_executor
from pipelines.spec import PipelineSpec
stage = {{"executor": {extra!r}, "model": {model!r}}}
spec = {{"name": "p", "slo": 1.0, "stages": {{"s": stage}}, "output": "s", "root": {str(tmp_path)!r}}}
try:
    build_executor(msgspec.convert(spec, PipelineSpec), "s", "cpu").hold()
except MissingExtra as error:
    sys.stdout.write(str(error))
"""
    said = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
    assert said == str(MissingExtra(extra, package, extra))
    assert f"pip install 'laxity[{extra}]'" in said
