"""Measurements against the ordinary way of doing the same work."""
