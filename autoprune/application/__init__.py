"""From a point of a front to a smaller model: applied, repaired, trained, saved."""
