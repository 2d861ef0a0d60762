"""`python -m tests.e2e.one_compiler FLAGS...`: jaxtrain.main in several processes, one of which compiles for all.

On CPUs, the keys of JAX's persistent cache depend on something specific to each process, so all processes except 0
would compile everything in every run. On other platforms the keys are equal.
"""

import runpy

import jax
from jax._src import cache_key


def share() -> None:
    """Makes the keys equal. Call it before anything is compiled."""
    assert hasattr(cache_key, "_hash_accelerator_config"), "this version of JAX makes its keys in another way"
    cache_key._hash_accelerator_config = lambda hash_obj, accelerators: None
    jax.config.update("jax_share_binary_between_hosts", True)


if __name__ == "__main__":
    share()
    runpy.run_module("jaxtrain.main", run_name="__main__", alter_sys=True)
