"""Commands of the package: python -m modeling_simvq --help."""

import argparse
import signal
import sys
from contextlib import suppress

from . import (
    convert_simvq_checkpoint,
    export_command,
    info_command,
    push_command,
    stream_command,
    tokenize_command,
)


def main(arguments: list[str] | None = None) -> int:
    """Run the command that the command line names; return its exit status."""
    parser = argparse.ArgumentParser(
        prog="simvq", description="SimVQ tokenizers at work. Also as python -m modeling_simvq."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in (
        tokenize_command,
        info_command,
        stream_command,
        convert_simvq_checkpoint,
        export_command,
        push_command,
    ):
        command.add_to(commands)
    options = parser.parse_args(arguments)
    # What is half written goes, as after an error.
    with suppress(ValueError):  # not in the main thread
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        return options.run(options)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(main())
