"""How every command ends: in one line, also where its output is closed or Ctrl-C is pressed."""

import contextlib
import io
import os
import sys
from collections.abc import Callable, Iterator

from support.errors import Broken, InputError


@contextlib.contextmanager
def command(name: str, who: Callable[[], str] = str) -> Iterator[None]:
    """Around the main of the command `name`; `who` says which process speaks, where there are several.

    An InputError or Broken is one line, with exit code 2 or 1; any other exception shows its traceback. What standard
    output's encoding has no character for is shown as "?". An output that was closed (| head) ends the command
    quietly, as a signal would.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # not in a notebook
        sys.stdout.reconfigure(errors="replace")
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python writes what is left when it exits
        sys.exit(141)
    except (InputError, Broken) as error:
        print(f"{name}: {who()}{error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, InputError) else 1)
    except KeyboardInterrupt:
        print(f"\n{name}: stopped", file=sys.stderr)
        sys.exit(130)
