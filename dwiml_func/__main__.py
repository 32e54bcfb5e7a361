"""`python -m dwiml_func`, the same as `dwiml-func`."""

import sys

from dwiml_func.cli.main import main

if __name__ == "__main__":  # workers of a DataLoader import this module under another name
    sys.exit(main())
