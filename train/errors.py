"""The exception tree: every error that a user can cause has a class and an exit code here.

    TrimtabError                 1  the root: catch this to catch ours alone
    ├── ConfigError              2  keys, types, combinations, files that the config names
    │   └── RunFolderError       2  the run folder belongs to another config
    ├── DataError                2  a corpus or tokenizer that cannot be used
    │   └── DataEndError         2  a mixture with limits has given all that it has
    ├── CheckpointError          1  a checkpoint that cannot be written or read
    │   └── CorruptCheckpointError  a digest, a size or a file of a checkpoint is wrong
    ├── JournalError             1  the recovery journal contradicts the run folder
    ├── OutOfDeviceMemoryError   1  a step needs more memory than there is
    ├── RunEndedError      75, 130  a signal asked for the end: 75 to go on later, 130 by a person
    ├── CrashLoopError           3  the same failure came too often
    └── StoppedByPolicyError     3  recovery gave up, with its reason

Exit codes are what launchers read: 2 must not be requeued (it would fail again), 3 needs a person.
"""

from __future__ import annotations

from collections.abc import Sequence


class TrimtabError(Exception):
    """Root of all errors that Trimtab raises on purpose."""

    exit_code = 1


class ConfigError(TrimtabError):
    """All problems of a config at once; each names its key, what was found, and what to do."""

    exit_code = 2

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        count = len(self.problems)
        heading = f"{count} problem{'s' if count != 1 else ''} in the configuration:"
        super().__init__("\n".join([heading, *(f"  - {problem}" for problem in self.problems)]))


class RunFolderError(ConfigError):
    """The run folder exists and was made by another config."""


class DataError(TrimtabError):
    """A corpus, file or tokenizer that cannot be used."""

    exit_code = 2


class DataEndError(DataError):
    """Every source has been read as often as it may: the run ends here."""


class CheckpointError(TrimtabError):
    """A checkpoint that could not be written or read."""


class CorruptCheckpointError(CheckpointError):
    """A checkpoint whose files do not match its manifest."""


class JournalError(TrimtabError):
    """The recovery journal names something that the run folder does not have."""


class OutOfDeviceMemoryError(TrimtabError):
    """A step needs more memory than there is; the message says what to change."""


class RunEndedError(TrimtabError):
    """The run has been told to end; `code` says in one word why."""

    def __init__(self, message: str, *, code: str, exit_code: int) -> None:
        super().__init__(message)
        self.code = code
        self.exit_code = exit_code


class CrashLoopError(TrimtabError):
    """The last attempts have all failed in the same way at the same step."""

    exit_code = 3


class StoppedByPolicyError(TrimtabError):
    """Recovery has used up its budget; the message says what was tried, `code` why in one word."""

    exit_code = 3

    def __init__(self, message: str, code: str = "") -> None:
        super().__init__(message)
        self.code = code or "gave_up"
