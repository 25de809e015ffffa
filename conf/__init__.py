"""Configuration values as YAML, one folder a group; no logic lives here."""
