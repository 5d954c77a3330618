"""`python -m dip_uq` is the command `dip-uq`. Like __init__.py, this file comes from no notebook."""
import sys

from .cli import main

if __name__ == "__main__": sys.exit(main())
