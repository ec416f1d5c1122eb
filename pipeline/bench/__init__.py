"""The project beside its peers, on the user's own machine."""
