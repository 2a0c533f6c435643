"""A bounded cache for threads: what two of them want at once is loaded once."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class SharedCache(Generic[K, V]):
    """Keeps the most recently used values while their weights sum up to `weight_max`; the newest one always stays."""

    def __init__(self, weight_max: int, weigh: Callable[[V], int]) -> None:
        self._weight_max = weight_max
        self._weigh = weigh
        self._lock = threading.Lock()
        self._values: OrderedDict[K, tuple[V, int]] = OrderedDict()
        self._loading: dict[K, Future[V]] = {}
        self.weight = 0
        self.loads = 0

    def get(self, key: K, load: Callable[[], V]) -> V:
        """The value of `key`, from `load` if it is not here; what `load` raises goes to all who waited for it."""
        with self._lock:
            if (kept := self._values.get(key)) is not None:
                self._values.move_to_end(key)
                return kept[0]
            loading = self._loading.get(key)
            if loading is None:
                mine = self._loading[key] = Future()
                self.loads += 1
        if loading is not None:
            return loading.result()
        try:
            value = load()
        except BaseException as error:
            with self._lock:
                del self._loading[key]
            mine.set_exception(error)
            raise
        with self._lock:
            del self._loading[key]
            self._keep(key, value)
        mine.set_result(value)
        return value

    def peek(self, suits: Callable[[K], bool]) -> list[tuple[K, V]]:
        """What is kept under keys that suit, least recently used first; counts as no use."""
        with self._lock:
            return [(key, value) for key, (value, _) in self._values.items() if suits(key)]

    def _keep(self, key: K, value: V) -> None:
        weight = self._weigh(value)
        self._values[key] = value, weight
        self.weight += weight
        while self.weight > self._weight_max and len(self._values) > 1:
            _, (_, dropped) = self._values.popitem(last=False)
            self.weight -= dropped
