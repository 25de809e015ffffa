"""What a run leaves behind and how it is shown: records, trackers, console, goodput, report.

Owns every file format under a run folder that people read. Refuses to import the training code: it
is handed plain mappings and paths. Called by the composition root, by callbacks and by the CLI.
"""
