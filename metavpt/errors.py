"""The errors that a user can do something about."""


class MetaVPTError(Exception):
    """One line that names the file or key at fault and says what to do.

    The commands print it without a traceback and exit with status 2.
    """


class UnreachedParameterError(MetaVPTError):
    """A loss does not depend on a parameter that is to be differentiated: a silent zero otherwise."""


class NonFiniteError(MetaVPTError):
    """A value that must be finite is NaN or infinite."""


def check_known(value: str, key: str, *known: str) -> None:
    """Raises MetaVPTError where the value of an option is none of those `known`."""
    if value not in known:
        raise MetaVPTError(f"{key}={value}: known are {', '.join(known)}")
