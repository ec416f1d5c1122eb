"""One file a contender: `read(job, starts)` returns the windows, (n, length, columns), in request order.

What a file imports is loaded before the clock starts; opening, allocating and all else that `read` does is timed.
"""
