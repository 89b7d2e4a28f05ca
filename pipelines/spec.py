"""What a pipeline file says: the spec, as plain data.

``load.py`` reads a YAML file into these, ``validate.py`` checks what types alone cannot,
``schema.py`` prints their JSON Schema. A spec is self-contained JSON when encoded with
msgspec, which is how it lies in the store.
"""

from __future__ import annotations

import hashlib
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

REQUEST = "request"
"""The name under which a stage's inputs refer to the request's own payload."""

MAX_BUCKETS = 8
"""The most sizes of inputs that a stage can tell apart."""

Name = Annotated[
    str,
    Meta(
        pattern=r"^[a-z][a-z0-9_-]{0,62}$(?!\n)",
        description="lower-case letters, digits, '-' and '_'; starts with a letter",
    ),
]
Reference = Annotated[
    str,
    Meta(
        pattern=r"^[a-z][a-z0-9_-]*(\.[A-Za-z_][A-Za-z0-9_]*)?$",
        description="'request', 'STAGE', or 'STAGE.FIELD' where the stage answers a dict",
    ),
]
UserCode = Annotated[
    str,
    Meta(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_][\w.]*$", description="'package.module:function'"),
]
Milliseconds = Annotated[float, Meta(ge=0)]


class Profile(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """Execution latency in milliseconds: either ``alpha_ms * b + beta_ms`` for a batch of b, or measured
    latencies by batch size; and what the model takes of a device besides."""

    alpha_ms: Milliseconds | None = None
    beta_ms: Milliseconds | None = None
    latency_ms: dict[int, Milliseconds] | None = None
    load_ms: Milliseconds | None = None
    """How long a device takes to load the model."""
    memory_mb: Annotated[float, Meta(ge=0)] | None = None
    """How much of a device's memory the model takes, with its largest batch; none is reckoned where it is not said."""
    by_type: dict[str, Profile] = {}
    """What holds on devices of a type, by type; the outer values hold on all others."""

    def on(self, device_type: str) -> Profile:
        """The profile on devices of this type; ``load_ms`` and ``memory_mb`` are the outer ones where the type's own
        entry does not say."""
        own = self.by_type.get(device_type)
        if own is None:
            return self
        return msgspec.structs.replace(
            own,
            load_ms=self.load_ms if own.load_ms is None else own.load_ms,
            memory_mb=self.memory_mb if own.memory_mb is None else own.memory_mb,
        )


class Cost(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """How a model's time depends on the size of its inputs: elements of one batch are of one bucket, and each bucket is
    predicted by itself. Sizes are read off an input's shape; nothing is decoded for it."""

    buckets: list[Annotated[int, Meta(ge=1)]] = []
    """The largest size in each bucket, ascending. What is larger than the last, or has no such size, belongs to it."""
    axis: Annotated[int, Meta(ge=-16, le=15)] | None = None
    """Of an array: the axis whose length counts. Without it the length of bytes, of a text in UTF-8, or of a list
    counts."""
    field: str = ""
    """Of an input (of an item of a map stage) that is a dict: the field that is meant."""
    input: str = ""
    """Of several inputs: the one that is meant, by its name."""
    profiled: Annotated[int, Meta(ge=1)] | None = None
    """The size that the profile and the sample are of; the largest bucket's where it is not said."""


class StageSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """One stage: a model, what is done before and after it, and where its inputs come from."""

    executor: Literal["python", "onnx", "torch", "triton", "emulated"]
    """What runs the model."""
    model: str | None = None
    """``python``: 'package.module:callable' (a class is instantiated); ``onnx``: a file, an http(s) address, or
    'package:path' for a file inside an installed package; ``torch``: 'package.module:factory' or a TorchScript /
    torch.export file or address; ``triton``: the model's name on a Triton server; ``emulated``: none."""
    sha256: Annotated[str, Meta(pattern=r"^[0-9a-f]{64}$(?!\n)")] | None = None
    """Of a model at an address: the digest that the file must have. Without it, the one it has when the pipeline is
    applied."""
    before: UserCode | None = None
    """Called for each element with the stage's input; returns the model's feed, or (feed, kept)."""
    collate: UserCode | None = None
    """Joins a list of feeds into one batched feed; without it arrays of one shape are stacked, shapes apart."""
    after: UserCode | None = None
    """Called for each element with (the model's output, kept); returns the stage's answer. ``kept`` is what
    ``before`` returned beside the feed, or the stage's input where it returned the feed alone."""
    inputs: list[Reference] | dict[str, Reference] = msgspec.field(default_factory=lambda: [REQUEST])
    """One reference: the stage gets that value. Several: a dict of them, under the names given, or under the
    references themselves where a list is given."""
    map: bool = False
    """Run once for each item of the (only) input, a list; the answers are joined again in order."""
    max_items: Annotated[int, Meta(ge=1, le=100_000)] = 200
    """The most items one request may bring to a map stage."""
    max_batch: Annotated[int, Meta(ge=1, le=4096)] = 32
    """The largest batch."""
    max_queue: Annotated[int, Meta(ge=1)] = 10_000
    """How many elements may wait for this stage at a shard; one more is rejected: queue full."""
    sample: UserCode | None = None
    """Returns one example of the stage's input, for warm-up and profiling when the model is loaded."""
    profile: Profile | None = None
    """Execution latency, where it is known beforehand; an emulated stage needs one."""
    cost: Cost | None = None
    """By which size of its inputs elements are put into batches, where the model's time depends on it."""
    options: dict[str, Any] = {}
    """The executor's own options."""

    def named_inputs(self) -> dict[str, str]:
        """The references by the names under which the stage's code sees them."""
        return self.inputs if isinstance(self.inputs, dict) else {ref: ref for ref in self.inputs}

    def sources(self) -> list[tuple[str, str]]:
        """(stage or 'request', field or '') of each input, in order."""
        return [split_reference(ref) for ref in self.named_inputs().values()]


class PipelineSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """A pipeline: a DAG of stages under one latency objective."""

    name: Name
    slo: float
    """The latency objective in seconds ('400ms' and '5s' in a file)."""
    stages: dict[Name, StageSpec]
    output: str | dict[str, Reference]
    """What the answer is: one reference, or a dict of them. (Not typed ``Reference | dict``: msgspec 0.22 frees a
    text's pattern once too often where the text is in a union with a list or dict, and crashes.)"""
    policy: str = "laxity"
    """The scheduling policy: NAME or NAME:parameter=value,... (see ``pipelines/policies.py``)."""
    description: str = ""
    files: list[str] = []
    """Patterns, relative to the root, of files that are needed beside the model files and the code that the stages
    name (weights beside an ONNX file, labels, modules imported by name at run time)."""
    root: str = ""
    """The directory of the file, where user code and model files are looked for; set when it is read."""
    content: str = ""
    """A digest of all files that the spec needs, set when it is applied, so that a changed file makes a new version."""

    @property
    def version(self) -> str:
        """A short digest of what the spec says, and of its files where ``content`` is set (wherever they lie then)."""
        fields = _every_field(self)
        if self.content:
            del fields["root"]
        plain = msgspec.to_builtins(fields, str_keys=True)
        return hashlib.sha256(msgspec.json.encode(plain, order="sorted")).hexdigest()[:10]

    def model_key(self, stage: str) -> str:
        """The name of a stage's model in placements, READY and GRANT: ``pipeline@version/stage``."""
        return f"{self.name}@{self.version}/{stage}"

    def outputs(self) -> dict[str, tuple[str, str]]:
        """(stage, field) of each entry of the answer; the only one has the name '' if output is one reference."""
        if isinstance(self.output, str):
            return {"": split_reference(self.output)}
        return {name: split_reference(ref) for name, ref in self.output.items()}


def _every_field(value: Any) -> Any:
    """Structs as dicts with all their fields: ``omit_defaults`` leaves out what is *identical* to a default, so that an
    equal spec may look different once it was copied."""
    if isinstance(value, msgspec.Struct):
        return {name: _every_field(getattr(value, name)) for name in value.__struct_fields__}
    if isinstance(value, dict):
        return {key: _every_field(item) for key, item in value.items()}
    return value


def split_reference(reference: str) -> tuple[str, str]:
    """('detect', 'crops') of 'detect.crops'; the field is '' where none is named."""
    stage, _, field = reference.partition(".")
    return stage, field
