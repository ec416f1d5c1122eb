"""Where windows go: an array, `.npy`, Zarr, batches or a data set for loaders."""
