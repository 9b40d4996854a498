"""Measurements behind docs/performance.md: ``python -m benchmarks`` runs all of them, see ``benchmarks.__main__``."""
