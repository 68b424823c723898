"""Makes what is long to make once a session, though several files import the fixture by its name."""

_made = {}


def once(make, *given):
    """What make(*given) returned the first time; `given` are fixtures and do not count."""
    if make not in _made:
        _made[make] = make(*given)
    return _made[make]
