"""Processes that run tasks: one a core, each single-threaded.

Owns how they are started, asked and heard. A worker ends by itself when its parent is gone, however
it went. One JSON object a line: down goes `{"task": 7}`, up come `{"advance": [...]}` and at the
end `{"done": 7}` or what went wrong. Called by `job`; the other side is `serve`.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from train.data.prepare.documents import Advance
from train.data.prepare.task import ListedBadRecord, TaskResult, TaskRunner, TooManyBadRecordsError
from train.errors import DataError

WORKER_OPTION = "--worker"
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Workers:
    """A pool of worker processes; a context manager, which ends them all."""

    def __init__(self, work: Path, num_processes: int, max_bad_records: int) -> None:
        entry = Path(__file__).resolve().parents[2] / "prepare.py"
        # One thread each: the cores are shared out already.
        environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(entry), WORKER_OPTION, str(work), str(max_bad_records)]
        self._lines: queue.SimpleQueue[tuple[int, str]] = queue.SimpleQueue()
        with _blocked(_STOP_SIGNALS):
            self._processes = [
                subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                    env=environment,
                )
                for _ in range(num_processes)
            ]
        self._readers = [
            threading.Thread(target=self._read, args=[number], daemon=True)
            for number in range(num_processes)
        ]
        for reader in self._readers:
            reader.start()

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()
        for process, reader in zip(self._processes, self._readers, strict=True):
            process.wait()
            reader.join()
            for pipe in (process.stdin, process.stdout):
                assert pipe is not None, "both are pipes"
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()

    def run(self, numbers: Sequence[int], advance: Callable[[Advance], None]) -> Iterator[int]:
        """Have tasks done; yield the number of each when it is.

        Raises: DataError of a task, TooManyBadRecordsError, OSError of the disk, or DataError if a
        worker was killed.
        """
        waiting = list(reversed(numbers))
        num_left = len(waiting)
        for worker in range(len(self._processes)):
            self._hand_out(worker, waiting)
        while num_left:
            worker, line = self._lines.get()
            if not line:
                raise self._death(worker)
            message = json.loads(line)
            if "advance" in message:
                advance(Advance(*message["advance"]))
                continue
            _raise_problem(message)
            self._hand_out(worker, waiting)
            num_left -= 1
            yield int(message["done"])

    def _read(self, worker: int) -> None:
        """Pass on what one worker says, and an empty line at its end. Runs in a thread."""
        output = self._processes[worker].stdout
        assert output is not None, "it is a pipe"
        for line in output:
            self._lines.put((worker, line))
        self._lines.put((worker, ""))

    def _hand_out(self, worker: int, waiting: list[int]) -> None:
        if not waiting:
            return
        requests = self._processes[worker].stdin
        assert requests is not None, "it is a pipe"
        with contextlib.suppress(BrokenPipeError):  # it is dead: the end of its output says so
            requests.write(json.dumps({"task": waiting.pop()}) + "\n")
            requests.flush()

    def _death(self, worker: int) -> DataError:
        code = self._processes[worker].wait()
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        return DataError(
            f"a worker process {how}; if memory was short, use fewer --processes or a lower "
            "--max-document-bytes, and run the same command again: what is done is kept"
        )


@contextmanager
def _blocked(signals: Sequence[signal.Signals]) -> Iterator[None]:
    """Start processes that never get `signals`, from their first instruction on.

    A terminal or a scheduler sends these to all of a job's processes: the parent says what there is
    to say, and ends its workers.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _raise_problem(message: dict[str, Any]) -> None:
    if "bad" in message:
        record = message["bad"]
        listed = [ListedBadRecord(*bad) for bad in record["listed"]]
        raise TooManyBadRecordsError(
            TaskResult(bad_records=record["bad_records"], listed=listed), message["task"]
        )
    if "errno" in message:
        raise OSError(message["errno"], message["reason"], message["file"])
    if "error" in message:
        raise DataError(message["error"])


def serve(
    make_runner: Callable[[Callable[[Advance], None]], tuple[TaskRunner, Sequence[Any]]],
    requests: TextIO,
    replies: TextIO,
) -> None:
    """Do what comes in on `requests` until it ends; a task under way is then given up."""
    numbers = _Requests(requests)

    def say(**message: object) -> None:
        replies.write(json.dumps(message) + "\n")
        replies.flush()

    runner, tasks = make_runner(lambda done: say(advance=done))
    for number in numbers:
        try:
            runner.run(tasks[number], number)
        except TooManyBadRecordsError as error:
            listed = [list(bad) for bad in error.result.listed]
            say(task=number, bad={"bad_records": error.result.bad_records, "listed": listed})
        except DataError as error:
            say(task=number, error=str(error))
        except OSError as error:
            file = str(error.filename or "")
            say(task=number, errno=error.errno, reason=error.strerror, file=file)
        else:
            say(done=number)


class _Requests:
    """Reads requests in a thread, so that the end of the parent is seen in the middle of a task."""

    def __init__(self, requests: TextIO) -> None:
        self._queue: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._requests = requests
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self._requests:
            self._queue.put(int(json.loads(line)["task"]))
        os._exit(0)  # nothing is owed to a parent that is gone

    def __iter__(self) -> Iterator[int]:
        while True:
            yield self._queue.get()
