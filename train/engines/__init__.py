"""Engines: one protocol, four ways to spread a model over processes."""
