"""A double-ended queue of tasks keyed by remaining latency budget.

At any instant the order of remaining budgets (deadline - now) is the order of deadlines, so the
key is a static deadline and nothing has to be re-keyed as time passes (PARD, section on adaptive
priority). Both ends are cheap: lowest budget first (LBF) takes the head, highest budget first (HBF)
the tail.
"""

from bisect import bisect_left, bisect_right
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
        self._keys: list[list[float]] = [[]]
        self._tasks: list[list[Task]] = [[]]
        self._highest: list[float] = []
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[Task]:
        """All tasks, lowest budget first."""
        for bucket in self._tasks:
            yield from bucket

    def push(self, task: Task) -> None:
        key = task.key
        last = len(self._keys) - 1
        keys = self._keys[last]
        if not keys or keys[-1] <= key:
            index = last
            keys.append(key)
            self._tasks[last].append(task)
        else:
            index = bisect_right(self._highest, key)
            if index > last:
                index = last
            keys = self._keys[index]
            at = bisect_right(keys, key)
            keys.insert(at, key)
            self._tasks[index].insert(at, task)
        self._size += 1
        if index == len(self._highest):
            self._highest.append(keys[-1])
        else:
            self._highest[index] = keys[-1]
        if len(keys) > BUCKET:
            self._split(index)

    def lowest(self) -> Task:
        """The task with the lowest remaining budget; IndexError if there is none."""
        return self._tasks[0][0]

    def highest(self) -> Task:
        """The task with the highest remaining budget; IndexError if there is none."""
        return self._tasks[-1][-1]

    def pop_lowest(self) -> Task:
        task = self._tasks[0].pop(0)
        self._keys[0].pop(0)
        self._size -= 1
        if not self._keys[0]:
            self._drop_bucket(0)
        return task

    def pop_highest(self) -> Task:
        last = len(self._tasks) - 1
        task = self._tasks[last].pop()
        keys = self._keys[last]
        keys.pop()
        self._size -= 1
        if keys:
            self._highest[last] = keys[-1]
        else:
            self._drop_bucket(last)
        return task

    def count_from(self, key: float) -> int:
        """How many tasks have this key or a higher one."""
        index = bisect_left(self._highest, key)
        if index >= len(self._highest):
            return 0
        count = len(self._keys[index]) - bisect_left(self._keys[index], key)
        for keys in self._keys[index + 1 :]:
            count += len(keys)
        return count

    def peek_from(self, key: float) -> Task | None:
        """The task with the lowest key that is not below this one."""
        index = bisect_left(self._highest, key)
        if index >= len(self._highest):
            return None
        return self._tasks[index][bisect_left(self._keys[index], key)]

    def pop_from(self, key: float) -> Task:
        """Take the task with the lowest key that is not below this one; IndexError if there is none."""
        index = bisect_left(self._highest, key)
        keys = self._keys[index]
        at = bisect_left(keys, key)
        task = self._tasks[index][at]
        del keys[at]
        del self._tasks[index][at]
        self._size -= 1
        if keys:
            self._highest[index] = keys[-1]
        else:
            self._drop_bucket(index)
        return task

    def remove(self, task: Task) -> bool:
        """Take a task out, wherever it stands; whether it was there."""
        key = task.key
        index = bisect_left(self._highest, key)
        while index < len(self._highest):
            keys = self._keys[index]
            at = bisect_left(keys, key)
            while at < len(keys) and keys[at] == key:
                if self._tasks[index][at] is task:
                    del keys[at]
                    del self._tasks[index][at]
                    self._size -= 1
                    if keys:
                        self._highest[index] = keys[-1]
                    else:
                        self._drop_bucket(index)
                    return True
                at += 1
            if at < len(keys):
                return False
            index += 1
        return False

    def _split(self, index: int) -> None:
        keys = self._keys[index]
        tasks = self._tasks[index]
        half = len(keys) // 2
        self._keys.insert(index + 1, keys[half:])
        self._tasks.insert(index + 1, tasks[half:])
        del keys[half:]
        del tasks[half:]
        self._highest[index] = keys[-1]
        self._highest.insert(index + 1, self._keys[index + 1][-1])

    def _drop_bucket(self, index: int) -> None:
        del self._highest[index]
        if len(self._keys) > 1:
            del self._keys[index]
            del self._tasks[index]
