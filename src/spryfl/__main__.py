"""`python -m spryfl` is `spry`."""

from spryfl.cli.main import main

if __name__ == "__main__":
    main()
