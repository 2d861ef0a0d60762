"""Strict runtime for all tests: 8 simulated CPU devices, no silent rank promotion, warnings are errors."""

import os
import signal

# Must be set before anything imports JAX.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()

import jax  # after the flags are set
import pytest

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    # A script's background job ignores SIGINT, and so would every run that a test starts and then interrupts.
    signal.signal(signal.SIGINT, signal.default_int_handler)

pytest_plugins = ("tests.hub_fixtures",)  # imported before any test, hence before the Hub's clients
jax.config.update("jax_numpy_rank_promotion", "raise")
# Tests compile far more than they compute: this halves their time. Whole runs (tests/e2e) are compiled like a user's.
jax.config.update("jax_disable_most_optimizations", True)

# Later lines win. Each exception names the library that warns.
_WARNINGS = ("error",)


def pytest_configure(config: pytest.Config) -> None:
    for line in _WARNINGS:
        config.addinivalue_line("filterwarnings", line)
