"""`python -m nearfield` is the `nearfield` command."""

from nearfield.cli import main

if __name__ == "__main__":
    main()
