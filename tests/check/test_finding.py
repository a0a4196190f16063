from metavpt.check.finding import Finding, attempt, listed


def test_attempt_keeps_findings() -> None:
    one = Finding("a", "ok", "fine")
    assert attempt("a", "advice", lambda: one) == [one]
    assert attempt("a", "advice", lambda: [one, one]) == [one, one]


def test_attempt_turns_an_error_into_a_finding() -> None:
    def fails() -> Finding:
        raise ZeroDivisionError("by zero\nhere")

    (found,) = attempt("a", "advice", fails)
    assert (found.name, found.verdict, found.advice) == ("a", "failed", "advice")
    assert "ZeroDivisionError: by zero here" in found.measured


def test_listed_cuts_long_lists() -> None:
    assert listed(["a", "b"], most=2) == "a, b"
    assert listed(["a", "b", "c", "d"], most=2) == "a, b and 2 more"
