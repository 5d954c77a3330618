"""`python -m dip_uq` and `dip-uq`: arguments first, since the rest is slow to import. Comes from no notebook."""
import sys

from .arguments import arguments


def main() -> int:
    "What `cli.main` returns; help, version and mistakes end here."
    arguments()
    from .cli import main
    return main()


if __name__ == "__main__": sys.exit(main())
