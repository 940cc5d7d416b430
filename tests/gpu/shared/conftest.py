"""For tests that all ranks execute together; one rank alone will do, too."""

import pytest


@pytest.fixture(autouse=True)
def _together(request):
    request.getfixturevalue("everyone_is_here")
