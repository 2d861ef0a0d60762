"""What Python's garbage collector looks at while a run goes on."""

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def only_new() -> Iterator[None]:
    """Collections within the context pass over what is alive when it begins.

    Start-up leaves some 230,000 objects that live as long as the process: JAX, the libraries, compiled programs. Every
    full collection would go through all of them (0.25 s), in whichever thread it happens to begin. See `gc.freeze`.
    """
    gc.collect()  # what is garbage now would stay, with arrays that hang on it
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
