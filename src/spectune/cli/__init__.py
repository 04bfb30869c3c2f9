"""The command `spectune`. Every command is one short file; torch is imported only when a command runs."""


def main() -> None:
    """Run the command line and leave with the exit code that `spectune.errors` gives."""
    from spectune.cli.standard_streams import install_for_good

    install_for_good()
    from spectune.cli.app import build_app
    from spectune.training.interrupt import end_at_once

    try:
        build_app()(prog_name="spectune")
    finally:
        end_at_once()


__all__ = ["main"]
