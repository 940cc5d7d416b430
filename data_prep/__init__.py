"""Turning data sets into hvdlocal's HDF5 shards: `python -m data_prep --help`. One module per data set."""
