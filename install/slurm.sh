#!/usr/bin/env bash
# Installs Debian's (or Ubuntu's) Slurm for `make test-slurm` where sbatch, slurmctld, slurmd or munged is missing. The tests start
# these programs themselves, each time with files of their own: no system service is enabled or started here. Changes nothing, says
# why, and exits 1 where it cannot install.
set -euo pipefail
PATH=$PATH:/usr/sbin:/sbin  # where the daemons are, and not on everybody's PATH
say() { printf '[slurm] %s\n' "$*"; }
fail() { say "$*" >&2; exit 1; }

missing=()
for program in sbatch slurmctld slurmd munged; do command -v "$program" >/dev/null || missing+=("$program"); done
((${#missing[@]})) || exit 0
command -v apt-get >/dev/null || fail "no ${missing[*]}, and no apt-get to install Debian's slurm-wlm and munge with"
((EUID == 0)) || fail "no ${missing[*]}, and only root may install them (apt-get install slurm-wlm munge)"

# Debian starts what it installs unless a policy forbids it; a policy that is there already is not ours to change.
policy=/usr/sbin/policy-rc.d
if [[ ! -e $policy ]]; then
  trap 'rm -f "$policy"' EXIT
  printf '#!/bin/sh\nexit 101\n' >"$policy"
  chmod +x "$policy"
fi
new=()
for service in munge slurmctld slurmd; do [[ -e /lib/systemd/system/$service.service ]] || new+=("$service"); done

say "installing slurm-wlm and munge (missing: ${missing[*]})"
export DEBIAN_FRONTEND=noninteractive
install() { apt-get install --quiet --quiet --yes --no-install-recommends slurm-wlm munge; }
log=$(mktemp)
{ install || { apt-get update --quiet --quiet && install; }; } >"$log" 2>&1 ||
  { tail -n 20 "$log" >&2; fail "apt-get could not install them (whole log: $log)"; }
rm -f "$log"

# Their packages also enable them for the next start of the machine.
for service in "${new[@]}"; do update-rc.d "$service" disable >/dev/null 2>&1 || true; done
