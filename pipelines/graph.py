"""The graph of a pipeline's stages: who feeds whom, and what of each answer is used."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from graphlib import TopologicalSorter

from pipelines.spec import PipelineSpec, split_reference


def stage_parents(spec: PipelineSpec) -> dict[str, tuple[str, ...]]:
    """The stages that feed each stage, in the order of its inputs, each once; 'request' and unknown names are
    left out."""
    return {
        name: tuple(dict.fromkeys(source for source, _ in stage.sources() if source in spec.stages))
        for name, stage in spec.stages.items()
    }


class Graph:
    """A pipeline's DAG. Raises ``graphlib.CycleError`` for a spec with a cycle (validation refuses those)."""

    def __init__(self, spec: PipelineSpec) -> None:
        self.parents: dict[str, tuple[str, ...]] = stage_parents(spec)
        """The stages that feed each stage."""
        self.order: tuple[str, ...] = tuple(TopologicalSorter(self.parents).static_order())
        """The stages, every one behind those that feed it."""
        self.children: dict[str, tuple[str, ...]] = {
            name: tuple(child for child in self.order if name in self.parents[child]) for name in spec.stages
        }
        """The stages that each stage feeds, in topological order."""
        self.roots: tuple[str, ...] = tuple(name for name in self.order if not self.parents[name])
        """The stages that wait for the request alone."""
        self._fields: dict[str, set[str]] = {}
        self._lists: dict[str, set[str]] = {}
        for stage in spec.stages.values():
            for reference in stage.named_inputs().values():
                source, field = split_reference(reference)
                self._fields.setdefault(source, set()).add(field)
                if stage.map:
                    self._lists.setdefault(source, set()).add(field)
        for source, field in spec.outputs().values():
            self._fields.setdefault(source, set()).add(field)

    def fields_used(self, source: str) -> set[str]:
        """The fields of a stage's answer (or of 'request') that stages or the output refer to; '' stands for the
        whole answer."""
        return set(self._fields.get(source, ()))

    def list_fields(self, source: str) -> set[str]:
        """Those of :meth:`fields_used` that feed a map stage and so must be lists."""
        return set(self._lists.get(source, ()))

    def paths_after(self, stage: str) -> Iterator[tuple[str, ...]]:
        """Every path from behind ``stage`` to a last stage; only ``()`` for a last one. Their number can grow
        exponentially: for a maximum over them use :meth:`longest_after`."""
        children = self.children[stage]
        if not children:
            yield ()
        for child in children:
            for rest in self.paths_after(child):
                yield (child, *rest)

    def longest_after(self, seconds: Mapping[str, float]) -> dict[str, float]:
        """For each stage, the longest sum of ``seconds`` along a path behind it (0 for a last stage). Stages that
        ``seconds`` lacks count nothing."""
        longest: dict[str, float] = {}
        for name in reversed(self.order):
            longest[name] = max(
                (seconds.get(child, 0.0) + longest[child] for child in self.children[name]), default=0.0
            )
        return longest

    def longest_path(self, seconds: Mapping[str, float]) -> tuple[float, tuple[str, ...]]:
        """The longest sum of ``seconds`` along a path from the request to the answer, and that path."""
        after = self.longest_after(seconds)

        def total(name: str) -> float:
            return seconds.get(name, 0.0) + after[name]

        path: list[str] = []
        candidates = self.roots
        while candidates:
            path.append(max(candidates, key=total))
            candidates = self.children[path[-1]]
        return (total(path[0]) if path else 0.0), tuple(path)
