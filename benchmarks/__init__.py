"""Measurements, each beside its baseline in one run, written to JSON with versions and machine. Not installed."""
