"""The ``triton`` executor against a real Triton server."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from executing import run_batch
from triton_server import TritonServer, find_tritonserver

from laxity.outcomes import Outcome
from nodes.device import DeviceConfig
from nodes.executors.base import Executor, MissingExtra, Unavailable
from nodes.executors.build import build_executor
from nodes.executors.errors import error_code
from nodes.executors.triton import TritonModel
from nodes.executors.triton_regions import MAX_REGIONS, PREFIX
from nodes.executors.triton_server import ModelServer
from pipelines.spec import PipelineSpec, Profile, StageSpec

pytestmark = pytest.mark.skipif(find_tritonserver() is None, reason="there is no tritonserver (.ci/triton says why)")

SHARED = Path("/dev/shm")
DOUBLE = """
import os, time
import numpy as np
import triton_python_backend_utils as pb

class TritonPythonModel:
    def execute(self, requests):
        return [self.answer(pb.get_input_tensor_by_name(request, "x").as_numpy()) for request in requests]

    def answer(self, x):
        said = int(x.flat[0])
        if said == 666:
            raise ValueError("a poisonous input")
        if said == 667:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")
        if said == 668:
            os._exit(1)
        if said == 669:
            time.sleep(1)
        return pb.InferenceResponse([pb.Tensor("y", x * 2), pb.Tensor("size", np.full((len(x), 1), len(x), np.int64))])
"""
DOUBLE_CONFIG = """
max_batch_size: 8
input [{name: "x" data_type: TYPE_FP32 dims: [3]}]
output [{name: "y" data_type: TYPE_FP32 dims: [3]}, {name: "size" data_type: TYPE_INT64 dims: [1]}]
"""
TYPES = """
import numpy as np
import triton_python_backend_utils as pb

class TritonPythonModel:
    def execute(self, requests):
        responses = []
        for request in requests:
            tensor = lambda name: pb.get_input_tensor_by_name(request, name).as_numpy()
            texts = np.array([[b"<" + each + b">" for each in row] for row in tensor("text")], dtype=object)
            halves = tensor("half")
            turned = tensor("any")[:, ::-1].copy()
            outputs = [pb.Tensor("text", texts), pb.Tensor("half", halves + np.float16(1)), pb.Tensor("any", turned)]
            responses.append(pb.InferenceResponse(outputs))
        return responses
"""
TYPES_CONFIG = """
max_batch_size: 4
input [
  {name: "text" data_type: TYPE_STRING dims: [-1]},
  {name: "half" data_type: TYPE_FP16 dims: [2]},
  {name: "any" data_type: TYPE_INT32 dims: [-1]}
]
output [
  {name: "text" data_type: TYPE_STRING dims: [-1]},
  {name: "half" data_type: TYPE_FP16 dims: [2]},
  {name: "any" data_type: TYPE_INT32 dims: [-1]}
]
"""
ONE = """
import triton_python_backend_utils as pb

class TritonPythonModel:
    def execute(self, requests):
        return [pb.InferenceResponse([pb.Tensor("y", pb.get_input_tensor_by_name(each, "x").as_numpy() + 1)])
                for each in requests]
"""
ONE_CONFIG = """
max_batch_size: 0
input [{name: "x" data_type: TYPE_FP64 dims: [2]}]
output [{name: "y" data_type: TYPE_FP64 dims: [2]}]
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    """One server for all tests, whose models their clients load."""
    with TritonServer(tmp_path_factory.mktemp("triton")) as server:
        server.add("double", DOUBLE_CONFIG, DOUBLE)
        server.add("types", TYPES_CONFIG, TYPES)
        server.add("one", ONE_CONFIG, ONE)
        server.add("paged", ONE_CONFIG, ONE)
        server.add("broken", DOUBLE_CONFIG, "raise ImportError('no such weights')")
        server.start()
        yield server


@pytest.fixture(scope="module")
def in_use(server: TritonServer) -> Iterator[None]:
    """The models stay loaded, because somebody else uses them: each takes a second to load, and another to unload."""
    users = [TritonModel(name, "cpu", {"url": server.url}, 1) for name in ("double", "types", "one")]
    for user in users:
        user.hold()
    with ThreadPoolExecutor() as pool:
        list(pool.map(TritonModel.load, users))
    yield
    for user in users:
        user.release()


@pytest.fixture
def build(server: TritonServer, in_use: None) -> Iterator[Callable[..., Executor]]:
    """Makes executors, and releases those that were held."""
    made: list[Executor] = []

    def build(model: str = "double", max_batch: int = 8, **options: Any) -> Executor:
        options.setdefault("url", server.url)
        stage = StageSpec(executor="triton", model=model, max_batch=max_batch, options=options)
        spec = PipelineSpec(name="p", slo=1.0, stages={"a": stage}, output="a")
        made.append(build_executor(spec, "a", "cpu"))
        return made[-1]

    yield build
    for executor in made:
        executor.release()


def loaded(executor: Executor) -> Executor:
    executor.hold()
    executor.load()
    return executor


def regions() -> set[str]:
    return {path.name for path in SHARED.glob(f"{PREFIX}*")}


def rows(*values: float) -> list[np.ndarray[Any, Any]]:
    return [np.full(3, value, np.float32) for value in values]


@pytest.mark.parametrize("memory", ["system", "none", "auto"])
def test_batches_run_as_they_are_handed_over(build: Callable[..., Executor], memory: str) -> None:
    before = regions()
    executor = loaded(build(shared_memory=memory))
    for size in (1, 8, 3):
        answers = run_batch(executor, rows(*range(size)))
        assert [answer["y"].tolist() for answer in answers] == [[2.0 * value] * 3 for value in range(size)]
        assert {int(answer["size"][0]) for answer in answers} == {size}
    assert bool(regions() - before) == (memory != "none")
    executor.release()
    assert regions() == before


def test_texts_halves_and_any_extent(build: Callable[..., Executor]) -> None:
    executor = loaded(build("types", max_batch=4, outputs=["text", "half", "any"]))
    feeds = [
        {"text": ["a", b"\xff"], "half": np.ones(2, np.float16), "any": np.arange(3, dtype=np.int32)},
        {"text": [b"", "ü"], "half": np.zeros(2, np.float16), "any": np.arange(3, dtype=np.int32)},
        {"text": "alone", "half": np.zeros(2, np.float16), "any": np.arange(5, dtype=np.int32)},
    ]
    first, second, third = run_batch(executor, feeds)
    assert first["text"] == [b"<a>", b"<\xff>"]
    assert second["text"] == [b"<>", "<ü>".encode()]
    assert third["text"] == [b"<alone>"]
    assert first["half"].dtype == np.float16
    assert first["half"].tolist() == [2, 2]
    assert third["any"].tolist() == [4, 3, 2, 1, 0]


def test_a_model_that_takes_no_batches(build: Callable[..., Executor]) -> None:
    (answer,) = run_batch(loaded(build("one", max_batch=1)), [np.array([1.0, 2.0])])
    assert answer.tolist() == [2.0, 3.0]
    with pytest.raises(ValueError, match=re.escape("takes no batches (max_batch_size: 0): set max_batch: 1")):
        loaded(build("one", max_batch=2))


def test_chosen_outputs(build: Callable[..., Executor]) -> None:
    (answer,) = run_batch(loaded(build(outputs=["y"])), rows(4))
    assert answer.tolist() == [8, 8, 8]
    with pytest.raises(ValueError, match="has no output 'z'; it has 'y', 'size'"):
        loaded(build(outputs=["z"]))


def test_feeds_that_the_model_cannot_take_fail_alone(build: Callable[..., Executor]) -> None:
    feeds = [np.ones(3), np.ones(4, np.float32), {"z": rows(1)[0]}, "text", *rows(7)]
    *wrong, right = run_batch(loaded(build()), feeds)
    for answer, said in zip(
        wrong, ("takes float32, not float64", "takes [3] for one", "feed has 'z'", "str"), strict=True
    ):
        assert said in answer.detail
    assert right["y"].tolist() == [14, 14, 14]


def test_tritons_own_words_for_what_fails(build: Callable[..., Executor]) -> None:
    executor = loaded(build())
    with pytest.raises(RuntimeError, match="ValueError: a poisonous input") as failed:
        run_batch(executor, rows(666, 1))
    assert error_code(failed.value) == "model_error"
    with pytest.raises(MemoryError, match="Tried to allocate 2 GiB") as failed_:
        run_batch(executor, rows(667))
    assert error_code(failed_.value) == "out_of_memory"
    assert run_batch(executor, rows(1))[0]["y"].tolist() == [2, 2, 2]


def test_batches_larger_than_the_models_own_are_refused_at_load(build: Callable[..., Executor]) -> None:
    with pytest.raises(ValueError, match="batches of up to 8: set max_batch: 8"):
        loaded(build(max_batch=9))
    executor = loaded(build())
    with pytest.raises(RuntimeError, match="batch-size must be <= 8"):
        run_batch(executor, rows(*range(9)))


def test_models_that_are_not_there_or_do_not_load(build: Callable[..., Executor]) -> None:
    with pytest.raises(ValueError, match=re.escape("no model 'nope' (it has: broken, double, one, paged, types)")):
        build("nope").hold()
    with pytest.raises(RuntimeError, match="no such weights"):
        loaded(build("broken"))
    with pytest.raises(RuntimeError, match="no version 7 that is ready"):
        loaded(build(version=7))


def test_without_its_package(build: Callable[..., Executor], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tritonclient", None)
    with pytest.raises(MissingExtra, match=re.escape("'tritonclient[grpc]': pip install 'laxity[triton]'")):
        build().hold()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"batch": 3}, "has no option 'batch'"),
        ({"url": "http://localhost:8000"}, "must be HOST:PORT"),
        ({"shared_memory": "yes"}, "option 'shared_memory' of the executor 'triton': Invalid enum value 'yes'"),
        ({"shared_memory": "cuda"}, "needs a GPU"),
        ({"timeout": 0}, "option 'timeout' of the executor 'triton': Expected `float` > 0.0"),
        ({"outputs": "y"}, "option 'outputs' of the executor 'triton': Expected `array | null`, got `str`"),
        ({"outputs": [3]}, "option 'outputs[0]' of the executor 'triton': Expected `str`, got `int`"),
    ],
)
def test_wrong_options(build: Callable[..., Executor], options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        build(**options)


def test_a_batch_that_takes_too_long(build: Callable[..., Executor]) -> None:
    executor = loaded(build(timeout=0.2))
    with pytest.raises(Unavailable, match="did not answer in time"):
        run_batch(executor, rows(669))
    assert answered(executor), "once the server has done with it"


def test_memory_of_batches_that_took_too_long_is_removed_once_the_server_has_done_with_it(
    build: Callable[..., Executor],
) -> None:
    before = regions()
    executor = loaded(build(timeout=0.2))
    with pytest.raises(Unavailable, match="did not answer in time"):
        run_batch(executor, rows(669))
    (retired,) = regions() - before
    while retired in regions():
        try:
            run_batch(executor, rows(2))
        except Unavailable:
            pass
    assert answered(executor)


def test_batches_that_the_server_refuses_give_their_memory_back(build: Callable[..., Executor]) -> None:
    before = regions()
    executor = loaded(build("paged", max_batch=1))
    executor.unload()
    for _ in range(2 * MAX_REGIONS):
        with pytest.raises(Unavailable, match="paged"):
            run_batch(executor, [np.ones(2)])
    assert len(regions() - before) == 1


def test_a_batch_that_is_let_go_of_gives_its_memory_back(
    build: Callable[..., Executor], caplog: pytest.LogCaptureFixture
) -> None:
    before = regions()
    executor = loaded(build())
    for _ in range(2 * MAX_REGIONS):
        executor.inputs(rows(1, 2))
    assert len(regions() - before) == 1
    waiting = [executor.inputs(rows(value)) for value in range(MAX_REGIONS + 2)]
    assert len(regions() - before) == MAX_REGIONS
    assert [record.getMessage()[:9] for record in caplog.records if "over the network" in record.message] == [
        "8 regions"
    ]
    for value, prepared in enumerate(waiting):
        executor.execute(prepared)
        assert executor.outputs(prepared)[0]["y"].tolist() == [2.0 * value] * 3


def test_regions_grow_with_what_they_hold(build: Callable[..., Executor]) -> None:
    executor = loaded(build("types", max_batch=4))
    before = regions()
    for length in (10, 100_000, 10):
        feed = {"text": "t", "half": np.zeros(2, np.float16), "any": np.arange(length, dtype=np.int32)}
        (answer,) = run_batch(executor, [feed])
        assert answer["any"][0] == length - 1
    after = regions()
    assert len(after) == len(before)
    assert max((SHARED / name).stat().st_size for name in after - before) == 512 * 1024


def test_a_model_stays_loaded_while_others_use_it(build: Callable[..., Executor]) -> None:
    first, second = (loaded(build("paged", max_batch=1)) for _ in range(2))
    first.unload()
    assert run_batch(second, [np.ones(2)])[0].tolist() == [2, 2]
    second.unload()
    with pytest.raises(Unavailable, match="paged"):
        run_batch(second, [np.ones(2)])
    second.load()
    assert run_batch(second, [np.ones(2)])[0].tolist() == [2, 2]


def test_memory_of_dead_workers_is_removed(build: Callable[..., Executor], server: TritonServer) -> None:
    before = regions()
    code = f"""
        import os, signal
        from nodes.executors.triton import TritonModel
        model = TritonModel("double", "cpu", {{"url": {server.url!r}}}, 8)
        model.hold()
        model.load()
        os.kill(os.getpid(), signal.SIGKILL)
    """
    died = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=False)
    assert died.returncode == -9
    (left,) = regions() - before
    alive = loaded(build())
    assert left not in regions()
    assert run_batch(alive, rows(1))[0]["y"].tolist() == [2, 2, 2]
    loaded(build())
    assert len(regions() - before) == 2, "those of the living stay"


def test_a_python_model_whose_process_died_is_loaded_anew(build: Callable[..., Executor]) -> None:
    executor = loaded(build())
    with pytest.raises(RuntimeError, match="not healthy") as failed:
        run_batch(executor, rows(668))
    assert error_code(failed.value) == "model_error"
    assert answered(executor)


def test_a_server_that_is_killed_and_comes_back(build: Callable[..., Executor], server: TritonServer) -> None:
    executor, other = loaded(build()), loaded(build("one", max_batch=1))
    prepared = executor.inputs(rows(669))
    seen: list[BaseException] = []

    def execute() -> None:
        try:
            executor.execute(prepared)
        except Exception as error:
            seen.append(error)

    running = threading.Thread(target=execute)
    running.start()
    server.kill()
    running.join()
    assert [error_code(error) for error in seen] == ["unavailable"]
    with pytest.raises(Unavailable, match=server.url):
        run_batch(executor, rows(1))
    server.start()
    assert answered(executor)
    assert run_batch(executor, rows(8))[0]["y"].tolist() == [16, 16, 16]
    pause = threading.Event()
    while True:
        try:
            assert run_batch(other, [np.ones(2)])[0].tolist() == [2, 2]
            break
        except Unavailable:
            pause.wait(0.05)


def answered(executor: Executor) -> bool:
    """Try until it is back; pytest's timeout ends a test in which it never is."""
    while True:
        try:
            return bool(run_batch(executor, rows(2))[0]["y"].tolist() == [4, 4, 4])
        except Unavailable:
            pass


def test_a_server_that_loads_its_models_itself(build: Callable[..., Executor], tmp_path: Path) -> None:
    with TritonServer(tmp_path, control="none") as server:
        server.add("double", DOUBLE_CONFIG, DOUBLE)
        server.start()
        executor = loaded(build(url=server.url))
        executor.unload()
        executor.load()
        assert run_batch(executor, rows(1))[0]["y"].tolist() == [2, 2, 2]
        executor.release()


def test_no_server(build: Callable[..., Executor], server: TritonServer, tmp_path: Path) -> None:
    with TritonServer(tmp_path) as never_started, pytest.raises(Unavailable, match=never_started.url):
        build(url=never_started.url).hold()


@pytest.mark.parametrize("slo", [0.15, 2.0])
def test_a_server_restarted_under_load(cluster: Any, server: TritonServer, in_use: None, slo: float) -> None:
    stage = StageSpec(
        executor="triton",
        model="double",
        max_batch=8,
        options={"url": server.url, "outputs": ["y"]},
        profile=Profile(alpha_ms=0.1, beta_ms=1.0),
    )
    agent = cluster.serve(
        PipelineSpec(name="p", slo=slo, stages={"a": stage}, output="a"), devices=[DeviceConfig("cpu", "cpu", 1)]
    )
    client = cluster.client()
    ended: Counter[Outcome] = Counter()
    lock = threading.Lock()
    stop = threading.Event()
    submitted = 0

    def note(future: Any) -> None:
        with lock:
            ended[future.reply(0).outcome] += 1

    def load() -> None:
        nonlocal submitted
        while not stop.wait(0.005):
            client.submit("p", np.ones(3, np.float32)).add_done_callback(note)
            submitted += 1

    def answered_again(more: int = 20) -> None:
        before = ended[Outcome.OK]
        cluster.eventually(lambda: ended[Outcome.OK] >= before + more, "requests are answered")

    loading = threading.Thread(target=load)
    loading.start()
    try:
        answered_again()
        server.kill()
        cluster.eventually(lambda: sum(ended.values()) > ended[Outcome.OK], "requests fail")
        server.start()
        answered_again()
    finally:
        stop.set()
        loading.join()
    cluster.settle()
    cluster.eventually(lambda: sum(ended.values()) == submitted, "each request ends")
    assert sum(ended.values()) == submitted, "once"
    assert set(ended) <= {Outcome.OK, Outcome.UNAVAILABLE, Outcome.DROPPED, Outcome.EXPIRED}
    assert [state.worker_restarts for state in agent.states] == [0], "and nothing of ours had to be restarted"


class SlowServer:
    """A server at the seam of its gRPC client: loading takes until it is let go on, and everything it is asked for is
    noted."""

    def __init__(self) -> None:
        self.loads = threading.Event()
        self.go_on = threading.Event()
        self.closed = threading.Event()
        self.resident = True
        self.away = False
        self.unloaded = threading.Event()

    def infer(self, *_: Any, **__: Any) -> None:
        self.resident = False
        raise Unavailable("it has started anew")

    def is_server_live(self) -> bool:
        return True

    def is_model_ready(self, *_: Any) -> bool:
        return self.resident

    def load_model(self, *_: Any, **__: Any) -> None:
        self.loads.set()
        self.go_on.wait()
        self.resident = True

    def unload_model(self, *_: Any) -> None:
        self.resident = False
        if self.go_on.is_set():
            self.unloaded.set()

    def get_model_repository_index(self) -> Any:
        if self.away:
            raise Unavailable("it has just ended")
        return SimpleNamespace(models=[])

    def close(self) -> None:
        self.closed.set()


@pytest.fixture
def slow() -> Iterator[tuple[ModelServer, SlowServer]]:
    """A model that is loaded at a :class:`SlowServer`."""
    model, server = ModelServer("localhost:1", "m", "", lambda: None), SlowServer()
    model.client.close()
    model.client = server
    model.load()
    yield model, server
    server.go_on.set()
    model.close()
    assert server.closed.wait(10)


def lose(model: ModelServer, server: SlowServer) -> None:
    """The server is found to have forgotten the model, and is loading it again."""
    with pytest.raises(Unavailable):
        model.infer([], [], 1.0)
    assert server.loads.wait(10)


def test_a_model_unloaded_while_it_is_brought_back_stays_unloaded(slow: tuple[ModelServer, SlowServer]) -> None:
    model, server = slow
    lose(model, server)
    model.unload()
    server.go_on.set()
    assert server.unloaded.wait(10)
    assert not server.resident


def test_a_model_loaded_again_while_it_is_brought_back_stays_loaded(slow: tuple[ModelServer, SlowServer]) -> None:
    model, server = slow
    lose(model, server)
    model.unload()
    server.go_on.set()
    model.load()
    model.close()
    assert server.closed.wait(10)
    assert server.resident


def test_closing_does_not_wait_for_a_model_that_is_brought_back(slow: tuple[ModelServer, SlowServer]) -> None:
    model, server = slow
    lose(model, server)
    model.close()
    assert not server.closed.is_set(), "its answer is still awaited"
    server.go_on.set()
    assert server.closed.wait(10)


def test_a_server_that_goes_away_while_it_unloads_holds_nothing(slow: tuple[ModelServer, SlowServer]) -> None:
    model, server = slow
    server.away = True
    model.unload()
    assert not server.resident
