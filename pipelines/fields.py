"""What each field of a pipeline file means and how it is written: for the JSON Schema and for error messages."""

from __future__ import annotations

from typing import NamedTuple


class Field(NamedTuple):
    """A field's description, and an example of it as it stands in a file."""

    description: str
    example: str


PIPELINE_FIELDS = {
    "name": Field("The pipeline's name: lower-case letters, digits, '-' and '_', starting with a letter.", "name: ocr"),
    "slo": Field(
        "The latency objective of a request, from its submission to its answer: a text such as 400ms, 5s or 1m, "
        "or a number of seconds.",
        "slo: 400ms",
    ),
    "stages": Field(
        "The stages by name; a name is written like the pipeline's, and 'request' is taken.",
        "stages: {detect: {executor: onnx, model: detect.onnx, inputs: [request]}}",
    ),
    "output": Field(
        "What the answer is: one reference ('STAGE' or 'STAGE.FIELD'), or a mapping of names to references.",
        "output: {boxes: detect.boxes, lines: recognize}",
    ),
    "policy": Field(
        "The scheduling policy: NAME or NAME:parameter=value,...; laxity unless another is named.", "policy: nexus"
    ),
    "description": Field("What the pipeline does, for people.", "description: reads the text in a picture"),
    "files": Field(
        "Files beside the spec that its agents need, as patterns such as 'labels.txt' or 'data/**/*.json'. Model files "
        "and the modules that the stages name, with what these import, are found without it.",
        "files: [labels.txt]",
    ),
}

STAGE_FIELDS = {
    "executor": Field("What runs the model: python, onnx, torch, triton or emulated.", "executor: onnx"),
    "model": Field(
        "The model. python: 'package.module:callable' (a class is instantiated). onnx: a file beside the spec, "
        "'package:path' for a file inside an installed package, or an http(s) address. torch: "
        "'package.module:factory', or a TorchScript or torch.export file or address (.pt, .pt2, .pth, .ts). "
        "triton: the model's name in the server's repository. emulated: none.",
        "model: detect.onnx",
    ),
    "sha256": Field(
        "The SHA-256 digest of a model at an address, in 64 hexadecimal digits; without it, the one that the file has "
        "when the pipeline is applied.",
        "sha256: e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
    ),
    "before": Field(
        "'package.module:function', called for each element with the stage's input; returns the model's feed, or "
        "(feed, kept).",
        "before: steps:resize",
    ),
    "collate": Field(
        "'package.module:function' that joins a list of feeds into one batched feed; without it arrays of one shape "
        "are stacked.",
        "collate: steps:pad",
    ),
    "after": Field(
        "'package.module:function', called for each element with (the model's output, kept); returns the stage's "
        "answer.",
        "after: steps:boxes",
    ),
    "inputs": Field(
        "Where the stage's input comes from: a list of references or a mapping of names to references. A reference "
        "is 'request', 'STAGE', or with a field 'request.FIELD', 'STAGE.FIELD'. One listed reference is passed as "
        "it is, several as a dict.",
        "inputs: [request]",
    ),
    "map": Field("Run once for each item of the only input, a list; the answers are joined in order.", "map: true"),
    "max_items": Field("The most items that one request may bring to a map stage.", "max_items: 200"),
    "max_batch": Field("The largest batch.", "max_batch: 32"),
    "max_queue": Field("How many elements may wait for this stage at a shard.", "max_queue: 10000"),
    "sample": Field(
        "'package.module:function' that returns one example of the stage's input, for warm-up and profiling.",
        "sample: steps:sample",
    ),
    "profile": Field(
        "Execution latency where it is known beforehand; an emulated stage needs one.",
        "profile: {alpha_ms: 1.5, beta_ms: 4}",
    ),
    "cost": Field(
        "By which size of its inputs elements are put into batches, where the model's time depends on it: batches are "
        "of one bucket, each predicted by itself.",
        "cost: {axis: 1, buckets: [160, 320, 640]}",
    ),
    "options": Field("The executor's own options.", "options: {threads: 1}"),
}

PROFILE_FIELDS = {
    "alpha_ms": Field("Milliseconds that each element of a batch adds.", "alpha_ms: 1.5"),
    "beta_ms": Field("Milliseconds that a batch takes whatever its size.", "beta_ms: 4"),
    "latency_ms": Field("Measured milliseconds by batch size.", "latency_ms: {1: 5.2, 8: 17.5}"),
    "load_ms": Field("Milliseconds that a device takes to load the model.", "load_ms: 1500"),
    "memory_mb": Field(
        "Megabytes of a device's memory that the model takes, with its largest batch.", "memory_mb: 900"
    ),
    "by_type": Field(
        "Profiles on devices of a type, by type; the outer values hold on all other devices.",
        "by_type: {A100: {alpha_ms: 0.4, beta_ms: 2}}",
    ),
}

COST_FIELDS = {
    "buckets": Field(
        "The largest size in each bucket, ascending, 2 to 8 of them. What is larger than the last, or has no such "
        "size, belongs to it.",
        "buckets: [160, 320, 640]",
    ),
    "axis": Field(
        "Of an array: the axis whose length counts. Without it the length of bytes, of a text in UTF-8, or of a list.",
        "axis: 1",
    ),
    "field": Field(
        "Of an input (of an item of a map stage) that is a dict: the field that is meant.", "field: picture"
    ),
    "profiled": Field(
        "The size that the profile and the sample are of; the largest bucket's where it is not said.", "profiled: 320"
    ),
    "input": Field("Of several inputs: the one that is meant, by its name.", "input: crop"),
}
