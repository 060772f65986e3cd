"""How far can a verdict without held-out data be trusted? Runs whose truth is known, and rivals measured beside LAR.

`configs` lists the runs, `train` makes them (by `algorithmic`, `language`, `vision`, all through `recorder`), and
`python -m benchmarks.generalization` is the command. docs/benchmark.md has the protocol and the results.
"""
