"""The strict runtime of all tests: 8 simulated CPU devices, no silent rank promotion, warnings are errors."""

import os
import signal

# Before anything imports JAX.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()

import jax  # after the flags
import pytest

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    # Started in the background of a script: so would be all runs that a test starts and then interrupts.
    signal.signal(signal.SIGINT, signal.default_int_handler)

pytest_plugins = ("tests.hub_fixtures",)  # imported before any test, so before the clients of the Hub
jax.config.update("jax_numpy_rank_promotion", "raise")
# Tests compile far more than they compute: this halves their time. Whole runs (tests/e2e) are compiled as a user's are.
jax.config.update("jax_disable_most_optimizations", True)

# Later lines win. Each exception says whose warning it is.
_WARNINGS = ("error",)


def pytest_configure(config: pytest.Config) -> None:
    for line in _WARNINGS:
        config.addinivalue_line("filterwarnings", line)
