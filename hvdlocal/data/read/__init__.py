"""Reading data sets: shards or a user's own HDF5 files, held in memory, mapped, or streamed."""
