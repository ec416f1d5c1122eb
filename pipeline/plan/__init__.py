"""Window starts to a frozen `Plan` with its cost. Pure NumPy; no data are read."""
