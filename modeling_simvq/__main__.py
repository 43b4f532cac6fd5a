"""Commands of the package: python -m modeling_simvq --help."""

import argparse
import sys

from . import stream_command


def main(arguments: list[str] | None = None) -> int:
    """Run the command that the command line names; return its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m modeling_simvq", description="SimVQ tokenizers at work."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    stream_command.add_to(commands)
    options = parser.parse_args(arguments)
    try:
        return options.run(options)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
