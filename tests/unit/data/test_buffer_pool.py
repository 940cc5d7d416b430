import copy
import gc
import pickle
import threading

import numpy as np
import pytest
import torch

from hvdlocal.data.buffer_pool import BufferPool

SHAPE = (64, 3, 32, 32)  # 786 KB as float32


def make(recycler, value=0.0, shape=SHAPE):
    return recycler.empty(shape, torch.float32).fill_(value)


def test_memory_is_used_again_once_the_tensor_is_gone():
    recycler = BufferPool()
    first = make(recycler)
    address = first.data_ptr()
    second = make(recycler)
    assert second.data_ptr() != address
    del first
    assert make(recycler).data_ptr() == address


def test_what_it_makes_is_an_ordinary_tensor():
    for shape, dtype in (
        (SHAPE, torch.float32),
        ((3, 224, 224, 3), torch.uint8),
        ((90_001,), torch.int64),
        ((500, 501), torch.bfloat16),
        ((300_001,), torch.bool),
    ):
        found = BufferPool().empty(shape, dtype)
        assert (found.shape, found.dtype, found.device.type) == (torch.Size(shape), dtype, "cpu")
        assert found.is_contiguous()
        assert found.is_leaf
        assert found._base is None
        assert not found.requires_grad
        assert found.data_ptr() % 64 == 0


@pytest.mark.parametrize("shape", [(0, 3, 32, 32), (5,), (), (4, 0)])
def test_small_and_empty_tensors(shape):
    found = BufferPool().empty(shape, torch.float32)
    assert found.shape == shape


def autograd_saved(tensor):
    weight = torch.ones((), requires_grad=True)
    return (weight * tensor).sum()


class Node:
    pass


def cycle(tensor):
    """Alive until the collector comes round, though nobody can reach it."""
    node = Node()
    node.me, node.tensor = node, tensor
    return node


KEEPERS = {
    "tensor": lambda t: t,
    "view": lambda t: t[3:5, :, 1:],
    "reshaped": lambda t: t.view(-1)[7:9],
    "detached": lambda t: t.detach(),
    "alias of data": lambda t: t.data,
    "numpy": lambda t: t.numpy(),
    "numpy view": lambda t: t.numpy()[1:, ..., ::-1],
    "numpy of a view": lambda t: t[5:].numpy().reshape(-1)[4:8],
    "memoryview": lambda t: memoryview(t.numpy()),
    "storage": lambda t: t.untyped_storage(),
    "tensor from numpy": lambda t: torch.from_numpy(t.numpy()[2:]),
    "dlpack": lambda t: torch.from_dlpack(t),
    "numpy by dlpack": lambda t: np.from_dlpack(t),
    "frombuffer": lambda t: torch.frombuffer(t.numpy(), dtype=torch.uint8),
    "autograd": autograd_saved,
    "cycle": cycle,
    "parameter": lambda t: torch.nn.Parameter(t),
    "other type": lambda t: t.view(torch.int32),
}


@pytest.mark.parametrize("keep", KEEPERS.values(), ids=KEEPERS)
def test_memory_is_not_used_again_while_anything_shares_it(keep):
    gc.collect()
    recycler = BufferPool(idle=8)
    tensor = make(recycler, 1.0)
    address = tensor.data_ptr()
    kept = keep(tensor)
    del tensor
    others = [make(recycler, 2.0) for _ in range(4)]
    assert address not in [other.data_ptr() for other in others]
    del kept, others
    gc.collect()
    assert address in [other.data_ptr() for other in [make(recycler) for _ in range(5)]]


def test_gradients_see_the_values_that_were_saved():
    recycler = BufferPool()
    weight = torch.ones(SHAPE, requires_grad=True)
    loss = (weight * make(recycler, 3.0)).sum()  # multiplication saves the batch for the gradient
    for _ in range(3):
        make(recycler, -1.0)
    loss.backward()
    assert torch.equal(weight.grad, torch.full(SHAPE, 3.0))


def test_a_copy_does_not_hold_the_memory():
    recycler = BufferPool()
    tensor = make(recycler, 1.0)
    address = tensor.data_ptr()
    clone = tensor.clone()
    del tensor
    assert make(recycler, 2.0).data_ptr() == address
    assert torch.equal(clone, torch.ones(SHAPE))


def test_memory_moved_away_is_free():
    recycler = BufferPool()
    tensor = make(recycler, 1.0)
    address = tensor.data_ptr()
    tensor.share_memory_()
    assert tensor.data_ptr() != address
    assert make(recycler, 2.0).data_ptr() == address
    assert torch.equal(tensor, torch.ones(SHAPE))


def test_idle_memory_is_bounded():
    recycler = BufferPool(idle=2)
    held = [make(recycler) for _ in range(10)]
    addresses = [tensor.data_ptr() for tensor in held]
    del held
    assert len(recycler._idle) == 2
    assert {make(recycler).data_ptr() for _ in range(2)} <= set(addresses)
    none = BufferPool(idle=0)
    make(none)
    assert len(none._idle) == 0


def test_sizes_do_not_mix():
    recycler = BufferPool(idle=3)
    small, large = make(recycler), make(recycler, shape=(128, 3, 32, 32))
    addresses = small.data_ptr(), large.data_ptr()
    del small, large
    assert make(recycler, shape=(128, 3, 32, 32)).data_ptr() == addresses[1]
    assert (
        recycler.empty((4 * 64 * 3 * 32 * 32,), torch.uint8).data_ptr() == addresses[0]
    )  # as many bytes, another type


def test_sizes_that_are_not_wanted_any_more_give_way():
    recycler = BufferPool(idle=2)
    for shape in ((100, 3, 32, 32), SHAPE):
        held = [make(recycler, shape=shape) for _ in range(2)]
        held.clear()
    assert sorted(block.numel() for block in recycler._idle) == [64 * 3 * 32 * 32 * 4] * 2


def test_it_may_go_before_its_tensors():
    recycler = BufferPool()
    tensor = make(recycler, 4.0)
    del recycler
    gc.collect()
    assert torch.equal(tensor, torch.full(SHAPE, 4.0))


def test_copies_begin_without_memory():
    recycler = BufferPool(idle=3)
    make(recycler)
    for other in (copy.deepcopy(recycler), pickle.loads(pickle.dumps(recycler))):
        assert other._idle.maxlen == 3
        assert len(other._idle) == 0
    assert len(recycler._idle) == 1


def test_threads_never_share_memory():
    recycler = BufferPool(idle=4)
    faults = []

    def work(number):
        generator = np.random.RandomState(number)
        held = []
        for turn in range(150):
            value = float(number * 1000 + turn)
            tensor = make(recycler, value, (8, 3, 64, 64) if generator.rand() < 0.5 else (16, 3, 64, 64))
            held.append((value, tensor.numpy()[1:] if turn % 2 else tensor[1:]))
            del tensor
            if len(held) > 3:
                value, kept = held.pop(generator.randint(len(held)))
                if not bool((kept == value).all()):
                    faults.append((number, value))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
        assert not thread.is_alive()
    assert faults == []
    assert len(recycler._idle) <= 4


def test_tensors_may_end_in_other_threads():
    recycler = BufferPool()
    addresses = set()
    for _ in range(20):
        box = [make(recycler)]
        addresses.add(box[0].data_ptr())
        thread = threading.Thread(target=box.clear)
        thread.start()
        thread.join(timeout=60)
    assert len(addresses) == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_pinned_memory_waits_for_copies_under_way():
    recycler = BufferPool()
    for value in range(50):
        tensor = recycler.empty((1 << 22,), torch.float32, pinned=True)
        assert tensor.is_pinned()
        on_gpu = tensor.fill_(value).to("cuda", non_blocking=True)
        del tensor
        recycler.empty((1 << 22,), torch.float32, pinned=True).fill_(-1)
        assert bool((on_gpu == value).all())


def test_unfit_arguments_are_refused():
    with pytest.raises(ValueError, match="idle is -1"):
        BufferPool(idle=-1)
