"""`hvdlocal report`: reads the records of runs and writes a page of figures and tables."""
