"""Goldens of version 0.1: README.md."""
