"""Builds the guest image by itself: ``python -m provision DIRECTORY`` prints the folder of the image."""

from __future__ import annotations

import sys
from pathlib import Path

from provision import image, recipe
from provision.errors import ProvisionError


def main() -> int:
    if len(sys.argv) != 2:
        print("usage: python -m provision DIRECTORY", file=sys.stderr)
        return 2
    try:
        built = image.ensure(Path(sys.argv[1]), recipe.load(), lambda line: print(line, file=sys.stderr))
    except ProvisionError as error:
        print(f"error: {error.message}\nhint: {error.hint}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    print(built.directory)
    return 0


if __name__ == "__main__":
    sys.exit(main())
