"""This file says how every command reads its options and ends: with one line, also if its output is closed or Ctrl-C
is pressed."""

import argparse
import contextlib
import io
import os
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

from support.errors import Broken, InputError


class Parser(argparse.ArgumentParser):
    """A command's parser: a wrong command line raises an InputError. Only words that begin with two dashes are
    options."""

    def __init__(self, **settings: Any):
        super().__init__(allow_abbrev=False, **settings)
        self._negative_number_matcher = re.compile("-[^-]")  # so "-612;B*2?" is a problem, not an option

    def error(self, message: str) -> None:
        raise InputError(f"{message} (see python {self.prog} --help)")


@contextlib.contextmanager
def command(name: str, who: Callable[[], str] = str) -> Iterator[None]:
    """Wraps the main function of the command `name`. `who` returns the process's name if there are several.

    An InputError or Broken is shown as one line, with exit code 2 or 1; any other exception shows its traceback.
    Characters that the standard output's encoding lacks are shown as "?". If the output is closed (as by | head),
    the command ends quietly, as a signal would end it.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # in a notebook sys.stdout is another class
        sys.stdout.reconfigure(errors="replace")
    try:
        try:
            yield
        except (InputError, Broken) as error:
            print(f"{name}: {who()}{error}", file=sys.stderr)
            sys.exit(2 if isinstance(error, InputError) else 1)
        except KeyboardInterrupt:
            print(f"\n{name}: stopped", file=sys.stderr)
            sys.exit(130)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python writes the rest of its buffer at exit
        sys.exit(141)
