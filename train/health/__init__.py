"""What keeps a run alive: signals, hangs, stragglers, corruption."""
