"""`python -m nomatmul` is the command `nomatmul`."""

from nomatmul.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
