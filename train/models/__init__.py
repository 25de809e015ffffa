"""Models: one decoder whose parts are chosen by config, and its initialisation."""
