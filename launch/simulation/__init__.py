"""Simulated staleness: variants of a configuration, runs of them, tables and pictures."""
