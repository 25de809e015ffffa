"""Spike recovery: detect, decide, journal, rewind."""
