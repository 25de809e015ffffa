"""The errors that launching can end in.

Owns the one exception that the command line turns into a line on stderr and exit code 2.

    Exception
    └── LaunchError    a setting, a file or a tool of the user's that stops the launch

Raised by every module in `launch`; caught only by `launch.cli.main`.
"""


class LaunchError(Exception):
    """What was found, what was expected, and what to do, in one message."""
