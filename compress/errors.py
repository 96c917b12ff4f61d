"""What a user can mend is a CompressError; our own invariants are asserts."""


class CompressError(Exception):
    """One line: where, what it is, what it must be. The command line prints it and exits 2."""


class LimitMissed(CompressError):
    """A validation limit was missed: the command line exits 3 and nothing is emitted without --force."""


def one_of(names, limit: int = 12) -> str:
    """The choices of an error message, cut when there are too many to read."""
    names = list(names)
    return ", ".join(names[:limit]) + (f", ... ({len(names)} in all)" if len(names) > limit else "")


def did_you_mean(word: str, choices) -> str:
    """' did you mean X?' for the nearest choice, or nothing."""
    from difflib import get_close_matches

    near = get_close_matches(str(word), list(choices), 1, 0.6)
    return f"; did you mean {near[0]}?" if near else ""
