"""What becomes of a model's buffers: which are averaged, which stay each rank's own, and in whose memory they lie."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Literal, TypeAlias

import torch
from torch.nn.modules.batchnorm import _NormBase

from hvdlocal.averaging.nonfinite import raise_nonfinite_buffers
from hvdlocal.communicator import Communicator

BufferPolicy: TypeAlias = Literal["average", "local", "reestimate"]
Buffers: TypeAlias = BufferPolicy | Mapping[str, BufferPolicy]
BUFFER_POLICIES = ("average", "local", "reestimate")


def check_policies(buffers: Buffers) -> None:
    """Raises ValueError when `buffers` is neither a policy nor a mapping of patterns to policies."""
    named = buffers if isinstance(buffers, Mapping) else {"": buffers}
    for pattern, policy in named.items():
        given = f"buffers={{{pattern!r}: {policy!r}}}" if isinstance(buffers, Mapping) else f"buffers={buffers!r}"
        if not isinstance(pattern, str):
            raise ValueError(
                f"{given}: a pattern is a string, the name of a buffer or a module, with * for any part of it"
            )
        if policy not in BUFFER_POLICIES:
            choices = f"choose one of {', '.join(BUFFER_POLICIES)}"
            raise ValueError(f"{given}: {choices}" + ("" if pattern else ", or give a mapping of names to these"))


def running_statistics(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The running means and variances of batch and instance normalisation, by name; each tensor once."""
    found: dict[str, torch.Tensor] = {}
    for path, module in model.named_modules():
        if isinstance(module, _NormBase):
            for own_name in ("running_mean", "running_var"):
                buffer = getattr(module, own_name)
                if buffer is not None and not any(buffer is other for other in found.values()):
                    found[f"{path}.{own_name}" if path else own_name] = buffer
    return found


def choose_policies(model: torch.nn.Module, buffers: Buffers) -> dict[str, BufferPolicy]:
    """What is done with every buffer of the model, by name.

    Running statistics of normalisation get the policy `buffers` or, with a mapping, "average"; every other buffer is "local". The
    first pattern that matches a buffer's name, or that of a module around it, changes that. Integers are always "local", and
    only running statistics can be "reestimate".

    Raises:
        ValueError: a pattern matches no buffer, or none for which its policy is possible; or a buffer has two names with
            different policies.
    """
    check_policies(buffers)
    patterns = buffers if isinstance(buffers, Mapping) else {}
    default: BufferPolicy = "average" if isinstance(buffers, Mapping) else buffers
    statistics = {id(buffer) for buffer in running_statistics(model).values()}
    names: dict[int, list[str]] = defaultdict(list)
    tensors: dict[int, torch.Tensor] = {}
    for name, buffer in model.named_buffers(remove_duplicate=False):
        names[id(buffer)].append(name)
        tensors[id(buffer)] = buffer

    def possible(policy: BufferPolicy, key: int) -> bool:
        return policy == "local" or (tensors[key].is_floating_point() if policy == "average" else key in statistics)

    for pattern, policy in patterns.items():
        matched = [key for key, own in names.items() if any(_matches(name, pattern) for name in own)]
        if not matched:
            raise ValueError(
                f"buffers={{{pattern!r}: …}} matches no buffer of the model; there are {_listed(names.values())}"
            )
        if not any(possible(policy, key) for key in matched):
            only = "floating-point buffers" if policy == "average" else "running statistics of batch norm"
            raise ValueError(
                f"buffers={{{pattern!r}: {policy!r}}}: only {only} can have this policy, and {names[matched[0]][0]!r} is not one"
            )
    chosen: dict[str, BufferPolicy] = {}
    for key, own in names.items():
        given = {name: policy_by_name(name, buffers) for name in own}
        explicit = {name: policy for name, policy in given.items() if policy is not None}
        if len(set(explicit.values())) > 1:
            raise ValueError(f"buffers: these are names of one buffer, and must have the same policy: {explicit}")
        policy = next(iter(explicit.values()), default if key in statistics else "local")
        chosen[own[0]] = policy if possible(policy, key) else "local"
    return chosen


def policy_by_name(name: str, buffers: Buffers) -> BufferPolicy | None:
    """The policy that a mapping gives to a buffer of this name; None when no pattern matches, or for a single policy."""
    patterns = buffers if isinstance(buffers, Mapping) else {}
    return next((policy for pattern, policy in patterns.items() if _matches(name, pattern)), None)


def averaged_buffers(model: torch.nn.Module, policies: Mapping[str, BufferPolicy]) -> dict[str, torch.Tensor]:
    """The buffers that are averaged, by name."""
    return {name: buffer for name, buffer in model.named_buffers() if policies[name] == "average"}


def kept_buffers(model: torch.nn.Module, policies: Mapping[str, BufferPolicy]) -> list[str]:
    """The floating-point buffers saved with the model, other than running statistics, that stay each rank's own."""
    statistics = {id(buffer) for buffer in running_statistics(model).values()}
    kept = []
    for name, buffer in model.named_buffers():
        path, _, own_name = name.rpartition(".")
        saved = own_name not in model.get_submodule(path)._non_persistent_buffers_set
        if saved and policies[name] == "local" and buffer.is_floating_point() and id(buffer) not in statistics:
            kept.append(name)
    return kept


def other_buffers(model: torch.nn.Module) -> list[torch.Tensor]:
    """All buffers but those of batch and instance normalisation."""
    norms = {id(own) for one in model.modules() if isinstance(one, _NormBase) for own in one.buffers(recurse=False)}
    return [buffer for buffer in model.buffers() if id(buffer) not in norms]


def average_buffers(
    communicator: Communicator,
    buffers: Mapping[str, torch.Tensor],
    sum_: Callable[[torch.Tensor, str], None],
    when: str,
    faulty: bool = False,
) -> int:
    """Averages buffers that lie anywhere in memory; one collective, or none without buffers.

    Args:
        communicator: the ranks.
        buffers: by name, all on one device.
        sum_: the communicator's, or what times it.
        when: as part of a message, 'at progress 12.0'.
        faulty: whether this rank's buffers are not to be used.

    Returns:
        On how many ranks the buffers are `faulty`; if on any, they are left as they were on all.

    Raises:
        NonFiniteError: on all ranks, when a buffer of one is not finite; it is then the average of the other ranks.
    """
    if not buffers:
        return int(faulty)
    bad = [name for name, buffer in buffers.items() if not buffer.isfinite().all()]
    device = next(iter(buffers.values())).device
    notices = torch.tensor([float(faulty), float(bool(bad))], dtype=torch.float64, device=device)
    flat = torch.cat([part.reshape(-1).double() for part in [*buffers.values(), notices]])
    *parts, notices = flat.split([part.numel() for part in [*buffers.values(), notices]])
    if bad:
        flat[: -len(notices)].zero_()
    if communicator.size > 1:
        sum_(flat, "hvdlocal.buffers")
    faulty_ranks, bad_ranks = map(round, notices.tolist())
    healthy = communicator.size - bad_ranks
    if healthy and not faulty_ranks:
        for buffer, part in zip(buffers.values(), parts, strict=True):
            buffer.copy_(part.div_(healthy).view(buffer.shape))
    if bad_ranks:
        raise_nonfinite_buffers(communicator, bad, healthy, when)
    return faulty_ranks


@contextmanager
def put_back(buffers: Iterable[torch.Tensor]) -> Iterator[None]:
    """Gives the buffers the values of before afterwards."""
    parts = [part for buffer in buffers for part in memory_of(buffer) if part.numel()]
    own = [part.clone() for part in parts]
    try:
        yield
    finally:
        for part, before in zip(parts, own, strict=True):
            part.copy_(before)


@contextmanager
def buffers_of_rank_0(communicator: Communicator, buffers: Iterable[torch.Tensor]) -> Iterator[None]:
    """Within, the buffers are those of rank 0 on every rank; a collective."""
    parts = [part for buffer in buffers for part in memory_of(buffer) if part.numel()]
    if communicator.size == 1:
        yield
        return
    with put_back(parts):
        broadcast_from_rank_0(communicator, {f"hvdlocal.publish.{i}": part for i, part in enumerate(parts)})
        yield


def broadcast_from_rank_0(communicator: Communicator, tensors: Mapping[str, torch.Tensor]) -> None:
    """Replaces tensors on every rank by those of rank 0, all of them those of one rank also where ranks are lost meanwhile.

    Args:
        communicator: the ranks.
        tensors: by the name of the collective, as for `Communicator.broadcast_`.
    """
    own = [tensor.clone() for tensor in tensors.values()] if communicator.survives and len(tensors) > 1 else []
    while True:
        losses = len(communicator.losses)
        for name, tensor in tensors.items():
            communicator.broadcast_(tensor, name)
        if len(communicator.losses) == losses or not own:
            return
        for tensor, before in zip(tensors.values(), own, strict=True):
            tensor.copy_(before)


def memory_of(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Dense tensors in whose memory all elements of a tensor lie: itself; without the repetitions of an expanded one; or the
    indices and values of a sparse one.
    """
    tensor = tensor.detach()
    if tensor.layout == torch.sparse_coo:
        return [tensor._indices(), tensor._values()]
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    shape = [size if stride else min(size, 1) for size, stride in zip(tensor.shape, tensor.stride(), strict=True)]
    return [tensor.as_strided(shape, [stride or 1 for stride in tensor.stride()])]


def describe_layout(tensor: torch.Tensor) -> tuple[object, ...]:
    """What must be equal on two ranks for one to receive the other's tensor."""
    coalesced = tensor.layout == torch.sparse_coo and tensor.is_coalesced()
    parts = [(tuple(part.shape), part.stride(), str(part.dtype)) for part in memory_of(tensor)]
    return tuple(tensor.shape), str(tensor.dtype), str(tensor.layout), coalesced, parts


def check_tensors(model: torch.nn.Module) -> None:
    """Refuses parameters and buffers that cannot be sent to another rank.

    Raises:
        ValueError: naming the tensor.
    """
    for what, named in (("parameter", model.named_parameters()), ("buffer", model.named_buffers())):
        for name, tensor in named:
            if torch.nn.parameter.is_lazy(tensor):
                raise ValueError(f"{what} {name!r} has no shape yet: run one batch through the model before wrapping")
            if tensor.is_meta:
                raise ValueError(
                    f"{what} {name!r} lies on the meta device and has no values: initialise the model first"
                )
            kinds = {"quantized": tensor.is_quantized, "mkldnn": tensor.is_mkldnn, "nested": tensor.is_nested}
            for kind, is_one in kinds.items():
                if is_one:
                    raise ValueError(
                        f"{what} {name!r} is a {kind} tensor, which hvdlocal cannot send: keep it outside of the model's "
                        f"{what}s, or convert it to a dense tensor"
                    )


def check_averaged(buffers: Mapping[str, torch.Tensor], device: torch.device, dtype: torch.dtype | None = None) -> None:
    """Refuses buffers that cannot be averaged.

    Args:
        buffers: by name.
        device: of the parameters.
        dtype: that they must have; None for any.

    Raises:
        ValueError: naming the buffer.
    """
    for name, buffer in buffers.items():
        problem = None
        if buffer.layout != torch.strided:
            problem = (
                f"has the layout {str(buffer.layout).removeprefix('torch.')}, and only dense buffers can be averaged"
            )
        elif buffer.device != device:
            problem = f"lies on {buffer.device}, and the parameters lie on {device}"
        elif dtype is not None and buffer.dtype != dtype:
            problem = f"is {buffer.dtype}, and it would be averaged as {dtype}"
        if problem:
            raise ValueError(f"buffer {name!r} {problem}. Convert it, or choose buffers={{{name!r}: 'local'}}.")


def split_aliases(
    buffers: Mapping[str, torch.Tensor],
) -> tuple[dict[str, torch.Tensor], list[tuple[torch.Tensor, str]]]:
    """Buffers in memory of their own, and tensors that are the same memory as one of them, each with its name."""
    first: dict[object, str] = {}
    distinct, aliases = {}, []
    for name, buffer in buffers.items():
        place = (buffer.data_ptr(), buffer.shape, buffer.stride()) if buffer.numel() else name
        if place in first:
            aliases.append((buffer, first[place]))
        else:
            first[place] = name
            distinct[name] = buffer
    return distinct, aliases


def refuse_shared_memory(
    model: torch.nn.Module, moved: Mapping[str, torch.Tensor], aliases: Iterable[torch.Tensor]
) -> None:
    """Refuses tensors that overlap with one that is about to move to other memory, and would no longer be changed with it.

    Args:
        model: all of its parameters and buffers are looked at.
        moved: that move.
        aliases: that go with them.

    Raises:
        ValueError: naming both.
    """
    going = {id(tensor) for tensor in moved.values()}
    going_along = {id(tensor) for tensor in aliases}
    named = [
        (name, tensor)
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]
        if tensor.layout == torch.strided and tensor.numel() and id(tensor) not in going_along
    ]
    named.sort(key=lambda one: one[1].data_ptr())
    for i, (name, one) in enumerate(named):
        for other_name, other in named[i + 1 :]:
            if other.data_ptr() >= one.data_ptr() + _extent(one):
                break
            if (id(one) in going or id(other) in going) and _overlap(one, other):
                raise ValueError(
                    f"{name!r} and {other_name!r} share memory, which ends when one of them moves into hvdlocal's buffer: give "
                    "both modules the same Parameter (or buffer) object, or make one of them a copy"
                )


def _overlap(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors whose ranges meet have an element in common. Different dtypes count as such."""
    if one.dtype != other.dtype or one.untyped_storage().data_ptr() != other.untyped_storage().data_ptr():
        return True
    numel = one.untyped_storage().nbytes() // one.element_size()
    taken = torch.zeros(numel, dtype=torch.bool, device="cpu")
    taken.as_strided(one.shape, one.stride(), one.storage_offset()).fill_(True)
    return bool(taken.as_strided(other.shape, other.stride(), other.storage_offset()).any())


def _extent(tensor: torch.Tensor) -> int:
    """Bytes from the first element of a tensor to the end of its last."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")


def _listed(names: Iterable[list[str]]) -> str:
    first = [repr(name) for own in names for name in own]
    return ", ".join(first[:10]) + (f" and {len(first) - 10} more" if len(first) > 10 else "") if first else "none"
