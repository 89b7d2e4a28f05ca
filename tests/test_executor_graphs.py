"""Buckets of batch sizes, and weights that change places, on the host: with a recorder that runs what it captured."""

from __future__ import annotations

import contextlib
import itertools
import logging
import warnings
import weakref
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from nodes.executors.cuda_graphs import WARM_UPS, BucketGraphs, Mode, bucket_sizes
from nodes.executors.torch_cuda import GraphPool

torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'laxity[torch]'")

from nodes.executors.torch_modules import Weights, map_tensors  # noqa: E402


class HostRecorder:
    """As CUDA graphs behave: what was captured runs again on the same memory, and writes to the same memory."""

    def __init__(self) -> None:
        self.warmed_up = 0
        self.replayed: list[int] = []
        self.refuses = 0
        """How many captures it still refuses."""

    def warm_up(self, work: Callable[[], Any]) -> None:
        self.warmed_up += 1
        work()

    def capture(self, work: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        if self.refuses:
            self.refuses -= 1
            raise RuntimeError("operation not permitted when stream is capturing")
        outputs: list[Any] = []
        written = map_tensors(torch, work(), lambda tensor: outputs.append(tensor) or tensor)

        def replay() -> None:
            again = iter(outputs)
            map_tensors(torch, work(), lambda tensor: next(again).copy_(tensor))
            self.replayed.append(len(outputs[0]))

        return replay, written


def graphs(call: Callable[[Any], Any], recorder: HostRecorder, max_batch: int = 8, mode: Mode = "auto") -> BucketGraphs:
    return BucketGraphs(
        torch, call, recorder, max_batch, mode, "m", lambda shape, dtype: torch.zeros(shape, dtype=dtype)
    )


def test_buckets_leave_little_to_pad() -> None:
    assert bucket_sizes(1) == [1]
    assert bucket_sizes(20) == [1, 2, 3, 4, 6, 8, 12, 16, 20]
    for most in range(1, 300):
        sizes = bucket_sizes(most)
        assert sizes[-1] == most
        for batch in range(1, most + 1):
            bucket = next(size for size in sizes if size >= batch)
            assert (bucket - batch) / bucket <= 1 / 3


def test_batches_are_padded_to_the_next_bucket_and_answer_as_plain_runs_do() -> None:
    recorder = HostRecorder()
    bucketed = graphs(lambda x: {"double": 2 * x, "pair": (x.sum(1), [x + 1])}, recorder, max_batch=8)
    for size in (3, 1, 5, 7, 8, 2):
        x = torch.rand(size, 4)
        outputs = bucketed.run(x)
        assert torch.equal(outputs["double"], 2 * x)
        assert torch.equal(outputs["pair"][0], x.sum(1))
        assert torch.equal(outputs["pair"][1][0], x + 1)
    assert recorder.replayed == [3, 1, 6, 8, 8, 2]
    assert recorder.warmed_up == WARM_UPS * len(bucket_sizes(8))


def test_inputs_go_by_name() -> None:
    recorder = HostRecorder()
    bucketed = graphs(lambda feeds: feeds["a"] - feeds["b"], recorder)
    a, b = torch.rand(5, 2), torch.rand(5, 2)
    assert torch.equal(bucketed.run({"b": b, "a": a}), a - b)
    assert recorder.replayed == [6]
    assert bucketed.input_bytes() == 2 * 8 * 2 * 4


@pytest.mark.parametrize("mode", ["auto", False])
def test_outputs_outlive_the_next_run(mode: Mode) -> None:
    kept = torch.zeros(8, 1)
    bucketed = graphs(lambda x: kept[: len(x)].copy_(x * 2), HostRecorder(), mode=mode)
    for width in (1, 2):  # as captured, and plainly
        kept = torch.zeros(8, width)
        first = bucketed.run(torch.ones(2, width))
        bucketed.run(torch.zeros(2, width))
        assert first.tolist() == [[2] * width] * 2


def test_other_shapes_run_plainly_and_this_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    recorder = HostRecorder()
    bucketed = graphs(lambda x: x * 2, recorder)
    bucketed.run(torch.ones(1, 4))
    with caplog.at_level(logging.WARNING):
        for other in (torch.ones(2, 5), torch.ones(2, 4, dtype=torch.int64), torch.ones(9, 4)):
            assert torch.equal(bucketed.run(other), other * 2)
    assert recorder.replayed == [1]
    assert caplog.messages == ["m: elements unlike the first ones run without a CUDA graph"]


def test_what_cannot_be_captured_runs_plainly_or_is_an_error(caplog: pytest.LogCaptureFixture) -> None:
    def stubborn() -> HostRecorder:
        recorder = HostRecorder()
        recorder.refuses = 1
        return recorder

    plain = graphs(lambda x: x * 2, stubborn())
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert plain.run(torch.ones(1, 1)).tolist() == [[2]]
    assert caplog.messages == [
        "m runs without CUDA graphs: RuntimeError: operation not permitted when stream is capturing"
    ]
    with pytest.raises(RuntimeError, match=r"cannot be captured as a CUDA graph \(graphs: true\): operation"):
        graphs(lambda x: x * 2, stubborn(), mode=True).run(torch.ones(1, 1))
    with pytest.raises(RuntimeError, match="the module returned a int"):
        graphs(lambda x: 7, HostRecorder(), mode=True).run(torch.ones(1, 1))


def test_nothing_is_captured_where_graphs_are_not_wanted() -> None:
    recorder = HostRecorder()
    never = graphs(lambda x: x * 2, recorder, mode=False)
    assert never.run(torch.ones(2, 1)).tolist() == [[2], [2]]
    never.capture(thorough=False)
    assert (recorder.warmed_up, recorder.replayed, never.input_bytes()) == (0, [], 0)


@pytest.mark.parametrize("refuses", [0, 1])
def test_after_paging_the_graphs_are_captured_anew(refuses: int) -> None:
    recorder = HostRecorder()
    bucketed = graphs(lambda x: x * 2, recorder)
    bucketed.capture(thorough=False)  # no shapes are known yet
    assert recorder.warmed_up == 0
    bucketed.run(torch.ones(1, 4))
    bucketed.forget()
    assert bucketed.input_bytes() == 0
    recorder.refuses = refuses
    bucketed.capture(thorough=False)
    assert torch.equal(bucketed.run(torch.ones(3, 4)), torch.full((3, 4), 2.0))
    assert recorder.replayed == [1, 3]


class AllocatorOfTorch:
    """What torch's allocator and its graphs demand of each other, without a GPU: a pool that was used and has no graph
    left is no more, and while a capture is under way in one, no other begins."""

    def __init__(self) -> None:
        self.uses: Counter[int] = Counter()
        self.used: set[int] = set()
        self.capturing: set[int] = set()
        self.fails = False
        handles = itertools.count()
        allocator = self

        class Graph:
            def capture_begin(self, pool: int, capture_error_mode: str) -> None:
                assert capture_error_mode == "thread_local"
                assert not allocator.capturing
                assert pool not in allocator.used or allocator.uses[pool] > 0
                allocator.used.add(pool)
                allocator.uses[pool] += 1
                allocator.capturing.add(pool)
                self._pool = pool
                weakref.finalize(self, allocator.uses.subtract, [pool])

            def capture_end(self) -> None:
                if allocator.fails:
                    allocator.fails = False
                    raise RuntimeError("operation failed due to a previous error during capture")
                allocator.capturing.remove(self._pool)
                warnings.warn("The CUDA Graph is empty. This usually means ...", stacklevel=1)

        self.torch = SimpleNamespace(
            inference_mode=contextlib.nullcontext,
            cuda=SimpleNamespace(
                CUDAGraph=Graph,
                Stream=object,
                stream=contextlib.nullcontext,
                current_device=lambda: 0,
                graph_pool_handle=lambda: next(handles),
            ),
            _C=SimpleNamespace(_cuda_endAllocateToPool=lambda device, pool: allocator.capturing.remove(pool)),
        )


def test_the_pool_of_graphs_outlives_the_last_of_them() -> None:
    allocator = AllocatorOfTorch()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pool = GraphPool(allocator.torch)
    for _ in range(2):
        with pytest.warns(UserWarning, match="is empty"):  # a user's own empty graph is still told
            graph, outputs = pool.capture(lambda: 7)
        assert outputs == 7
        del graph
    assert len(allocator.used) == 1


@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
@pytest.mark.parametrize("work_raises", [True, False])
def test_a_capture_that_fails_leaves_the_next_one_a_pool(work_raises: bool) -> None:
    allocator = AllocatorOfTorch()
    pool = GraphPool(allocator.torch)
    before, _ = pool.capture(lambda: None)

    def work() -> None:
        if work_raises:
            raise ValueError("waits for a value")

    for fails in (True, False):
        allocator.fails = fails
        if work_raises or fails:
            with pytest.raises(ValueError if work_raises else RuntimeError, match=r"waits|previous error"):
                pool.capture(work)
        pool.capture(lambda: None)
    assert len(allocator.used) == 2
    del before, pool
    assert not any(allocator.uses.values())


class Tied(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(4, 4, bias=False)
        self.second = torch.nn.Linear(4, 4, bias=False)
        self.second.weight = self.first.weight
        self.register_buffer("shift", torch.rand(4))
        self.recurrent = torch.nn.GRU(4, 4, batch_first=True)

    def forward(self, x: Any) -> Any:
        return self.recurrent((self.second(self.first(x)) + self.shift)[:, None])[0]


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("kind", ["module", "script", "export"])
def test_weights_change_places_under_the_module(kind: str) -> None:
    example = torch.rand(2, 4)
    module: Any = Tied().eval()
    with torch.inference_mode():
        expected = module(example)
    if kind == "script":
        module = torch.jit.trace(module, example)
    elif kind == "export":
        module = torch.export.export(module, (example,)).module()
    weights = Weights(module, pin=False)
    tensors = [*module.parameters(), *module.buffers()]
    at_home = [tensor.data_ptr() for tensor in tensors]
    assert weights.nbytes(512) >= weights.nbytes() > 0
    for _ in range(2):
        weights.to_device("cpu")
        assert not set(at_home) & {tensor.data_ptr() for tensor in tensors}
        with torch.inference_mode():
            assert torch.allclose(module(example), expected)
        weights.to_host()
        assert [tensor.data_ptr() for tensor in tensors] == at_home
    if kind == "module":
        assert module.first.weight is module.second.weight
        assert weights.nbytes() == (16 + 4 + 2 * (48 + 12)) * 4
