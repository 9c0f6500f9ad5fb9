"""Tasks, one file each: model, data and metric."""
