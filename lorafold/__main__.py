"""`python -m lorafold`, and `torchrun ... -m lorafold`: the same as the command `lorafold`."""

from lorafold.cli.main import main

if __name__ == "__main__":
    main()
