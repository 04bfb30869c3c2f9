"""`python -m spectune` is the command `spectune`."""

from spectune.cli import main

if __name__ == "__main__":
    main()
