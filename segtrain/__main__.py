"""`python -m segtrain` is the console script `segtrain`."""

from segtrain.cli import main

if __name__ == "__main__":
    main()
