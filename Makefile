# Everything a fresh Debian 12 or Ubuntu with git, make and python3 (3.11 or newer) needs is installed by these targets.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
NEWEST := $(addprefix tests/test_,throwaway.py ask.py lua.py slurm.py slurm_publish.py slurm_extra.py slurm_down.py configless.py sent_back.py kinds.py attacks.py watch.py mixed.py starvation.py bench_slurm.py)
SLURM_PACKAGES := slurm-wlm slurm-wlm-basic-plugins slurm-client munge

.PHONY: demo test newest chaos check bench bench-slurm bench-large bench-load bench-policy clean

demo: $(VENV)/installed | slurm
	$(BIN)/python tests/demo.py

test: $(VENV)/tools | slurm database compiler
	$(BIN)/python -m pytest $(TESTS)

# The way of a job, and asking slurmctld, on a newer Slurm: in a chroot of Debian testing, or with SUITE=trixie of Debian
# 13, which is made once (some minutes) and kept in the user's cache. Where it can't be made that is said, and no fault.
SUITE ?= testing
newest: export SUITE := $(SUITE)
newest:
	@command -v mmdebstrap >/dev/null || $(MAKE) --no-print-directory packages PACKAGES=mmdebstrap || true
	@timeout 600 tests/newest.sh build || true
	@if tests/newest.sh there; then tests/newest.sh run python3 -m pytest -p no:cacheprovider -m slurm $(NEWEST); \
	else echo "rms: !!!!! NOT TESTED ON THE SLURM OF DEBIAN $(SUITE): no chroot could be made here (tests/newest.sh build) !!!!!"; fi

# Everything that can go wrong on a node, at random: at least so many minutes and operations, from this seed on.
MINUTES ?= 1
OPERATIONS ?= 1
chaos: $(VENV)/tools | compiler
	$(BIN)/python tests/chaos.py --minutes $(MINUTES) --operations $(OPERATIONS) $(if $(SEED),--seed $(SEED))

check: $(VENV)/tools
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/tools
	$(BIN)/python benchmarks/hooks.py --write

# The modes of admission side by side on a throw-away Slurm, what publishing costs, and a large job behind small ones:
# less than 20 minutes; 17 more for each further seed.
SEEDS ?= 1
bench-slurm: $(VENV)/tools | slurm
	$(BIN)/python benchmarks/slurm_modes.py --seeds $(SEEDS) --write
	$(BIN)/python benchmarks/publishing.py --write
	$(BIN)/python benchmarks/starvation.py --seeds $(SEEDS) --write

# 64 GPUs and 2,000 jobs, long enough that the GPUs are what is short: 50 minutes.
bench-large: $(VENV)/tools | slurm
	$(BIN)/python benchmarks/slurm_modes.py --nodes 8 --gpus 8 --jobs 2000 --between 45,105 --gap 0.4 --short 0 --modes sums,features --write

# What slurmctld has to do for 1,000 nodes, and with 5,000 jobs waiting, here and in the chroot: a quarter of an hour.
bench-load: $(VENV)/tools | slurm
	$(BIN)/python benchmarks/slurm_load.py --write

bench-policy: $(VENV)/tools
	$(BIN)/python benchmarks/policy_targets.py --write

$(VENV)/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "rms: needs Python 3.11 or newer: make PYTHON=python3.11"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || $(MAKE) --no-print-directory packages PACKAGES=python3-venv
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

# What tests, checks and benchmarks need besides: torch among it, which the constraints hold to one build.
$(VENV)/tools: $(VENV)/installed
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,train]'
	touch $@

# Slurm and munge from the distribution. Where that fails the demo says so and goes on without, and the tests fail in CI.
.PHONY: slurm packages
slurm:
	@command -v slurmctld >/dev/null && command -v slurmd >/dev/null && command -v munged >/dev/null && command -v sbatch >/dev/null || \
	$(MAKE) --no-print-directory packages PACKAGES="$(SLURM_PACKAGES)" || echo "rms: Slurm could not be installed here"

# For the tests of what slurmdbd counts.
.PHONY: database
database:
	@command -v slurmdbd >/dev/null && command -v mariadbd >/dev/null || \
	$(MAKE) --no-print-directory packages PACKAGES="slurmdbd mariadb-server-core mariadb-client-core" || echo "rms: slurmdbd could not be installed here"

# For the tests' stand-in for libnvidia-ml.so.1.
.PHONY: compiler
compiler:
	@command -v gcc >/dev/null || $(MAKE) --no-print-directory packages PACKAGES="gcc libc6-dev"

packages:
	apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq -y --no-install-recommends install $(PACKAGES) >/dev/null

clean:
	rm -rf $(VENV) build dist *.egg-info
