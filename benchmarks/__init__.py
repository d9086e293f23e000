"""`python -m benchmarks` (`make bench`): this trainer beside a bare torch loop and `transformers`, in one run."""
