"""The report that people look at: plots and tables of a run folder."""
