"""What a run's records say of other methods."""

from types import SimpleNamespace

from hvdlocal.training.metrics import NoMetrics
from hvdlocal.training.recorder import Recorder


def test_data_parallelism_would_average_every_micro_batch():
    recorder = Recorder(NoMetrics(), SimpleNamespace(accumulate=3), None, None, 1.0, gradient_bytes=100)
    assert recorder.data_parallel_bytes(5) == 1500
