"""The problems of benchopt/benchmark_bilevel for metavpt, beside that benchmark's own solvers."""
