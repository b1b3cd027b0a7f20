"""Make `python -m segtrain` equivalent to the console script `segtrain`."""

from segtrain.cli.main import main

if __name__ == "__main__":
    main()
