"""The ``triton`` executor: a model of a Triton server, driven over gRPC with ready-made batches.

Queueing and batching are left to Laxity: one batch executes while the next one's input is already written into memory
that is shared with the server, where that is on this host.
"""

from __future__ import annotations

import logging
import os
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from nodes.executors.options import read_options
from nodes.executors.triton_regions import CudaRegion, Region, RegionPool, SystemRegion, sweep
from nodes.executors.triton_server import ModelServer, TritonError, Unanswered
from nodes.executors.triton_tensors import Array, Signature, Tensor

log = logging.getLogger(__name__)

DEFAULT_URL = "localhost:8001"
URL_VARIABLE = "LAXITY_TRITON_URL"
_ALIGNMENT = 64


class TritonOptions(msgspec.Struct, frozen=True, kw_only=True):
    """A stage's ``options``."""

    url: str | None = None
    """HOST:PORT of the server's gRPC service; else the environment's LAXITY_TRITON_URL, else localhost:8001."""
    version: str | int = ""
    """The newest unless given."""
    outputs: Annotated[list[str], Meta(min_length=1)] | None = None
    """The names of those that are asked for: all unless given."""
    timeout: Annotated[float, Meta(gt=0)] = 30.0
    """How many seconds one batch may take."""
    shared_memory: Literal["auto", "system", "cuda", "none"] = "auto"
    """'auto' is 'system' where the server can open what this host shares, else 'none'."""


class TritonModel:
    """A model by its name in the repository of a Triton server.

    A model with one input takes bare arrays, one with several a dict by their names; one output comes back as an
    array, several as a dict by their names.
    """

    def __init__(self, model: str, device: str, options: dict[str, Any], max_batch: int) -> None:
        read = read_options("triton", options, TritonOptions)
        self._url = read.url or os.environ.get(URL_VARIABLE) or DEFAULT_URL
        host, _, port = self._url.rpartition(":")
        if not host or not port.isdigit() or "/" in host:
            raise ValueError(f"the option 'url' must be HOST:PORT of Triton's gRPC service, not {self._url!r}")
        if read.shared_memory == "cuda" and device != "cuda":
            raise ValueError("the option 'shared_memory: cuda' needs a GPU: place the stage on one, or write 'system'")
        self._shared_memory = read.shared_memory
        self._timeout = read.timeout
        self._outputs = read.outputs
        self._version = str(read.version)
        self._model = model
        self._max_batch = max_batch
        self._server: ModelServer | None = None
        self._signature: Signature | None = None
        self._pool: RegionPool | None = None

    def hold(self) -> None:
        server = ModelServer(self._url, self._model, self._version, self._restore)
        try:
            server.check()
        except BaseException:
            server.close()
            raise
        self._server = server

    def load(self) -> None:
        server = self._connected()
        server.load()
        try:
            config = server.config()
            self._signature = Signature(config, self._outputs, self._max_batch)
            if config.HasField("dynamic_batching") and self._pool is None:
                log.warning(
                    "%s has dynamic_batching in its config.pbtxt: remove it. Batches arrive ready-made, and would only "
                    "wait once more in Triton's own queue",
                    self._model,
                )
            if self._pool is None and self._shared_memory != "none":
                self._pool = self._shared(server)
        except BaseException:
            server.unload()
            raise

    def unload(self) -> None:
        self._connected().unload()

    def release(self) -> None:
        if self._pool is not None:
            self._pool.close()
        if self._server is not None:
            self._server.close()
        self._pool = self._server = self._signature = None

    def memory_mb(self) -> float:
        """Unknown: Triton does not say what one model takes."""
        return 0.0

    def prepare(self, feed: Any) -> Any:
        return self._loaded().element(feed)

    def upload(self, feeds: Any) -> _Batch:
        self._connected().wait()
        return _Batch(self._loaded(), self._loaded().batch(feeds), self._pool)

    def run(self, uploaded: _Batch) -> _Batch:
        try:
            uploaded.result = self._connected().infer(uploaded.inputs, uploaded.requested, self._timeout)
        except Unanswered:
            uploaded.retire()
            raise
        return uploaded

    def download(self, outputs: _Batch) -> Any:
        arrays = outputs.answers()
        return next(iter(arrays.values())) if len(arrays) == 1 else arrays

    def _connected(self) -> ModelServer:
        assert self._server is not None, "hold() comes first"
        return self._server

    def _loaded(self) -> Signature:
        assert self._signature is not None, "load() comes first"
        return self._signature

    def _restore(self) -> None:
        if self._pool is not None:
            self._pool.register_all()

    def _shared(self, server: ModelServer) -> RegionPool | None:
        make = _cuda_region if self._shared_memory == "cuda" else SystemRegion
        pool = RegionPool(make, server.client, self._timeout)
        try:
            region = pool.take(1)  # whether the server can open it shows whether it is on this host
            if region is not None:
                pool.give_back(region)
                if self._shared_memory != "cuda":
                    sweep(server.client)
                return pool
            reason = "there is no room in /dev/shm"
        except TritonError as error:
            pool.close()
            reason = str(error)
        if self._shared_memory != "auto":
            raise ValueError(
                f"the Triton server at {self._url} shares no {self._shared_memory} memory with this host ({reason}): "
                "run both as one user with one /dev/shm, or write shared_memory: none"
            )
        log.info("the Triton server at %s gets its tensors over the network: %s", self._url, reason)
        return None


class _Batch:
    """A batch on its way: its inputs in shared memory or in the request itself, and where its outputs are to go.

    The region that it lies in goes back to the pool with it, wherever on the way it is let go of.
    """

    def __init__(self, signature: Signature, arrays: dict[str, Array], pool: RegionPool | None) -> None:
        from tritonclient.grpc import InferInput, InferRequestedOutput

        size = len(next(iter(arrays.values())))
        self._signature = signature
        self._pool = pool
        self._region: Region | None = None
        self._places: dict[str, int] = {}
        """Where in the region each output is to lie that fits there."""
        self.result: Any = None
        self.inputs = []
        self.requested = []
        contents = {name: _content(signature.inputs[name], array) for name, array in arrays.items()}
        ends, offsets = 0, {}
        for name, content in contents.items():
            offsets[name] = ends
            ends = _aligned(ends + content.nbytes)
        rooms = {each.name: size * each_bytes for each in signature.outputs if (each_bytes := each.bytes_each())}
        for name, room in rooms.items():
            self._places[name] = ends
            ends = _aligned(ends + room)
        if pool is not None:
            self._region = pool.take(ends)
        region = self._region
        for name, content in contents.items():
            tensor, array = signature.inputs[name], arrays[name]
            shape = array.shape if signature.batched else array.shape[1:]
            given = InferInput(name, list(shape), tensor.data_type)
            if region is None:
                given.set_data_from_numpy(array.reshape(shape))
            else:
                region.write(offsets[name], content)
                given.set_shared_memory(region.name, content.nbytes, offsets[name])
            self.inputs.append(given)
        for each in signature.outputs:
            wanted = InferRequestedOutput(each.name)
            if region is not None and each.name in rooms:
                wanted.set_shared_memory(region.name, rooms[each.name], self._places[each.name])
            self.requested.append(wanted)

    def answers(self) -> dict[str, Any]:
        """The outputs by their names; the region is given back."""
        arrays = {}
        for each in self._signature.outputs:
            if self._region is not None and each.name in self._places:
                shape = list(self.result.get_output(each.name).shape)
                array = each.from_bytes(self._region.read(self._places[each.name], each.bytes_of(shape)), shape)
            else:
                array = self.result.as_numpy(each.name)
            arrays[each.name] = each.answer(array if self._signature.batched else array[None])
        self._give_back()
        return arrays

    def retire(self) -> None:
        """Nobody knows whether the server still works on it."""
        region, self._region = self._region, None
        if region is not None and self._pool is not None:
            self._pool.retire(region)

    def __del__(self) -> None:
        self._give_back()

    def _give_back(self) -> None:
        region, self._region = self._region, None
        if region is not None and self._pool is not None:
            self._pool.give_back(region)


def _content(tensor: Tensor, array: Array) -> Array:
    """What lies in shared memory: the array itself, texts with their lengths in front."""
    if tensor.data_type != "BYTES":
        return array
    import numpy as np
    from tritonclient.utils import serialize_byte_tensor

    return np.frombuffer(serialize_byte_tensor(array).item(), np.uint8)


def _aligned(offset: int) -> int:
    return -(-offset // _ALIGNMENT) * _ALIGNMENT


def _cuda_region(size: int) -> Region:
    # The server sees all GPUs, this worker only its own one.
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    return CudaRegion(size, int(visible) if visible.isdigit() else 0)
