import pytest


@pytest.fixture(autouse=True)
def _unrendered(unrendered):
    """Pictures are not what these tests are about."""
