"""What is in /dev/shm."""

from pathlib import Path


def names_of_data() -> set[Path]:
    """Returns the files in /dev/shm that name hvdlocal's data: those of its Open MPI and of other programs come and go."""
    found = Path("/dev/shm").iterdir()
    # hvdlocal-mpi-…: what Open MPI shares, in the directory that a launcher gives it.
    return {path for path in found if "hvdlocal" in path.name and not path.name.startswith("hvdlocal-mpi-")}
