"""`python -m ccm`."""

import sys

from ccm.cli.parser import main

if __name__ == "__main__":
    sys.exit(main())
