"""Criteria, one file each: scores of atoms, higher is kept longer."""
