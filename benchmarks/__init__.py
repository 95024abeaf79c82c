"""Benchmarks: scripts write raw rows (JSON lines), reports are made from rows only. README.md tells how."""
