"""CAPI: clusters the patches of the teacher, and predicts the clusters of those it hides."""
