"""`vmferry`: the command line. Each command is imported when it is run."""

from __future__ import annotations

import sys

from cyclopts import App, CycloptsError, Parameter

from vmferry import __version__
from vmferry.errors import FerryError

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130


app = App(
    name="vmferry",
    help="Moves running virtual machines between hosts, from outside the hypervisor.",
    version=__version__,
    # Markdown would cost a third of the start.
    help_format="plaintext",
    default_parameter=Parameter(negative=()),
    suppress_keyboard_interrupt=False,
    print_error=False,
    exit_on_error=False,
)

_COMMANDS = {
    "host": ("vmferry.cli.host:host", "Run the daemon of this host, in the foreground."),
    "invite": ("vmferry.cli.pairing:invite", "Print a one-time token for pairing another host."),
    "pair": ("vmferry.cli.pairing:pair", "Pair this host with the one that gave TOKEN."),
    "unpair": ("vmferry.cli.pairing:unpair", "Trust a paired host no more."),
    "check": ("vmferry.cli.check:check", "Show what this host, a guest and another host can do."),
    "ls": ("vmferry.cli.listing:ls", "List the guests of this host and its paired hosts."),
    "move": ("vmferry.cli.move:move", "Move a running guest to a paired host."),
    "cancel": ("vmferry.cli.move:cancel", "Cancel a running move; the guest stays."),
    "lab": ("vmferry.cli.lab:app", "Two hosts, a client and guests on this one machine."),
}

for _name, (_target, _help) in _COMMANDS.items():
    app.command(_target, name=_name, help=_help)


def say(sentence: object) -> None:
    """One sentence on stderr."""
    text = str(sentence)
    print(
        f"vmferry: {text}" if text.endswith((".", "?", "!")) else f"vmferry: {text}.",
        file=sys.stderr,
    )


def main() -> None:
    """Runs one command; an error is a sentence, never a traceback."""
    try:
        app()
    except CycloptsError as error:
        say(" ".join(str(error).split()).rstrip(".") + "; `vmferry --help` shows the commands")
        sys.exit(EXIT_USAGE)
    except FerryError as error:
        say(error)
        sys.exit(EXIT_FAILED)
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
    except BrokenPipeError:
        # The reader of a pipe has gone (`vmferry ls | head -1`); nothing is left to say to it.
        sys.stderr.close()
        sys.exit(EXIT_FAILED)


if __name__ == "__main__":
    main()
