"""``python -m fedtailor``."""

from fedtailor.cli import main

if __name__ == "__main__":
    main()
