"""Tasks on Dask: built, run, bounded, retried, placed and counted."""
