import pytest

from hvdlocal.figures.units import short_seconds_text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0.0 s"),
        (0.0001234, "0.123 ms"),
        (0.0772, "77.2 ms"),
        (0.9994, "999 ms"),
        (0.9996, "1.0 s"),  # not 1e+03 ms
        (77.2, "77.2 s"),
        (245.0, "4:05 min"),
    ],
)
def test_short_times_are_in_milliseconds(seconds, text):
    assert short_seconds_text(seconds) == text
