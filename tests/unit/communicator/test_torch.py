"""The engine over torch.distributed: how its ranks find each other, and what it does with CUDA tensors."""

import math
import socket
import sys
import threading
import types
import warnings

import pytest
import torch

from hvdlocal.communicator import CollectiveTimeoutError, LaunchError, launch, launched
from hvdlocal.communicator.rendezvous import MeetingPoint, find_meeting_point, first_node, open_store
from hvdlocal.communicator.torch_backend import TorchCommunicator

SLURM = {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "1", "SLURM_STEP_NODELIST": "n[03-04]"}
BY_HAND = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
TORCHRUN = BY_HAND | {"TORCHELASTIC_RUN_ID": "none"}
ALONE = {"RANK": "0", "WORLD_SIZE": "1", "TORCHELASTIC_RUN_ID": "none"}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "2",
    "OMPI_COMM_WORLD_SIZE": "6",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}


@pytest.fixture
def environment(monkeypatch):
    """Sets variables in an environment without a launcher."""
    for launcher in (*launched._LAUNCHERS, launched._TORCHRUN):
        for name in filter(None, launcher):
            monkeypatch.delenv(name, raising=False)
    for name in (
        "MASTER_ADDR",
        "MASTER_PORT",
        "SLURM_STEP_NODELIST",
        "SLURM_JOB_NODELIST",
        "TORCHELASTIC_USE_AGENT_STORE",
        "TORCHELASTIC_RUN_ID",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("hvdlocal.communicator.threaded.atexit.register", lambda leave: None)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    return lambda **variables: [monkeypatch.setenv(name, value) for name, value in variables.items()]


@pytest.mark.parametrize(
    ("variables", "rank", "size", "local", "by_srun"),
    [
        ({}, None, None, None, False),
        (SLURM, 1, 4, None, True),
        (TORCHRUN, 5, 8, (1, 4), False),
        (OPEN_MPI, 2, 6, (0, 2), False),
        (SLURM | TORCHRUN, 5, 8, (1, 4), False),
        (SLURM | OPEN_MPI, 2, 6, (0, 2), False),
        (OPEN_MPI | TORCHRUN, 5, 8, (1, 4), False),
        (BY_HAND, 5, 8, (1, 4), False),
        (BY_HAND | {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}, 5, 8, (1, 4), False),
        # Left over from elsewhere.
        (OPEN_MPI | BY_HAND, 2, 6, (0, 2), False),
        (OPEN_MPI | ALONE, 2, 6, (0, 2), False),
        (SLURM | ALONE, 1, 4, None, True),
        (SLURM | {"WORLD_SIZE": "64"}, 1, 4, None, True),
        ({"RANK": "²", "WORLD_SIZE": "8"}, None, None, None, False),
        ({"PMI_RANK": "0", "PMI_SIZE": "2", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "2"}, 0, 2, (0, 2), False),
    ],
)
def test_what_launchers_tell(environment, variables, rank, size, local, by_srun):
    environment(**variables)
    told = launched.launched_rank(), launched.launched_size(), launched.launched_local(), launched.launched_by_srun()
    assert told == (rank, size, local, by_srun)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node7", "node7"),
        ("a,b", "a"),
        ("n[03-04]", "n03"),
        ("n[3,7-9],m1", "n3"),
        ("rack[1-2]n[10-12],x", "rack1n10"),
        ("c1-0[2-3]", "c1-02"),
        ("gpu[2]-ib,other", "gpu2-ib"),
    ],
)
def test_first_node_of_a_list(nodes, first):
    assert first_node(nodes) == first


def test_where_the_ranks_meet(environment, monkeypatch):
    environment(**SLURM, SLURM_JOB_ID="1000", SLURM_STEP_ID="3")
    assert find_meeting_point(4) == MeetingPoint(
        "n03", 15000 + 16003 % 15000, "the first node of Slurm's step (n[03-04])"
    )
    environment(MASTER_ADDR="head")
    assert (find_meeting_point(4).host, find_meeting_point(4).port) == ("head", 29500)
    environment(MASTER_PORT="1234")
    assert find_meeting_point(4).port == 1234
    for port in ("0", "65536", "http", "-1"):
        environment(MASTER_PORT=port)
        with pytest.raises(LaunchError, match=f"MASTER_PORT='{port}': give the number of a free port"):
            find_meeting_point(4)


@pytest.mark.parametrize(("hosts", "host"), [(["a", "a"], "localhost"), (["a", "b"], "a")])
def test_mpi_tells_where_the_ranks_meet(environment, monkeypatch, hosts, host):
    """Also where mpirun was started inside a Slurm job, whose list of nodes is that of its daemons."""
    environment(**SLURM, **OPEN_MPI)
    world = types.SimpleNamespace(size=2, allgather=lambda mine: hosts, bcast=lambda port: 4321)
    module = types.ModuleType("mpi4py")
    module.MPI = types.SimpleNamespace(COMM_WORLD=world)
    monkeypatch.setitem(sys.modules, "mpi4py", module)
    assert find_meeting_point(2) == MeetingPoint(host, 4321, "MPI")
    with pytest.raises(LaunchError, match=r"started 6 ranks, but mpi4py sees 2: .* set MASTER_ADDR"):
        find_meeting_point(6)
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(
        LaunchError, match=r"the 6 ranks do not find each other: .* set MASTER_ADDR .* torchrun, or install"
    ):
        find_meeting_point(6)


def test_a_host_that_is_not_there_and_a_port_that_is_taken():
    with pytest.raises(LaunchError, match=r"rank 1 cannot reach port 9 of no\.invalid \(from x\).*: set MASTER_ADDR"):
        open_store(MeetingPoint("no.invalid", 9, "x"), 1, 1.0)
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        point = MeetingPoint("localhost", taken.getsockname()[1], "x")
        with pytest.raises(LaunchError, match=r"rank 0 cannot serve port .* of localhost"):
            open_store(point, 0, 5.0)


def test_one_process_without_a_launcher(environment):
    alone = TorchCommunicator(5.0)
    assert (alone.rank, alone.size, alone.local_rank, alone.local_size) == (0, 1, 0, 1)
    tensor = torch.ones(2)
    alone.sum_(tensor, "test.sum")
    assert tensor.eq(1).all()
    assert alone.gather("x", "test.gather") == ["x"]
    assert alone.split([[0]], "test.split").size == 1
    alone.shutdown()
    assert not alone.is_open


def test_a_rank_that_its_launcher_does_not_count(environment):
    environment(PMI_RANK="3", PMI_SIZE="2")
    with pytest.raises(LaunchError, match="numbers this process 3 of 2 ranks"):
        TorchCommunicator(5.0)


@pytest.mark.parametrize("size", [{}, {"WORLD_SIZE": "two"}])
def test_a_rank_without_a_number_of_ranks(environment, size):
    """It would be a job of its own, and so would be all others."""
    environment(RANK="1", **size)
    with pytest.raises(LaunchError, match=r"RANK='1', WORLD_SIZE='(two)?': give both"):
        TorchCommunicator(5.0)


def test_a_network_interface_that_is_not_there(environment):
    """As well: a deadline without an end."""
    with socket.socket() as free:
        free.bind(("", 0))
        environment(RANK="0", WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT=str(free.getsockname()[1]))
    environment(GLOO_SOCKET_IFNAME="ib99")
    with pytest.raises(LaunchError, match=r"rank 0 of 2 on .*ib99.*GLOO_SOCKET_IFNAME \(now 'ib99'\)"):
        TorchCommunicator(math.inf)


def test_the_deadline_names_where_the_ranks_meet(environment, monkeypatch):
    environment(RANK="1", WORLD_SIZE="2", MASTER_ADDR="head", MASTER_PORT="1234")
    never = threading.Event()
    monkeypatch.setattr("hvdlocal.communicator.torch_backend.open_store", lambda *point: never.wait(60))
    with pytest.raises(CollectiveTimeoutError, match=r"rank 1 of 2 on .* 'hvdlocal\.meet at port 1234 of head'"):
        TorchCommunicator(0.05)
    never.set()


@pytest.mark.parametrize(
    ("missing", "named"), [(False, "HVDLOCAL_BACKEND=mpi4py, or"), (True, "or use torch.distributed")]
)
def test_without_horovod_the_message_names_what_works(monkeypatch, missing, named):
    def no_horovod(*args, **kwargs):
        raise ImportError("no Horovod here")

    monkeypatch.setattr(launch, "HorovodCommunicator", no_horovod)
    monkeypatch.setattr(launch, "find_spec", lambda name: None if missing else name)
    with pytest.raises(ImportError, match=f"no Horovod here.*{named}.*HVDLOCAL_BACKEND=torch"):
        launch.init("horovod")


class GpuTensor:
    """Stands in for a CUDA tensor of one element, on a machine without a GPU."""

    is_cuda = True
    device = "cuda:0"
    dtype = torch.float32

    def __init__(self):
        self.value = torch.zeros(1)

    def numel(self):
        return 1

    def cpu(self):
        return self.value.clone()

    def copy_(self, host):
        self.value.copy_(host)


class Group:
    """A process group that adds a number and notes what it was given."""

    def __init__(self, number):
        self.number, self.given = number, []

    def allreduce(self, tensors, options):
        self.given += tensors
        target = getattr(tensors[0], "value", tensors[0])
        return types.SimpleNamespace(is_completed=lambda: True, wait=lambda: target.add_(self.number))


@pytest.mark.parametrize("uuids", [("x", "y"), ("x", "x")], ids=["a GPU each", "one GPU"])
def test_cuda_tensors(environment, monkeypatch, uuids):
    """NCCL sums them where they are; where ranks share a GPU, Gloo sums copies, and that is said once."""
    ranks = TorchCommunicator(5.0)
    gloo, nccl = Group(10), Group(1)
    used = []

    class Stream:
        def __init__(self, device):
            self.awaited = []
            self.synchronize = lambda: None

        def wait_event(self, event):
            self.awaited.append(event)

    class Using:
        def __init__(self, stream):
            used.append((stream.awaited, threading.current_thread().name))

        __enter__ = __exit__ = lambda *args: None

    ranks._groups[ranks.job_ranks] = gloo
    monkeypatch.setattr(ranks, "_agree_on", lambda what: None)
    monkeypatch.setattr(ranks, "_exchange", lambda data: [f"node {uuid}".encode() for uuid in uuids])
    monkeypatch.setattr(ranks, "_nccl", lambda device: nccl)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(uuid="x"))
    caller = types.SimpleNamespace(record_event=lambda: "what the caller has begun")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: caller)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", Using)
    tensor = GpuTensor()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(2):
            ranks._wait(ranks._start_sum(tensor, "test.sum"), "test.sum")
    assert tensor.value == (20 if uuids == ("x", "x") else 2)
    assert nccl.given == ([] if uuids == ("x", "x") else [tensor, tensor])
    assert [str(one.message)[:30] for one in said] == (
        ["several ranks use one GPU, whi"] if uuids == ("x", "x") else []
    )
    assert used == [(["what the caller has begun"], "hvdlocal-torch-0")] * 2
    ranks.shutdown()
