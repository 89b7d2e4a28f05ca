"""Sessions of ONNX Runtime in one worker process, which share one arena for each kind of memory."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

_ERRORS_AND_UP = 3
_WEIGHTS = "weights"
_CUDA = "CUDAExecutionProvider"
# The default searches exhaustively for the best convolution whenever a shape is new.
_CUDA_OPTIONS = {"device_id": "0", "cudnn_conv_algo_search": "HEURISTIC", "arena_extend_strategy": "kSameAsRequested"}


def cuda_available(ort: Any) -> bool:
    """Whether this ONNX Runtime (the module ``onnxruntime``) can use a GPU."""
    return _CUDA in ort.get_available_providers()


class HeldModel(NamedTuple):
    """A model in host memory: all that a session is made of."""

    graph: bytes
    """The optimised model, without its larger weights."""
    weights: bytes
    """These; empty where it has none."""


def hold_model(ort: Any, file: Path, cuda: bool) -> tuple[Any, HeldModel]:
    """A session of a model file on the CPU, to look at, and the optimised model, with what lay beside the file.

    For a GPU only what holds for every provider is optimised.
    """
    levels = ort.GraphOptimizationLevel
    options = _options(ort, 1, levels.ORT_ENABLE_BASIC if cuda else levels.ORT_ENABLE_ALL)
    options.add_session_config_entry("session.optimized_model_external_initializers_file_name", _WEIGHTS)
    options.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", "1024")
    with tempfile.TemporaryDirectory(prefix="laxity-onnx-") as directory:
        graph, weights = Path(directory, "model.onnx"), Path(directory, _WEIGHTS)
        options.optimized_model_filepath = str(graph)
        session = ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        return session, HeldModel(graph.read_bytes(), weights.read_bytes() if weights.exists() else b"")


def new_session(ort: Any, model: HeldModel, threads: int, cuda: bool) -> Any:
    """A session of a held model, which must outlive it."""
    levels = ort.GraphOptimizationLevel
    options = _options(ort, threads, levels.ORT_ENABLE_ALL if cuda else levels.ORT_DISABLE_ALL)
    if model.weights:
        options.add_external_initializers_from_files_in_memory([_WEIGHTS], [model.weights], [len(model.weights)])
    _share_arena(ort, cuda)
    options.add_session_config_entry("session.use_env_allocators", "1")
    providers: list[Any] = ["CPUExecutionProvider"]
    if cuda:
        providers.insert(0, (_CUDA, _CUDA_OPTIONS))
    return ort.InferenceSession(model.graph, options, providers=providers)


def run_options(ort: Any, cuda: bool) -> Any:
    """On a CPU the arena gives back after each run what it grew by. Without an arena a large batch takes twice as long
    (its pages are faulted in again and again), and one that only grows keeps gigabytes. On a GPU, giving back would
    stall the device."""
    options = ort.RunOptions()
    if not cuda:
        options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
    return options


def _options(ort: Any, threads: int, level: Any) -> Any:
    options = ort.SessionOptions()
    options.log_severity_level = _ERRORS_AND_UP
    options.graph_optimization_level = level
    # A memory plan is kept for every shape that ever came; shapes of pictures and lines do not end.
    options.enable_mem_pattern = False
    options.inter_op_num_threads = 1
    options.intra_op_num_threads = threads
    # With more than one thread each session has a pool. (The one pool for all that the Python API knows would refuse
    # every other session in this process, those of users' own code among them.) Threads that spin between operators
    # would take the host's cores from the next model's.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


@functools.cache
def _share_arena(ort: Any, cuda: bool) -> None:
    """One arena for all sessions: one batch runs at a time, so what one needs for it another can use next."""
    kind, place = ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, ort.OrtMemType.DEFAULT
    ort.create_and_register_allocator(ort.OrtMemoryInfo("Cpu", kind, 0, place), None)
    if cuda:
        ort.create_and_register_allocator_v2(_CUDA, ort.OrtMemoryInfo("Cuda", kind, 0, place), _CUDA_OPTIONS, None)
