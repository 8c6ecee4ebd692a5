"""Finding, reading, transforming and loading images."""
