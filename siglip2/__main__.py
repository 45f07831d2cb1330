"""`python -m siglip2`."""

from siglip2.cli.main import main

if __name__ == "__main__":
    main()
