"""Run the command line as `python -m mediator_cli`."""

from mediator_cli.cli.app import main

if __name__ == "__main__":
    main()
