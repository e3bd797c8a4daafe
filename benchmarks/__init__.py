"""Measurements against the strongest dense baseline of each machine; run with `make bench`.

`python -m benchmarks.layers`, `.models` and `.compile_time` each print a table, and write JSON and a
picture under `benchmarks/results/`. Every ratio is taken inside one run, calls interleaved, on random
data, after a check against float64.
"""
