"""A double-ended queue of tasks keyed by remaining latency budget.

At any instant the order of remaining budgets (deadline - now) is the order of deadlines, so the
key is a static deadline and nothing has to be re-keyed as time passes (PARD, section on adaptive
priority). Both ends are cheap: lowest budget first (LBF) takes the head, highest budget first (HBF)
the tail.
"""

from collections.abc import Iterator
from typing import Final

from broker.engine.request import Task

BUCKET: Final = 512
"""Tasks in a bucket at most; a full one is split. Keeps every insertion a move of a few KB."""


class BudgetQueue:
    """Tasks sorted by ``task.key``; ties in order of arrival.

    A list of sorted buckets, as in a sorted list: push, pop at either end and removal cost one short
    bisection and one short move. Deadlines mostly come in ascending order, which appends.
    """

    def __init__(self) -> None:
        self._last: list[Task] = []
        self._buckets: list[list[Task]] = [self._last]
        """None of them is empty but an only one; ``_last`` is the last."""
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[Task]:
        """All tasks, lowest budget first."""
        for bucket in self._buckets:
            yield from bucket

    def push(self, task: Task) -> None:
        self._size += 1
        bucket = self._last
        if not bucket or bucket[-1].key <= task.key:
            bucket.append(task)
            if len(bucket) > BUCKET:
                self._split(len(self._buckets) - 1)
            return
        index = self._bucket_above(task.key)
        bucket = self._buckets[index]
        bucket.insert(_above(bucket, task.key), task)
        if len(bucket) > BUCKET:
            self._split(index)

    def lowest(self) -> Task:
        """The task with the lowest remaining budget; IndexError if there is none."""
        return self._buckets[0][0]

    def highest(self) -> Task:
        """The task with the highest remaining budget; IndexError if there is none."""
        return self._last[-1]

    def pop_lowest(self) -> Task:
        bucket = self._buckets[0]
        task = bucket.pop(0)
        self._size -= 1
        if not bucket:
            self._drop_bucket(0)
        return task

    def pop_lowest_few(self, count: int) -> list[Task]:
        """The ``count`` tasks with the lowest remaining budgets, lowest first; all where there are fewer."""
        bucket = self._buckets[0]
        taken = bucket[:count]
        del bucket[:count]
        self._size -= len(taken)
        while not bucket and len(self._buckets) > 1:
            self._drop_bucket(0)
            bucket = self._buckets[0]
            more = count - len(taken)
            taken.extend(bucket[:more])
            self._size -= len(bucket[:more])
            del bucket[:more]
        return taken

    def pop_highest(self) -> Task:
        task = self._last.pop()
        self._size -= 1
        if not self._last:
            self._drop_bucket(len(self._buckets) - 1)
        return task

    def count_from(self, key: float) -> int:
        """How many tasks have this key or a higher one."""
        index = self._bucket_from(key)
        if index >= len(self._buckets):
            return 0
        bucket = self._buckets[index]
        count = len(bucket) - _from(bucket, key)
        for above in self._buckets[index + 1 :]:
            count += len(above)
        return count

    def pop_from(self, key: float) -> Task:
        """Take the task with the lowest key that is not below this one; IndexError if there is none."""
        index = self._bucket_from(key)
        bucket = self._buckets[index]
        task = bucket.pop(_from(bucket, key))
        self._size -= 1
        if not bucket:
            self._drop_bucket(index)
        return task

    def remove(self, task: Task) -> bool:
        """Take a task out, wherever it stands; whether it was there."""
        key = task.key
        index = self._bucket_from(key)
        while index < len(self._buckets):
            bucket = self._buckets[index]
            at = _from(bucket, key)
            while at < len(bucket) and bucket[at].key == key:
                if bucket[at] is task:
                    del bucket[at]
                    self._size -= 1
                    if not bucket:
                        self._drop_bucket(index)
                    return True
                at += 1
            if at < len(bucket):
                return False
            index += 1
        return False

    def _bucket_from(self, key: float) -> int:
        """The first bucket with a key that is not below this one; behind the last if there is none."""
        buckets = self._buckets
        low = 0
        high = len(buckets)
        while low < high:
            middle = (low + high) // 2
            bucket = buckets[middle]
            if bucket and bucket[-1].key >= key:
                high = middle
            else:
                low = middle + 1
        return low

    def _bucket_above(self, key: float) -> int:
        """The first bucket with a key above this one; there is one."""
        buckets = self._buckets
        low = 0
        high = len(buckets) - 1
        while low < high:
            middle = (low + high) // 2
            if buckets[middle][-1].key > key:
                high = middle
            else:
                low = middle + 1
        return low

    def _split(self, index: int) -> None:
        bucket = self._buckets[index]
        half = len(bucket) // 2
        self._buckets.insert(index + 1, bucket[half:])
        del bucket[half:]
        self._last = self._buckets[-1]

    def _drop_bucket(self, index: int) -> None:
        if len(self._buckets) > 1:
            del self._buckets[index]
            self._last = self._buckets[-1]


def _from(tasks: list[Task], key: float) -> int:
    """Where the first key stands that is not below this one."""
    low = 0
    high = len(tasks)
    while low < high:
        middle = (low + high) // 2
        if tasks[middle].key < key:
            low = middle + 1
        else:
            high = middle
    return low


def _above(tasks: list[Task], key: float) -> int:
    """Where the first key stands that is above this one."""
    low = 0
    high = len(tasks)
    while low < high:
        middle = (low + high) // 2
        if tasks[middle].key <= key:
            low = middle + 1
        else:
            high = middle
    return low
