"""``python -m shmdomains``: the same commands as ``shmdomains``."""

from .cli import main

if __name__ == "__main__":
    main()
