"""This file reads the options of every command, and ends the command after an error (shown as one line), a closed
output or Ctrl-C. The file also catches the signals that ask a run to stop."""

import argparse
import contextlib
import io
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

from support.errors import Broken, InputError

# a run that gets one of these signals saves a checkpoint and stops
ENDING = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2", "SIGXCPU", "SIGHUP")


class Parser(argparse.ArgumentParser):
    """The parser of a command's options: it raises InputError for a wrong command line. Only words that begin with
    two dashes are options."""

    def __init__(self, **settings: Any):
        super().__init__(allow_abbrev=False, **settings)
        # a single dash begins no option, so sample.py reads "-612;B*2?" as a problem
        self._negative_number_matcher = re.compile("-[^-]")

    def error(self, message: str) -> None:
        raise InputError(f"{message} (see python {self.prog} --help)")


@contextlib.contextmanager
def command(name: str, who: Callable[[], str] = str, shown: type[Exception] = InputError) -> Iterator[None]:
    """Wraps the main function of the command `name`. If there are several processes, `who` returns the name of this
    process.

    An InputError, or an exception of class `shown`, is shown as one line with exit code 2, and a Broken as one line
    with exit code 1. Any other exception shows its traceback. Characters that the standard output's encoding lacks
    are shown as "?". If the output is closed (as by | head), the command ends without a message and with exit code
    141.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # a notebook's sys.stdout has no `reconfigure`
        sys.stdout.reconfigure(errors="replace")
    try:
        try:
            yield
        except (InputError, Broken, shown) as error:
            print(f"{name}: {who()}{error}", file=sys.stderr)
            sys.exit(1 if isinstance(error, Broken) else 2)
        except KeyboardInterrupt:
            print(f"\n{name}: stopped", file=sys.stderr)
            sys.exit(130)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        # at exit Python writes the rest of its buffer to stdout, which would fail again, so stdout becomes devnull
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)


def catch_signals(alone: bool) -> list[int]:
    """Returns a list to which each caught signal of ENDING is added: SIGINT, SIGTERM, and those that clusters send
    before they kill a job.

    The training loop stops after the current step when the list is not empty. With `alone` (one process) a second
    signal ends the process at once. With several ranks a second signal is only noted, because torchrun sends each
    signal twice, and kills after 30 seconds.
    """
    caught: list[int] = []

    def note(number: int, _: object) -> None:
        if caught and alone:
            sys.exit(128 + number)
        caught.append(number)

    for name in ENDING:
        number = getattr(signal, name, None)  # Windows lacks most of these signals
        # nohup makes a process ignore SIGHUP, and SIGHUP stays ignored
        if number and not (name == "SIGHUP" and signal.getsignal(number) == signal.SIG_IGN):
            signal.signal(number, note)
    return caught
