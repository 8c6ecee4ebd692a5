"""Checkpoints: a run that is stopped at any point resumes exactly where it was."""
