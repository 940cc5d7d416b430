# shellcheck shell=bash
# What this cluster needs, for all templates. Everything is commented out: take what applies, from your site's documentation first.
# Keep a copy of your own outside of the repository with HVDLOCAL_SITE=/path/to/site.sh or `hvdlocal slurm --site`.

# -- modules: the MPI that Horovod was built with. Not Python: the environment has its own.
# module load openmpi

# -- a node's own disk, for staging.sbatch: where TMPDIR is not on it
# export HVDLOCAL_LOCAL_DISK=/local/scratch

# -- the engine, where it is not Horovod. torch needs neither Horovod nor MPI, and takes NCCL from torch's own wheel
# export HVDLOCAL_BACKEND=torch
# export GLOO_SOCKET_IFNAME=ib0     # with torch: the interface of tensors on CPUs, where Gloo chooses a wrong one

# -- Horovod
# export HOROVOD_CYCLE_TIME=5       # ms; hvdlocal's default. Shorter answers sooner and costs more of a core
# export NCCL_DEBUG=INFO            # once on a new cluster: says which network NCCL has chosen. Not in long runs

# -- InfiniBand and RoCE
# Open MPI uses UCX by itself where it was built with it, and NCCL finds the adapters. Only when they choose wrongly:
# export UCX_NET_DEVICES=mlx5_0:1   # https://docs.open-mpi.org/en/v5.0.x/tuning-apps/networking/ib-and-roce.html
# export NCCL_IB_HCA=mlx5           # adapters by prefix   https://docs.nvidia.com/deeplearning/nccl/user-guide/docs/env.html
# export NCCL_SOCKET_IFNAME=ib0     # the interface over which NCCL's ranks first meet (same page)

# -- Slingshot
# NCCL needs the aws-ofi-nccl plugin (often a module). From https://docs.cscs.ch/software/communication/nccl/ :
# export NCCL_NET="AWS Libfabric"            # fail when the plugin is missing instead of falling back to TCP
# export NCCL_NET_GDR_LEVEL=PHB
# export FI_CXI_DISABLE_HOST_REGISTER=1      # registering host memory can deadlock with CUDA's allocations
# export FI_MR_CACHE_MONITOR=userfaultfd
# export FI_CXI_RDZV_GET_MIN=0 FI_CXI_RDZV_THRESHOLD=0 FI_CXI_RDZV_EAGER_SIZE=0   # only against hangs (same page)

# -- EFA (AWS)
# With libfabric >= 1.18 and aws-ofi-nccl >= 1.7 nothing is needed. The older settings (FI_PROVIDER, FI_EFA_USE_DEVICE_RDMA,
# NCCL_PROTO) and when they apply: awsome-distributed-training, 1.architectures/efa-cheatsheet.md on GitHub.
# export NCCL_SOCKET_IFNAME=en               # covers p4d(e) and p5 (same page)

# -- plain Ethernet with several interfaces: MPI and NCCL must not choose docker0 or a management network
# export OMPI_MCA_btl_tcp_if_include=10.0.0.0/8    # https://docs.open-mpi.org/en/v5.0.x/tuning-apps/networking/tcp.html
# export NCCL_SOCKET_IFNAME=eth0
