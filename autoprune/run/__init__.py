"""A search from its job to its front: prepare, before, the loop, after."""
