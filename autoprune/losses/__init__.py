"""Losses to the dense outputs, one file each: (outputs, dense_outputs, *, classes) -> one value a sample."""
