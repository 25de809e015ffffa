"""Callbacks: one module each; `callbacks.names` in the config names the modules that run."""
