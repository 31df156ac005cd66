"""`python -m gazeguard`: the command line."""

from gazeguard.cli.main import main

if __name__ == "__main__":
    main()
