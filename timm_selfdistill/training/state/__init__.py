"""A run that was stopped anywhere goes on as it would have."""
