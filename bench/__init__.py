"""Micro-benchmarks of the ops against every peer."""
