"""What a model's time depends on besides the batch: how large an input is, read off its node alone."""

from bisect import bisect_left

from laxity.node import ArrayNode, BytesNode, DictNode, ListNode, TextNode
from laxity.payload import Payload


class CostKey:
    """Which of a stage's queues (lanes, stage.py) an input belongs to: one for each of the ascending ``bounds``, which
    are the largest sizes that belong there; what is larger, or has no such size, goes to the last. The size is that of
    ``axis`` of an array, or without an axis the length of bytes, of a text in UTF-8, or of a list; of the stage's input
    number ``source``, or of that dict's ``field``. ``profiled`` is the size that the model's profile is of; 0 for the
    largest bound."""

    def __init__(self, source: int, field: str, axis: int | None, bounds: list[int], profiled: int = 0) -> None:
        self.bounds = bounds
        self.scale = bounds[-1] / profiled if profiled else 1.0
        """What the largest bound is of the size that the profile is of."""
        self._source = source
        self._field = field
        self._axis = axis

    def parts(self) -> list[float]:
        """What each bound is of the largest."""
        return [bound / self.bounds[-1] for bound in self.bounds]

    def lane(self, inputs: list[Payload]) -> int:
        """The number of the lane for these inputs of one element."""
        last = len(self.bounds) - 1
        node = inputs[self._source].node
        if self._field:
            if not isinstance(node, DictNode):
                return last
            node = node.items.get(self._field)
        size = -1
        if self._axis is not None:
            if isinstance(node, ArrayNode) and -len(node.shape) <= self._axis < len(node.shape):
                size = node.shape[self._axis]
        elif isinstance(node, (BytesNode, TextNode)):
            size = node.size
        elif isinstance(node, str):
            size = len(node.encode())
        elif isinstance(node, ListNode):
            size = len(node.items)
        if size < 0:
            return last
        found = bisect_left(self.bounds, size)
        return found if found < last else last
