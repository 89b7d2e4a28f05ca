"""The ``torch`` executor: a module made by a factory, a TorchScript file or a torch.export file."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import msgspec
import numpy as np
from msgspec import Meta

from nodes.executors.arrays import as_arrays
from nodes.executors.base import MissingExtra
from nodes.executors.options import device_threads, read_options
from nodes.executors.torch_cuda import CudaModule, set_up_allocator
from nodes.executors.torch_modules import Weights, cloned, forward, to_arrays
from pipelines.usercode import load_object

log = logging.getLogger(__name__)


class TorchOptions(msgspec.Struct, frozen=True, kw_only=True):
    """A stage's ``options``."""

    arguments: dict[str, Any] = {}
    """Keyword arguments of the factory."""
    threads: Annotated[int, Meta(ge=1)] | None = None
    """How many threads an operator uses on the host: by default the device's share."""
    graphs: Literal["auto"] | bool = "auto"
    """On a GPU, whether batches are captured as CUDA graphs: where the module allows it, always, or never."""
    channels_last: bool = False
    """Lay pictures (and the weights of convolutions) out with the channels last."""
    autocast: Literal["float16", "bfloat16"] | None = None
    """Run what gains by it in this type."""


class TorchModel:
    """An array is passed to the module as its argument, a dict of arrays as keyword arguments. The module returns a
    tensor, or a tuple or dict of tensors, each with one row an element; the rows must not depend on each other."""

    def __init__(
        self,
        source: str | Path,
        root: str,
        device: str,
        options: dict[str, Any],
        max_batch: int,
        has_sample: bool,
    ) -> None:
        self._options = read_options("torch", options, TorchOptions)
        if isinstance(source, Path) and self._options.arguments:
            raise ValueError(f"'arguments' are given to a factory, and {source.name} is a file")
        if self._options.graphs is True and not has_sample:
            raise ValueError("'graphs: true' needs the stage's 'sample': graphs are captured with its shapes")
        self._graphs = self._options.graphs if has_sample else False
        if device == "cuda" and self._options.graphs and not has_sample:
            log.warning("%s runs without CUDA graphs: the stage has no 'sample' to capture them with", source)
        self._source = source
        self._root = root
        self._device = device
        self._max_batch = max_batch
        self._threads = self._options.threads or device_threads()
        self._torch: Any = None
        self._module: _Module | None = None

    def hold(self) -> None:
        if self._device == "cuda":
            set_up_allocator()
        try:
            import torch
        except ImportError as error:
            raise MissingExtra("torch", "torch", "torch") from error
        self._torch = torch
        if self._device == "cuda" and not torch.cuda.is_available():
            log.warning("torch sees no CUDA device, %s runs on the CPU", self._source)
            self._device = "cpu"
        options = self._options
        module = self._file(self._source) if isinstance(self._source, Path) else self._made(self._source)
        if options.channels_last:
            module = module.to(memory_format=torch.channels_last)
        call = forward(torch, module, self._device, options.autocast)
        if self._device == "cuda":
            self._module = CudaModule(
                torch,
                module,
                call,
                graphs=self._graphs,
                channels_last=options.channels_last,
                max_batch=self._max_batch,
                name=str(self._source),
            )
        else:
            self._module = _HostModule(torch, module, call, options.channels_last, self._threads)

    def load(self) -> None:
        self._held().load()

    def unload(self) -> None:
        self._held().unload()

    def release(self) -> None:
        self._module = None

    def memory_mb(self) -> float:
        return self._held().memory_mb()

    def prepare(self, feed: Any) -> Any:
        return as_arrays(feed)

    def upload(self, feeds: Any) -> Any:
        return self._held().upload(feeds)

    def run(self, uploaded: Any) -> Any:
        return self._held().run(uploaded)

    def download(self, outputs: Any) -> Any:
        return self._held().download(outputs)

    def _held(self) -> _Module:
        assert self._module is not None, "hold() comes first"
        return self._module

    def _made(self, reference: str) -> Any:
        module = load_object(reference, self._root)(**self._options.arguments)
        if not isinstance(module, self._torch.nn.Module):
            raise TypeError(f"{reference} returned a {type(module).__name__}; return a torch.nn.Module")
        return module.eval()

    def _file(self, file: Path) -> Any:
        """What a file says about devices is rewritten for this one."""
        if file.suffix != ".pt2":
            return self._torch.jit.load(str(file), map_location=self._device).eval()
        from torch.export.passes import move_to_device_pass

        return move_to_device_pass(self._torch.export.load(file), self._device).module()


class _Module(Protocol):
    """A built module on its device; see :class:`nodes.executors.steps.Model`."""

    def load(self) -> None: ...

    def unload(self) -> None: ...

    def memory_mb(self) -> float: ...

    def upload(self, feeds: Any) -> Any: ...

    def run(self, uploaded: Any) -> Any: ...

    def download(self, outputs: Any) -> Any: ...


class _HostModule:
    """A module on the CPU. The host's memory is the device's: holding it takes what running it does, and nothing is
    paged."""

    def __init__(self, torch: Any, module: Any, call: Callable[[Any], Any], channels_last: bool, threads: int) -> None:
        self._torch = torch
        self._call = call
        self._channels_last = channels_last
        self._threads = threads
        self._memory_mb = Weights(module, pin=False).nbytes() / 2**20

    def load(self) -> None:
        pass

    def unload(self) -> None:
        pass

    def memory_mb(self) -> float:
        return self._memory_mb

    def upload(self, feeds: Any) -> Any:
        if isinstance(feeds, dict):
            return {name: self._tensor(feed) for name, feed in feeds.items()}
        return self._tensor(feeds)

    def run(self, uploaded: Any) -> Any:
        # The number is each thread's own; models of one worker may differ in it.
        if self._torch.get_num_threads() != self._threads:
            self._torch.set_num_threads(self._threads)
        return cloned(self._torch, self._call(uploaded))

    def download(self, outputs: Any) -> Any:
        return to_arrays(self._torch, outputs)

    def _tensor(self, feed: Any) -> Any:
        if not isinstance(feed, self._torch.Tensor):
            feed = self._torch.from_numpy(np.require(feed, requirements="W"))
        if self._channels_last and feed.dim() == 4:
            return feed.contiguous(memory_format=self._torch.channels_last)
        return feed
