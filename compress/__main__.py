"""``python -m compress``: the same entry point as ``hcompress``."""

from .cli.main import main

if __name__ == "__main__":
    main()
