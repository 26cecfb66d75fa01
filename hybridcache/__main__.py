"""``python -m hybridcache`` and the console script ``hybridcache``: the command line of ``run.py``."""

from run import main

if __name__ == "__main__":
    main()
