"""Collections while a run goes on: new garbage goes, what was there before is not looked at."""

import gc
import weakref

from jaxtrain import garbage


class _Cycle:
    def __init__(self) -> None:
        self.itself = self


def test_only_new_garbage_is_collected() -> None:
    assert not gc.get_freeze_count()
    old, before = _Cycle(), _Cycle()
    gone = weakref.ref(before)
    del before
    with garbage.only_new():
        assert gone() is None  # was garbage when it began
        assert gc.get_freeze_count() > 10_000
        frozen, new = weakref.ref(old), _Cycle()
        made = weakref.ref(new)
        del old, new
        gc.collect()
        assert made() is None
        assert frozen() is not None
    assert not gc.get_freeze_count()
    gc.collect()
    assert frozen() is None
