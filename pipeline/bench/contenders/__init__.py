"""Functions that read windows; `pipeline.bench.lineup` lists them.

A function gets a `Job` and starts, (n,) int64, and returns the windows in request order, (n, length, columns), or a
list of batches of them. All that it does is timed, opening and allocating included. Functions import their packages
themselves, so that the memory of each process is that of its contender.
"""
