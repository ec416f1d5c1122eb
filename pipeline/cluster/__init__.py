"""A `cluster.yaml` or keywords to a `distributed.Client`."""
