"""`python -m pairsift` is the same as `pairsift`."""

from pipeline.cli import main

if __name__ == "__main__":
    main()
