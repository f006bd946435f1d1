"""Records and reports the progress of a run."""
