"""A torch module called with batched feeds, and its weights on the host and on a GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any


def forward(torch: Any, module: Any, device: str, autocast: str | None) -> Callable[[Any], Any]:
    """Calls the module with a tensor, or with a dict of tensors as keyword arguments, in inference mode."""
    dtype = getattr(torch, autocast) if autocast else None

    def call(feeds: Any) -> Any:
        # Its cache would keep weights' casts beyond what is measured, and a graph cannot be captured with it.
        cast = torch.autocast(device, dtype, cache_enabled=False) if dtype else contextlib.nullcontext()
        with torch.inference_mode(), cast:
            return module(**feeds) if isinstance(feeds, dict) else module(feeds)

    return call


def map_tensors(torch: Any, nested: Any, change: Callable[[Any], Any]) -> Any:
    """What a module returned, a tensor or tuples, lists and dicts of such, with each tensor changed; lists become
    tuples. ValueError for anything else."""
    if isinstance(nested, torch.Tensor):
        return change(nested)
    if isinstance(nested, (tuple, list)):
        return tuple(map_tensors(torch, each, change) for each in nested)
    if isinstance(nested, dict):
        return {name: map_tensors(torch, each, change) for name, each in nested.items()}
    raise ValueError(f"the module returned a {type(nested).__name__}; return a tensor, or a tuple or dict of tensors")


def cloned(torch: Any, nested: Any) -> Any:
    """What a module returned, in memory of its own: a module may return a buffer (or its input), and write to it anew
    when the next batch executes, while this one's answers are still read."""
    with torch.inference_mode():
        return map_tensors(torch, nested, lambda tensor: tensor.clone())


def to_arrays(torch: Any, nested: Any) -> Any:
    """Tensors in host memory as arrays of the same memory; bfloat16, which numpy does not know, as float32."""

    def array(tensor: Any) -> Any:
        return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()

    return map_tensors(torch, nested, array)


class Weights:
    """The parameters and buffers of a module. They change places without the module's being built again: it keeps its
    tensors, whose memory is exchanged."""

    def __init__(self, module: Any, pin: bool) -> None:
        """Takes them to host memory, page-locked with ``pin``: a GPU fetches them from there at the link's rate."""
        tensors = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
        self._module = module
        self._places: list[tuple[Any, Any]] = []
        for tensor in tensors.values():
            host = tensor.detach().to("cpu")
            self._places.append((tensor, host.pin_memory() if pin else host))
        self.to_host()

    def nbytes(self, step: int = 1) -> int:
        """How many bytes they are, each tensor rounded up to a multiple of ``step``."""
        return sum(-(-host.nbytes // step) * step for _, host in self._places)

    def to_device(self, device: str) -> None:
        """Copy them, asynchronously from page-locked memory."""
        for tensor, host in self._places:
            tensor.data = host.to(device, non_blocking=True, copy=True)
        for module in self._module.modules():
            # Recurrent layers want their weights in one piece of memory.
            flatten = getattr(module, "flatten_parameters", None)
            if flatten is not None:
                flatten()

    def to_host(self) -> None:
        """Let go of the device's copies; nothing is copied back, for nothing changes them."""
        for tensor, host in self._places:
            tensor.data = host
