"""Builds guest images by themselves: ``python -m provision DIRECTORY [RUNTIME...]`` prints the folder of each."""

from __future__ import annotations

import sys
from pathlib import Path

from provision import image, recipe
from provision.errors import ProvisionError


def main() -> int:
    store, *runtimes = sys.argv[1:] or [""]
    if not store or not set(runtimes) <= {*recipe.RUNTIMES}:
        print(f"usage: python -m provision DIRECTORY [{'|'.join(recipe.RUNTIMES)}]...", file=sys.stderr)
        return 2
    try:
        for runtime in runtimes or [recipe.DOCKER]:
            wanted = recipe.load(runtime=runtime)
            print(image.ensure(Path(store), wanted, lambda line: print(line, file=sys.stderr)).directory)
    except ProvisionError as error:
        print(f"error: {error.message}\nhint: {error.hint}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
