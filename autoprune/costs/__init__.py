"""Costs, one file each: ratios to the dense model in closed form."""
