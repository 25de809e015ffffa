"""Real faults in real runs: `python -m tests.chaos`, or `make chaos`. See docs/reliability.md."""
