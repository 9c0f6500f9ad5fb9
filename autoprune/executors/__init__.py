"""Executors, one file each: where evaluations run."""
