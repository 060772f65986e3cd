"""For some processors XLA fails to compile float16, now and then: no fault of what is tested."""

import pytest

CANNOT_COMPILE = "Failed to materialize symbols"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """Skip a test in which that happened."""
    try:
        return (yield)
    except Exception as error:
        if CANNOT_COMPILE in str(error):
            pytest.skip(f"XLA compiles no float16 for this processor: {CANNOT_COMPILE}")
        raise
