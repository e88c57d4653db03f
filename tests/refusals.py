"""Refusals of many inputs in one case that names every input which was not refused in the words expected."""
import re

def not_refused(says, call, *args, error=ValueError, **kw):
    "None if a call is refused in these words (a pattern), or else what it did instead."
    try:
        result = call(*args, **kw)
    except error as e:
        return None if re.search(says, str(e)) else f"it said: {e}"
    return f"it gave: {str(result)[:100]}"

def check_all(results):
    "Fail with every input whose result is a fault."
    faults = [f"{given!r}: {fault}" for given, fault in results.items() if fault]
    assert not faults, "\n".join(faults)
