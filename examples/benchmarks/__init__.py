"""Measurements of sinfkit beside the paper's: ``python -m benchmarks TABLE``, run from examples."""
