"""This file says how every command reads its options and ends: with one line, also if its output is closed or Ctrl-C
is pressed; and by which signals a run is asked to end."""

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

# signals at which a run saves a checkpoint and stops
ENDING = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2", "SIGXCPU", "SIGHUP")


class Parser(argparse.ArgumentParser):
    """A command's parser: a wrong command line raises an InputError. Only words that begin with two dashes are
    options."""

    def __init__(self, **settings: Any):
        super().__init__(allow_abbrev=False, **settings)
        self._negative_number_matcher = re.compile("-[^-]")  # so "-612;B*2?" is a problem, not an option

    def error(self, message: str) -> None:
        raise InputError(f"{message} (see python {self.prog} --help)")


@contextlib.contextmanager
def command(name: str, who: Callable[[], str] = str, shown: type[Exception] = InputError) -> Iterator[None]:
    """Wraps the main function of the command `name`. `who` returns the process's name if there are several.

    An InputError or Broken is shown as one line, with exit code 2 or 1, and so is the exception `shown`, with exit
    code 2. Any other exception shows its traceback.
    Characters that the standard output's encoding lacks are shown as "?". If the output is closed (as by | head),
    the command ends quietly, as a signal would end it.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # in a notebook sys.stdout is another class
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
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python writes the rest of its buffer at exit
        sys.exit(141)


def catch_signals(alone: bool) -> list[int]:
    """Returns a list that SIGINT, SIGTERM and the signals by which clusters announce the end will fill.

    The loop ends after its step when the list is not empty. A second signal ends the process at once if it is
    `alone`: torchrun sends a signal twice, and kills after 30 seconds.
    """
    caught: list[int] = []

    def note(number: int, _: object) -> None:
        if caught and alone:
            sys.exit(128 + number)
        caught.append(number)

    for name in ENDING:
        number = getattr(signal, name, None)  # Windows lacks most of them
        # SIGHUP stays ignored under nohup
        if number and not (name == "SIGHUP" and signal.getsignal(number) == signal.SIG_IGN):
            signal.signal(number, note)
    return caught
