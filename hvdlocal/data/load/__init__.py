"""Loading batches: the order of samples, each rank's share, and the threads that prepare batches ahead."""
