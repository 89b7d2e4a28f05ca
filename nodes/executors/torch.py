"""The ``torch`` executor: a module made by a factory, a TorchScript file or a torch.export file."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import numpy as np

from nodes.executors.arrays import as_arrays
from nodes.executors.base import MissingExtra
from pipelines.usercode import load_object

log = logging.getLogger(__name__)


class TorchModel:
    """Options of a factory are its keyword arguments; a file takes none.

    An array is passed to the module as its argument, a dict of arrays as keyword arguments. The module
    returns a tensor, or a tuple or dict of tensors, each with one row an element.
    """

    def __init__(self, source: str | Path, root: str, device: str, options: dict[str, Any]) -> None:
        if isinstance(source, Path) and options:
            raise ValueError(f"a torch file takes no options, and {', '.join(sorted(options))} is given")
        self._source = source
        self._root = root
        self._device = device
        self._options = options
        self._torch: Any = None
        self._module: Any = None

    def hold(self) -> None:
        try:
            import torch
        except ImportError as error:
            raise MissingExtra("torch", "torch", "torch") from error
        self._torch = torch
        if self._device == "cuda" and not torch.cuda.is_available():
            log.warning("torch sees no CUDA device, %s runs on the CPU", self._source)
            self._device = "cpu"
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))

    def load(self) -> None:
        self._module = self._file(self._source) if isinstance(self._source, Path) else self._made(self._source)

    def _made(self, reference: str) -> Any:
        module = load_object(reference, self._root)(**self._options)
        if not isinstance(module, self._torch.nn.Module):
            raise TypeError(f"{reference} returned a {type(module).__name__}; return a torch.nn.Module")
        return module.eval().to(self._device)

    def _file(self, file: Path) -> Any:
        if file.suffix == ".pt2":
            return self._torch.export.load(file).module().to(self._device)
        return self._torch.jit.load(str(file), map_location=self._device).eval()

    def prepare(self, feed: Any) -> Any:
        return as_arrays(feed)

    def upload(self, feeds: Any) -> Any:
        if isinstance(feeds, dict):
            return {name: self._tensor(feed) for name, feed in feeds.items()}
        return self._tensor(feeds)

    def run(self, uploaded: Any) -> Any:
        with self._torch.inference_mode():
            outputs = self._module(**uploaded) if isinstance(uploaded, dict) else self._module(uploaded)
        if self._device == "cuda":
            self._torch.cuda.synchronize()
        return outputs

    def download(self, outputs: Any) -> Any:
        return self._arrays(outputs)

    def unload(self) -> None:
        self._module = None
        if self._device == "cuda":
            self._torch.cuda.empty_cache()

    def release(self) -> None:
        pass

    def memory_mb(self) -> float:
        return 0.0

    def _tensor(self, feed: Any) -> Any:
        tensor = (
            feed if isinstance(feed, self._torch.Tensor) else self._torch.from_numpy(np.require(feed, requirements="W"))
        )
        return tensor.to(self._device)

    def _arrays(self, outputs: Any) -> Any:
        if isinstance(outputs, self._torch.Tensor):
            if outputs.dtype == self._torch.bfloat16:
                outputs = outputs.float()
            return outputs.cpu().numpy()
        if isinstance(outputs, (tuple, list)):
            return tuple(self._arrays(output) for output in outputs)
        if isinstance(outputs, dict):
            return {name: self._arrays(output) for name, output in outputs.items()}
        raise ValueError(
            f"the module returned a {type(outputs).__name__}; return a tensor, or a tuple or dict of tensors"
        )
