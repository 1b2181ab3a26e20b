"""Evaluation: datasets, metrics, experiments and their statistics. It reads the record; it never runs inside a run."""
