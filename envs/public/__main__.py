"""Shows where registered domains are from and under which terms: python -m envs.public [NAME ...]"""

import sys

from envs.public import REGISTRY, find_source
from metalearn.errors import MetalearnError

if __name__ == "__main__":
    try:
        for source in map(find_source, sys.argv[1:] or REGISTRY):
            print("\n".join(source.describe()))
    except MetalearnError as error:
        raise SystemExit(f"error: {error}") from error
