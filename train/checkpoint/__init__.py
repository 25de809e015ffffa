"""Checkpoints: written whole or not at all, checksummed, trusted only after calm steps."""
