"""What the others see of ranks that die."""

import torch
from support.mortal import Death, run_mortal

from hvdlocal.communicator import Loss


def test_a_loss_in_words():
    assert str(Loss((3,), ("node17",), 7, "x")) == "rank 3 on node17 is lost; the other 7 ranks go on"
    assert str(Loss((0, 2), ("a", "b"), 1, "x")) == "ranks 0 on a, 2 on b are lost; one rank goes on"


def test_what_mortal_ranks_see():
    """The losses come with the collective that is waited for, whichever was under way before."""

    def body(comm):
        seen = []

        def sum_of(value, name):
            tensor = torch.full((2,), float(value))
            wait = comm.start_sum_(tensor, name)
            return tensor, wait

        first, wait_first = sum_of(10**comm.rank, "a")
        second, wait_second = sum_of(10**comm.rank, "b")
        seen.append(comm.size)
        wait_first()
        seen += [first[0].item(), comm.rank, comm.size]
        wait_second()
        seen += [second[0].item(), comm.rank, comm.size]
        seen.append(comm.gather(comm.rank, "c"))
        return seen, [loss.ranks for loss in comm.losses]

    results = run_mortal(4, body, Death(0, "b"), Death(2, "b"))
    assert results[0] is None
    assert results[2] is None
    # 1 + 10 + 100 + 1000 in the first sum, 10 + 1000 in the second.
    assert results[1] == ([4, 1111.0, 1, 4, 1010.0, 0, 2, [0, 1]], [(0, 2)])
    assert results[3] == ([4, 1111.0, 3, 4, 1010.0, 1, 2, [0, 1]], [(0, 2)])


def test_a_broadcast_whose_root_dies():
    def body(comm):
        tensor = torch.full((3,), float(comm.rank))
        comm.broadcast_(tensor, "start")
        return tensor.tolist(), comm.rank, comm.size

    assert run_mortal(3, body, Death(0, "start")) == [None, ([1.0] * 3, 0, 2), ([1.0] * 3, 1, 2)]
