"""A torch module on a GPU: streams of its own for inputs, execution, outputs and weights, and CUDA graphs.

What is said here about threads and streams holds together: each lane's thread waits for its own stream alone before it
returns, so memory may pass from one stream to the next without events, and no lane waits for another's work.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from nodes.executors.cuda_graphs import BucketGraphs, Mode
from nodes.executors.torch_modules import Weights, map_tensors, to_arrays

log = logging.getLogger(__name__)

DEVICE_LOST = 71
"""The status with which the worker exits when its GPU refuses everything."""
_ALLOCATION = 512
"""What torch's allocator rounds up to."""


def set_up_allocator() -> None:
    """Before torch is first used: have the allocator grow segments in place. With whole segments alone, weights that
    come and go leave holes, and what then fits nowhere makes it give all it has back to the driver, which waits for the
    whole device."""
    if "PYTORCH_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")


class _Streams:
    """What the models of one worker share on its device."""

    def __init__(self, torch: Any) -> None:
        self.weights = torch.cuda.Stream()
        self.inputs = torch.cuda.Stream()
        # A higher priority than the kernels of another lane (casts, layouts).
        self.execution = torch.cuda.Stream(priority=-1)
        self.outputs = torch.cuda.Stream()
        self.graphs = GraphPool(torch)


class GraphPool:
    """Memory of all graphs of a worker: one executes at a time, and its outputs are copied out of it."""

    def __init__(self, torch: Any) -> None:
        self._torch = torch
        self._stream = torch.cuda.Stream()
        """It never runs anything: what a library keeps for a stream to work in belongs to the graphs alone."""
        self._renew()

    def capture(self, work: Callable[[], Any]) -> tuple[Any, Any]:
        """(graph, what ``work`` returned). ``torch.cuda.graph`` would empty the allocator's cache and wait for the
        whole device, and allow no other thread to use it."""
        torch = self._torch
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self._stream), torch.inference_mode():
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                outputs = work()
            except BaseException:
                with contextlib.suppress(RuntimeError):  # it says once more that the capture failed
                    self._end(graph)
                raise
            self._end(graph)
        return graph, outputs

    def _end(self, graph: Any) -> None:
        try:
            graph.capture_end()
        except RuntimeError:
            # The allocator still takes what is allocated there for a part of this capture, and lets no other begin.
            with contextlib.suppress(RuntimeError):
                self._torch._C._cuda_endAllocateToPool(self._torch.cuda.current_device(), self._pool)
            self._renew()
            raise

    def _renew(self) -> None:
        """A pool ends with its last graph, and cannot be captured into after that: an empty graph keeps it."""
        cuda = self._torch.cuda
        self._pool = cuda.graph_pool_handle()
        self._keeper = cuda.CUDAGraph()
        with warnings.catch_warnings(), cuda.stream(self._stream):
            warnings.filterwarnings("ignore", message="The CUDA Graph is empty")
            self._keeper.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            self._keeper.capture_end()


@functools.cache
def _streams(torch: Any) -> _Streams:
    """A process has one GPU, and its streams live as long as it does."""
    return _Streams(torch)


@contextlib.contextmanager
def _using_device(stream: Any) -> Iterator[None]:
    """Ends the process where what is done leaves its GPU unusable: after a failed assertion or a wrong address in a
    kernel every later call fails, of other models too, and only another process can use the GPU again. The agent
    starts one."""
    try:
        yield
    except Exception as error:
        try:
            stream.synchronize()
        except Exception:
            log.critical("the GPU refuses everything from now on, the worker ends", exc_info=error)
            os._exit(DEVICE_LOST)
        raise


class _GraphRecorder:
    def __init__(self, torch: Any, pool: GraphPool) -> None:
        self._torch = torch
        self._pool = pool

    def warm_up(self, work: Callable[[], Any]) -> None:
        work()
        self._torch.cuda.current_stream().synchronize()

    def capture(self, work: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        graph, outputs = self._pool.capture(work)
        return graph.replay, outputs


class CudaModule:
    """A module whose weights are page-locked on the host while it is held, and on the GPU while it is loaded.

    ``upload``, ``run`` and ``download`` each wait for their own stream.
    """

    def __init__(
        self,
        torch: Any,
        module: Any,
        call: Callable[[Any], Any],
        *,
        graphs: Mode,
        channels_last: bool,
        max_batch: int,
        name: str,
    ) -> None:
        self._torch = torch
        self._call = call
        self._channels_last = channels_last
        self._streams = _streams(torch)
        self._weights = Weights(module, pin=True)
        recorder = _GraphRecorder(torch, self._streams.graphs)
        self._graphs = BucketGraphs(torch, call, recorder, max_batch, graphs, name, self._new_input)
        self._largest = 0
        self._working_bytes = 0

    def load(self) -> None:
        """Copy the weights; graphs hold the addresses of weights, and are captured anew."""
        with _using_device(self._streams.weights), self._torch.cuda.stream(self._streams.weights):
            self._weights.to_device("cuda")
            self._streams.weights.synchronize()
            self._graphs.capture(thorough=False)

    def unload(self) -> None:
        """The weights' memory goes back to torch's allocator, for this worker's other models, and that of the graphs
        to their pool, where other graphs alone find it; what goes back to the driver would make the device wait."""
        self._graphs.forget()
        self._weights.to_host()

    def memory_mb(self) -> float:
        """Weights, the graphs' inputs, and the most that a run had under way so far."""
        return (self._weights.nbytes(_ALLOCATION) + self._graphs.input_bytes() + self._working_bytes) / 2**20

    def upload(self, feeds: Any) -> Any:
        with self._on(self._streams.inputs):
            if isinstance(feeds, dict):
                sent = {name: self._sent(feed) for name, feed in feeds.items()}
            else:
                sent = self._sent(feeds)
            self._streams.inputs.synchronize()
        return sent

    def run(self, uploaded: Any) -> Any:
        with self._on(self._streams.execution):
            size = max(tensor.nbytes for tensor in (uploaded.values() if isinstance(uploaded, dict) else [uploaded]))
            outputs = self._measured(uploaded) if size > self._largest else self._graphs.run(uploaded)
            self._streams.execution.synchronize()
        self._largest = max(self._largest, size)
        return outputs

    def download(self, outputs: Any) -> Any:
        with self._on(self._streams.outputs):
            host = map_tensors(self._torch, outputs, self._fetched)
            self._streams.outputs.synchronize()
        return to_arrays(self._torch, host)

    @contextlib.contextmanager
    def _on(self, stream: Any) -> Iterator[None]:
        torch = self._torch
        with _using_device(stream), torch.inference_mode(), torch.cuda.stream(stream):
            yield

    def _measured(self, uploaded: Any) -> Any:
        """A run larger than all before, and what memory it had under way."""
        cuda = self._torch.cuda
        before = cuda.memory_allocated()
        cuda.reset_peak_memory_stats()
        outputs = self._graphs.run(uploaded)
        self._working_bytes = max(self._working_bytes, cuda.max_memory_allocated() - before)
        return outputs

    def _sent(self, feed: Any) -> Any:
        """By way of page-locked memory, of which torch keeps what was used before."""
        if isinstance(feed, self._torch.Tensor):
            staged = self._torch.empty(feed.shape, dtype=feed.dtype, pin_memory=True).copy_(feed)
        else:
            kind = self._torch.from_numpy(np.empty(0, feed.dtype)).dtype
            staged = self._torch.empty(feed.shape, dtype=kind, pin_memory=True)
            np.copyto(staged.numpy(), feed)
        return self._laid_out(staged.to("cuda", non_blocking=True))

    def _fetched(self, tensor: Any) -> Any:
        host = self._torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return host.copy_(tensor, non_blocking=True)

    def _new_input(self, shape: tuple[int, ...], dtype: Any) -> Any:
        with self._torch.inference_mode():
            return self._laid_out(self._torch.zeros(shape, dtype=dtype, device="cuda"))

    def _laid_out(self, tensor: Any) -> Any:
        if self._channels_last and tensor.dim() == 4:
            return tensor.contiguous(memory_format=self._torch.channels_last)
        return tensor
