"""The benchmarks of `tools.bench`: a module each, with `COMMAND` and `measure(flags) -> Json`."""
