"""The sentence of a script when a package that it needs is not there."""


def not_installed(missing: ImportError) -> SystemExit:
    """The exception to be raised `from None`."""
    return SystemExit(
        f"The experiments expected the package {missing.name!r}, and it is not installed. Run "
        "`pip install -e '.[experiments]'` in the repository's root."
    )
