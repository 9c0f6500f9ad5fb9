"""Latency: measured on the runtime that ships, tabled for the search, measured again for the front."""
