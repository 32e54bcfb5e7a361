"""The commands of `dwiml-func`: one module each, for parsing and printing."""

import sys

if sys.platform not in ("linux", "darwin"):  # before any module of ours imports what other systems lack
    print(f"dwiml-func: Expected Linux or macOS. Received: {sys.platform}.", file=sys.stderr)
    raise SystemExit(2)
