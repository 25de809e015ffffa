"""What keeps a run alive when processes, hosts and launchers fail."""
