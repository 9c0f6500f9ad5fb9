"""autoprune: AutoML search for neural-network pruning policies."""

__version__ = "0.1.0"
