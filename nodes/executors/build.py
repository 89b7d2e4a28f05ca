"""From a stage of a spec to the executor that runs it."""

from __future__ import annotations

from nodes.executors.base import Executor
from nodes.executors.onnx import OnnxModel
from nodes.executors.python import PythonModel
from nodes.executors.steps import StageExecutor, stack, together
from nodes.executors.torch import TorchModel
from nodes.executors.triton import TritonModel
from pipelines.models import is_model_file, resolve_model_file
from pipelines.spec import PipelineSpec


def build_executor(spec: PipelineSpec, stage: str, device: str) -> Executor:
    """The executor of ``stage`` on ``device`` ('cpu' or 'cuda'), not loaded yet.

    Raises ValueError for a stage that no worker can run, and what finding the model's file raises.
    """
    what = spec.stages[stage]
    if what.executor == "emulated":
        raise ValueError(f"the stage {stage!r} is emulated: that runs inside the agent, not in a worker")
    if what.model is None:
        raise ValueError(f"the stage {stage!r} has no model; an {what.executor!r} stage needs one")
    if what.executor == "python":
        return StageExecutor(what, spec.root, PythonModel(what.model, spec.root, what.options), together)
    if what.executor == "onnx":
        onnx = OnnxModel(resolve_model_file(spec, stage), device, what.options, what.max_batch)
        return StageExecutor(what, spec.root, onnx, stack)
    if what.executor == "triton":
        return StageExecutor(what, spec.root, TritonModel(what.model, device, what.options, what.max_batch), stack)
    source = resolve_model_file(spec, stage) if is_model_file(what) else what.model
    has_sample = what.sample is not None
    torch = TorchModel(source, spec.root, device, what.options, what.max_batch, has_sample)
    return StageExecutor(what, spec.root, torch, stack)
