"""What is on disk, at once: the study of a run, where it lives, its lock, its mirror, its folder."""
