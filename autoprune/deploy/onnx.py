"""ONNX holds whatever is left of a model."""

from __future__ import annotations

from autoprune.structure import Structure


class Onnx:
    """Every width, every block."""

    def restrict(self, structure: Structure) -> Structure:
        """All of it."""
        return structure
