"""The ``torch`` executor on a module, a TorchScript file and a torch.export file."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from executing import run_batch

from nodes.executors.base import Executor, ItemError
from nodes.executors.build import build_executor
from pipelines.spec import PipelineSpec

torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'laxity[torch]'")

CODE = """
import torch

class Halves(torch.nn.Module):
    def __init__(self, by=2.0):
        super().__init__()
        self.by = by
        self.dropout = torch.nn.Dropout(0.9)
    def forward(self, x):
        assert not torch.is_grad_enabled()
        return self.dropout(x) / self.by

class Sums(torch.nn.Module):
    def forward(self, a, b):
        return {"total": a + b, "pair": (a, b)}

class Brain(torch.nn.Module):
    def forward(self, x):
        return x.to(torch.bfloat16)

class Silly(torch.nn.Module):
    def forward(self, x):
        return 7

class Picture(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.convolution = torch.nn.Conv2d(3, 8, 3)
    def forward(self, x):
        return self.convolution(x).relu()

class Threads(torch.nn.Module):
    def forward(self, x):
        return torch.full((len(x),), torch.get_num_threads())

class Waits(torch.nn.Module):
    def forward(self, x):
        return x * 2 if x.sum().item() > 0 else x

def no_module():
    return 3
"""


def build(tmp_path: Path, model: str, device: str = "cpu", **stage: Any) -> Executor:
    (tmp_path / "torch_code.py").write_text(CODE)
    stages = {"s": {"executor": "torch", "model": model, **stage}}
    spec = {"name": "p", "slo": 1.0, "stages": stages, "output": "s", "root": str(tmp_path)}
    executor = build_executor(msgspec.convert(spec, PipelineSpec), "s", device)
    executor.hold()
    executor.load()
    return executor


def test_a_factory_with_options_runs_in_evaluation_mode(tmp_path: Path) -> None:
    answers = run_batch(
        build(tmp_path, "torch_code:Halves", options={"arguments": {"by": 4.0}}), [np.ones(2, np.float32)] * 2
    )
    assert [answer.tolist() for answer in answers] == [[0.25, 0.25]] * 2


def test_a_read_only_array_is_taken(tmp_path: Path) -> None:
    array = np.frombuffer(np.full(2, 8, np.float32).tobytes(), np.float32)
    assert run_batch(build(tmp_path, "torch_code:Halves"), [array])[0].tolist() == [4, 4]


def test_a_dict_becomes_keyword_arguments_and_nested_outputs_are_split(tmp_path: Path) -> None:
    feeds = [{"a": np.full(1, n, np.float32), "b": np.ones(1, np.float32)} for n in (1, 2)]
    answers = run_batch(build(tmp_path, "torch_code:Sums"), feeds)
    assert [answer["total"].tolist() for answer in answers] == [[2], [3]]
    assert [part.tolist() for part in answers[1]["pair"]] == [[2], [1]]


def test_bfloat16_comes_back_as_float32(tmp_path: Path) -> None:
    (answer,) = run_batch(build(tmp_path, "torch_code:Brain"), [np.ones(2, np.float32)])
    assert answer.dtype == np.float32


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_torchscript_and_export_files(tmp_path: Path) -> None:
    module = torch.nn.Linear(2, 1)
    example = torch.ones(4, 2)
    with torch.inference_mode():
        expected = module(example).numpy()
    torch.jit.trace(module, example).save(str(tmp_path / "m.pt"))
    dynamic = ({0: torch.export.Dim("batch")},)
    torch.export.save(torch.export.export(module, (example,), dynamic_shapes=dynamic), tmp_path / "m.pt2")
    for file in ("m.pt", "m.pt2"):
        answers = run_batch(build(tmp_path, file), list(np.ones((3, 2), np.float32)))
        np.testing.assert_allclose(np.stack(answers), expected[:3], rtol=1e-6)


def test_what_is_no_module_or_no_tensor(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="torch_code:no_module returned a int"):
        build(tmp_path, "torch_code:no_module")
    with pytest.raises(ValueError, match="the module returned a int; return a tensor"):
        run_batch(build(tmp_path, "torch_code:Silly"), [np.ones(1)])
    (answer,) = run_batch(build(tmp_path, "torch_code:Silly"), ["text"])
    assert isinstance(answer, ItemError)


def test_options_are_checked(tmp_path: Path) -> None:
    (tmp_path / "m.pt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"'arguments' are given to a factory, and m\.pt is a file"):
        build(tmp_path, "m.pt", options={"arguments": {"by": 1}})
    with pytest.raises(ValueError, match="the executor 'torch' has no option 'by'; it has 'arguments', 'autocast'"):
        build(tmp_path, "torch_code:Halves", options={"by": 1})
    for options, says in (
        ({"graphs": "maybe"}, "the option 'graphs' of the executor 'torch': .*, not 'maybe'"),
        ({"autocast": "float32"}, "the option 'autocast' .*, not 'float32'"),
        ({"threads": 0}, "the option 'threads' .* >= 1, not 0"),
    ):
        with pytest.raises(ValueError, match=says):
            build(tmp_path, "torch_code:Halves", options=options)


def test_graphs_are_captured_with_a_sample_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def describe(**stage: Any) -> PipelineSpec:
        stages = {"s": {"executor": "torch", "model": "torch_code:Picture", **stage}}
        spec = {"name": "p", "slo": 1.0, "stages": stages, "output": "s", "root": str(tmp_path)}
        return msgspec.convert(spec, PipelineSpec)

    with pytest.raises(ValueError, match="'graphs: true' needs the stage's 'sample'"):
        build_executor(describe(options={"graphs": True}), "s", "cuda")
    for device, stage in (
        ("cpu", {}),
        ("cuda", {"options": {"graphs": False}}),
        ("cuda", {"sample": "torch_code:picture"}),
        ("cuda", {"sample": "torch_code:picture", "options": {"graphs": True}}),
    ):
        build_executor(describe(**stage), "s", device)
    assert caplog.messages == []
    build_executor(describe(), "s", "cuda")
    assert caplog.messages == [
        "torch_code:Picture runs without CUDA graphs: the stage has no 'sample' to capture them with"
    ]


def test_paged_out_and_in_again_on_a_cpu(tmp_path: Path) -> None:
    executor = build(tmp_path, "torch_code:Picture")
    assert executor.memory_mb() == pytest.approx((8 * 3 * 9 + 8) * 4 / 2**20)
    feed = np.ones((3, 8, 8), np.float32)
    (before,) = run_batch(executor, [feed])
    executor.unload()
    executor.load()
    np.testing.assert_array_equal(run_batch(executor, [feed])[0], before)


def test_channels_last_and_autocast_answer_alike(tmp_path: Path) -> None:
    feed = np.random.default_rng(0).random((3, 8, 8), np.float32)
    (plain,) = run_batch(build(tmp_path, "torch_code:Picture"), [feed])
    (laid_out,) = run_batch(build(tmp_path, "torch_code:Picture", options={"channels_last": True}), [feed])
    np.testing.assert_allclose(laid_out, plain, rtol=1e-5, atol=1e-6)
    (cast,) = run_batch(build(tmp_path, "torch_code:Picture", options={"autocast": "bfloat16"}), [feed])
    np.testing.assert_allclose(cast, plain, rtol=0.05, atol=0.05)
    assert np.abs(cast - plain).max() > 1e-5


def test_threads_are_set_where_the_batch_runs(tmp_path: Path) -> None:
    executors = [build(tmp_path, "torch_code:Threads", options={"threads": threads}) for threads in (1, 2)]
    with ThreadPoolExecutor(1) as lane:
        for executor, threads in zip(executors * 2, (1, 2) * 2, strict=True):
            (answer,) = lane.submit(run_batch, executor, [np.zeros(1, np.float32)]).result()
            assert answer == threads


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch can use")
@pytest.mark.parametrize("options", [{"graphs": True}, {"graphs": False}, {"graphs": True, "channels_last": True}])
def test_on_a_gpu(tmp_path: Path, options: dict[str, Any]) -> None:
    feeds = list(np.random.default_rng(0).random((5, 3, 8, 8), np.float32))
    expected = run_batch(build(tmp_path, "torch_code:Picture"), feeds)
    sample = "torch_code:picture"  # what is named here is run by the worker
    executor = build(tmp_path, "torch_code:Picture", "cuda", max_batch=8, sample=sample, options=options)
    for size in (5, 1, 3):
        answers = run_batch(executor, feeds[:size])
        np.testing.assert_allclose(np.stack(answers), np.stack(expected[:size]), rtol=1e-3, atol=1e-3)
    assert executor.memory_mb() > 0
    executor.unload()
    executor.load()
    np.testing.assert_allclose(np.stack(run_batch(executor, feeds)), np.stack(expected), rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch can use")
def test_what_cannot_be_captured_runs_plainly_on_a_gpu(tmp_path: Path) -> None:
    feed = np.ones(2, np.float32)
    sample = "torch_code:two"
    (answer,) = run_batch(build(tmp_path, "torch_code:Waits", "cuda", sample=sample), [feed])
    assert answer.tolist() == [2, 2]
    with pytest.raises(RuntimeError, match="cannot be captured"):
        run_batch(build(tmp_path, "torch_code:Waits", "cuda", sample=sample, options={"graphs": True}), [feed])
