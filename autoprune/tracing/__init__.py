"""From a live model to a Structure: coupling, atoms, certification, physical removal (torch)."""
