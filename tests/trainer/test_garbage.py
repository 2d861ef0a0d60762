"""Garbage collection during a run: new garbage is collected, older objects are not visited."""

import gc
import weakref

from jaxtrain.trainer import loop

_SOME = 10_000


class _Cycle:
    def __init__(self) -> None:
        self.itself = self


def test_only_new_garbage_is_collected() -> None:
    assert gc.get_freeze_count() < _SOME  # Python 3.12 begins with a few hundred
    old, before = _Cycle(), _Cycle()
    gone = weakref.ref(before)
    del before
    with loop.frozen_gc():
        assert gone() is None  # was garbage when it began
        assert gc.get_freeze_count() > _SOME
        frozen, new = weakref.ref(old), _Cycle()
        made = weakref.ref(new)
        del old, new
        gc.collect()
        assert made() is None
        assert frozen() is not None
    assert gc.get_freeze_count() < _SOME
    gc.collect()
    assert frozen() is None
