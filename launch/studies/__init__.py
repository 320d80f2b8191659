"""Runnable studies: what the papers claim, tried on small data, with the tables they give."""
