"""Runtimes that latency is measured on, one file each."""
