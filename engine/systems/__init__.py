"""The published systems, one file a family."""
