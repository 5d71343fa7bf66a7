"""Runs commands in this process."""

from kvcache import cli


def run(capsys, *argv):
    """Exit code, standard output and standard error."""
    try:
        code = cli.main(list(argv))
    except SystemExit as leaving:
        code = leaving.code
    return code, *capsys.readouterr()
