"""Writing data sets into shards, by any number of ranks, restartable."""
