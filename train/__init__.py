"""Training: config, loop, engines, data, checkpoints and spike recovery."""
