"""Samplers, one file each: they see widths and numbers, and no model."""
