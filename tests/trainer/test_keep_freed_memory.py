"""Memory that a step frees is used by the next one."""

import os
import subprocess
import sys

import pytest

_COUNT = """
import resource, sys
import jax, jax.numpy as jnp
from jaxtrain.trainer.session import keep_freed_memory

x = jnp.ones((2500, 5000))  # 50 MB, and the program's temporaries take as much
flips = jax.jit(lambda x: jax.lax.fori_loop(0, 2, lambda _, y: jnp.flip(y * 2 + x), x).sum()).lower(x).compile()
if sys.argv[1] == "keep":
    keep_freed_memory()
for _ in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    flips(x).block_until_ready()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def new_pages(argument: str) -> int:
    run = [sys.executable, "-c", _COUNT, argument]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    return int(subprocess.run(run, env=environment, capture_output=True, text=True, check=True, timeout=300).stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
def test_steps_touch_no_new_pages():
    assert new_pages("free") > 10_000
    assert new_pages("keep") < 1_000
