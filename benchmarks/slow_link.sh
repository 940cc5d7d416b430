#!/usr/bin/env bash
# Runs a command on two ranks with a real, slow network between them: two network namespaces joined by a pair of virtual
# Ethernet devices, each with a token-bucket filter, and MPI over TCP.
#
#   [RANKS=2] benchmarks/slow_link.sh RATE [COMMAND…]        RATE as tc has it: 100mbit, 1gbit, 10gbit
#
# With more RANKS, an even number, the first half is on one side of the link and the second half on the other: two islands. The
# ranks of a side talk over its loopback device, which has no limit.
#
# Without a COMMAND: benchmarks/slow_link.py. Needs root (or CAP_NET_ADMIN and CAP_SYS_ADMIN), ip and tc; where these are not
# to be had it says so and ends well. Latency is what the kernel's bridge-less veth has, some tens of microseconds.
set -euo pipefail
cd "$(dirname "$0")/.."
rate=${1:?usage: [RANKS=2] benchmarks/slow_link.sh RATE [COMMAND…]}
ranks=${RANKS:-2}
((ranks >= 2 && ranks % 2 == 0)) || { echo "RANKS=$ranks: give an even number of ranks" >&2; exit 2; }
shift
(($#)) || set -- python benchmarks/slow_link.py --rate "$rate"
PATH=$PWD/.venv/bin:$PATH:/usr/sbin:/sbin

skip() { echo "slow link: skipped: $*"; exit 0; }
command -v ip >/dev/null && command -v tc >/dev/null || skip "ip and tc are not installed (Debian: apt-get install iproute2)"
near=slow-near-$$ far=slow-far-$$
ip netns add "$near" 2>/dev/null || skip "this account may not make network namespaces"
trap 'ip netns delete "$near"; ip netns delete "$far" 2>/dev/null || true' EXIT
ip netns add "$far"

near_device=n$$ far_device=f$$ near_address=10.77.0.1 far_address=10.77.0.2
ip link add "$near_device" netns "$near" type veth peer name "$far_device" netns "$far" || skip "veth devices are not available"
for side in near far; do
  space=${!side} device=${side}_device address=${side}_address
  ip netns exec "$space" ip link set lo up
  ip netns exec "$space" ip address add "${!address}/24" dev "${!device}"
  ip netns exec "$space" ip link set "${!device}" up
  ip netns exec "$space" tc qdisc add dev "${!device}" root tbf rate "$rate" burst 256kb limit 64mb ||
    skip "the kernel has no token bucket filter (sch_tbf)"
done

# One mpirun in the near namespace starts all ranks; the second half moves to the far one before it becomes the program. It reaches
# its launcher and its peers over the link and nothing else: shared memory is switched off.
export PMIX_MCA_ptl_tcp_if_include=$near_device,$far_device OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export OMPI_MCA_pml=ob1 OMPI_MCA_btl=tcp,self OMPI_MCA_btl_tcp_if_include=10.77.0.0/24 SLOW_LINK_FAR=$far
ip netns exec "$near" install/mpirun -np "$ranks" bash -c \
  'if ((OMPI_COMM_WORLD_RANK >= OMPI_COMM_WORLD_SIZE / 2)); then exec ip netns exec "$SLOW_LINK_FAR" "$@"; fi; exec "$@"' rank "$@"
