# The commands of the project. Each sets up what it needs: `make demo` and `make test` work in a
# fresh clone on a machine with Python, gcc and make, and what is missing is named in one line.
#
#   make test PYTHON=python3.12 VENV=.venv-3.12     another Python, in an environment of its own
#   make test PYTEST_ARGS='-x -k lock'              some of the tests
#   CFLAGS=-O0 make test VENV=.venv-O0              CFLAGS and CC reach the build of the core

PYTHON ?= python3
VENV ?= .venv
DIST ?= dist
PYTEST_ARGS ?=

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help demo demo-cluster test soak sanitize sanitize-threads sanitize-memory sanitize-suite bench bench-check \
    bench-cluster bench-full instructions lint lint-ruff lint-mypy lint-cython lint-c format docs wheel wheel-check clean crash-links \
    sanitizers sanitize-links FORCE

py := $(VENV)/bin/python
pip := $(py) -m pip --disable-pip-version-check
core := shmdomains/memory/_core
handwritten := $(filter-out $(core)/core.c,$(wildcard $(core)/*.c))
say := @printf '==> %s\n'

help: ## list the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-13s %s\n", $$1, $$2}' Makefile

demo: $(VENV)/.installed ## set up, then run the main job on the samples while workers are killed
	$(say) 'demo: workers change the domains of tests/data/domains, some are killed, nothing is lost'
	@$(VENV)/bin/shmdomains stress tests/data/domains --kill

demo-cluster: $(VENV)/.installed-cluster ## the same on PostgreSQL: two hosts, and the server is killed, too
	$(say) 'demo-cluster: two hosts use one list; workers, hosts and the server are killed, nothing is lost'
	@$(VENV)/bin/shmdomains stress tests/data/domains --hosts 2 --kill --kill-server --seconds 10

test: $(VENV)/.installed-test ## set up, then run the tests
	$(say) 'test: pytest on tests, on the docstrings and on the README'
	@$(py) -m pytest $(PYTEST_ARGS)

soak: $(VENV)/.installed-test ## set up, then run what proves that nothing is lost, at its larger sizes
	$(say) 'soak: kills, histories, models and damage at their larger sizes'
	@SHMDOMAINS_SOAK=1 $(py) -m pytest -m soak -rs --durations=20 $(PYTEST_ARGS)

sanitize: sanitize-threads sanitize-memory sanitize-suite ## set up, then run the tests under ASan, UBSan, TSan and valgrind

bench: $(VENV)/.installed-bench ## set up, then measure beside what would be used instead: a quick run
	$(say) 'bench: a quick run; figures and plots go into build/bench'
	@$(py) -m bench quick

bench-full: $(VENV)/.installed-bench ## the same with everything, into bench/results
	$(say) 'bench: a full run; figures and plots go into bench/results'
	@$(py) -m bench full

bench-cluster: $(VENV)/.installed-bench ## the same for the list on PostgreSQL: beside psycopg by hand, and etcd
	$(say) 'bench-cluster: a quick run; figures go into build/bench'
	@$(py) -m bench.cluster quick

bench-check: $(VENV)/.installed-test $(VENV)/.installed-bench ## set up, then compare all that bench measures with a dict
	$(say) 'bench-check: every contestant gives the right answers, and a small run runs'
	@$(py) -m pytest tests/test_bench.py tests/test_bench_cluster.py $(PYTEST_ARGS)

instructions: $(VENV)/.installed-test ## record the instruction counts that `make test` compares with
	$(say) 'instructions: counting the hot paths with callgrind'
	@$(py) -m bench.instructions --record

lint: lint-ruff lint-mypy lint-cython lint-c ## set up, then run ruff, mypy, cython-lint and gcc's warnings

lint-ruff: $(VENV)/.installed-lint
	$(say) 'lint: ruff'
	@$(py) -m ruff check .
	@$(py) -m ruff format --check .

lint-mypy: $(VENV)/.installed-lint
	$(say) 'lint: mypy'
	@$(py) -m mypy

# Of a .pxi cython-lint looks at the layout only, so it is given each under another name.
lint-cython: $(VENV)/.installed-lint
	$(say) 'lint: cython-lint'
	@rm -rf build/lint && mkdir -p build/lint
	@for part in $(core)/*.pxi; do cp "$$part" "build/lint/$$(basename "$$part" .pxi).pyx"; done
	@PATH="$(abspath $(VENV))/bin:$$PATH" cython-lint $(core)/*.py[xd] build/lint/*.pyx

# What is written by hand compiles without a warning; what Cython writes is its own business. The
# binding's own header needs Python's.
lint-c: $(VENV)/pyvenv.cfg
	$(say) 'lint: the core in C, warnings are errors'
	@for source in $(handwritten); do \
	    $(CC) -std=c11 -O2 -fvisibility=hidden -pthread -Wall -Wextra -Werror \
	        -I$(core) -c -o /dev/null $$source || exit 1; \
	done
	@echo '#include "handle.h"' | $(CC) -std=c11 -Wall -Wextra -Werror -fsyntax-only -I$(core) \
	    -isystem $$($(py) -c 'import sysconfig as s; print(s.get_path("include"))') -x c -

format: $(VENV)/.installed-lint ## let ruff lay out the Python files
	@$(py) -m ruff check --fix .
	@$(py) -m ruff format .

docs: $(VENV)/.installed-docs ## build the API pages and the man pages into build/docs and build/man
	$(say) 'docs: pages into build/docs, man pages into build/man'
	@rm -rf build/docs build/man
	@$(py) .ci/make_docs.py build

# The wheel is built from the sdist, so the sdist is known to be complete and nothing stale gets in.
# Its tag is linux_x86_64 (or what the machine is): it runs on glibc at least as new as the builder's.
wheel: $(VENV)/.installed-build ## build the sdist and the wheel into dist/
	$(say) 'wheel: sdist and wheel into $(DIST)'
	@rm -rf $(DIST)/shmdomains-*
	@$(py) -m build --outdir $(DIST) . > $(VENV)/build.log 2>&1 || { cat $(VENV)/build.log; exit 1; }
	@ls $(DIST)/shmdomains-*

wheel-check: wheel ## install the wheel where there is no compiler, and use it
	$(say) 'wheel-check: a fresh environment, no compiler in reach'
	@$(py) .ci/check_wheel.py $(DIST)/shmdomains-*.whl tests/data/domains

clean: ## remove what was built, the environment included
	rm -rf build dist *.egg-info .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis
	rm -f $(core)/core.c $(core)/core.html $(core)/*.so
	find shmdomains tests -name __pycache__ -type d -prune -exec rm -rf {} +

# --- the environment --------------------------------------------------------------------------

define check_machine
@command -v $(PYTHON) > /dev/null || { echo 'shmdomains: there is no $(PYTHON): apt install python3' >&2; exit 1; }
@$(PYTHON) .ci/check_machine.py
endef

# A PYTHON that is asked for is the one that is used.
version = $(shell $(1) -c 'import sys; print(sys.version)' 2>/dev/null)
ifneq ($(origin PYTHON),file)
held := $(call version,$(py))
ifneq ($(held),)
ifneq ($(held),$(call version,$(PYTHON)))
ifeq (,$(filter help clean,$(MAKECMDGOALS)))
$(error $(VENV) holds another Python than $(PYTHON): name another VENV=, or remove this one)
endif
endif
endif
endif

# An environment is made anew when its pip cannot be imported (the set-up was interrupted, the
# system's Python replaced) or it says it lies elsewhere (the tree was moved or copied, and its
# scripts and the editable install still point to the old place). It is emptied first only if it was
# filled here: VENV may name somebody's own, made without pip.
venv_is_sound := grep -qF '$(abspath $(VENV))' $(VENV)/bin/activate && $(py) -c 'import pip'

$(VENV)/pyvenv.cfg: $(shell { $(venv_is_sound); } 2> /dev/null || echo FORCE)
	$(check_machine)
	$(say) "setting up $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $$(test ! -e $(VENV)/.installed || echo --clear) $(VENV)
	@touch $@

# The package is installed editable: Python files are used where they lie, the core is built beside
# them when one of its sources is newer than the installation. The stamp holds the path of the shared
# object that belongs to it: when that is gone (git clean) or newer than the stamp (another
# environment built it, maybe with other CFLAGS), the installation is made again. Nothing built
# earlier is trusted, whatever its time: it may come from another checkout.
build_inputs := pyproject.toml $(wildcard $(core)/*.pyx $(core)/*.pxd $(core)/*.pxi $(core)/*.h) $(handwritten)
core_is_ours := core=$$(cat $(VENV)/.installed) && test -e "$$core" && ! test "$$core" -nt $(VENV)/.installed
core_changed := $(shell { $(core_is_ours); } 2> /dev/null || echo FORCE)

$(VENV)/.installed: $(VENV)/pyvenv.cfg $(build_inputs) $(core_changed)
	$(call install,)

# libvirt's binding is built against its headers; its tests are skipped, and say so, without them.
$(VENV)/.installed-test: $(VENV)/pyvenv.cfg $(build_inputs) $(core_changed)
	$(call install,[test])
	@! pkg-config --exists libvirt 2> /dev/null || $(pip) install --quiet 'libvirt-python>=7.0' || true
	@touch $@

$(VENV)/.installed-cluster: $(VENV)/pyvenv.cfg $(build_inputs) $(core_changed)
	$(call install,[postgres-embedded])
	@touch $@

# The linters read sources: a changed one is no reason to build the core again.
$(VENV)/.installed-lint: $(VENV)/pyvenv.cfg pyproject.toml
	$(call install,[lint])
	@touch $@

$(VENV)/.installed-bench: $(VENV)/pyvenv.cfg $(build_inputs) $(core_changed)
	$(call install,[bench])
	@touch $@

$(VENV)/.installed-docs: $(VENV)/pyvenv.cfg $(build_inputs) $(core_changed)
	$(call install,[docs])
	@touch $@

$(VENV)/.installed-build: $(VENV)/pyvenv.cfg pyproject.toml
	$(check_machine)
	@$(pip) install --quiet 'build>=1.2'
	@touch $@

# The Python files of the package as links in another place, where a core of its own is built. What
# leads to a file that was moved goes.
link_package = @mkdir -p $(1) && find $(1) -xtype l -delete && cd shmdomains && \
    find . -name '*.py' -printf '%h\n' | sort -u | (cd $(abspath $(1)) && xargs mkdir -p) && \
    find . -name '*.py' -o -name '*.pyi' | (cd $(abspath $(1)) && xargs -I @ ln -sf '$(abspath shmdomains)/@' @)

# The core once more, under the same name, with a hook in front of each store into a segment that
# kills the process there (tests/test_crash_points.py asks for the file of the Python that runs it).
# It stays in build/: the Python files are links, and nothing of it gets into a wheel.
crash := build/crash-points/shmdomains
crash_hooks := tests/crash_points.c tests/every_store.c

crash-links:
	$(call link_package,$(crash))

$(crash)/memory/_core/core%.so: $(build_inputs) $(crash_hooks) | crash-links
	$(say) 'building the core with crash points into $(@D)'
	@$(py) -m cython -3 -o $(@:.so=.c) $(core)/core.pyx
	@$(CC) -DSD_CRASH_POINTS -std=c11 -O1 -fvisibility=hidden -pthread -fPIC -shared $(CFLAGS) \
	    -I$(core) -I$$($(py) -c 'import sysconfig as s; print(s.get_path("include"))') \
	    -o $@.new $(@:.so=.c) $(handwritten) $(crash_hooks)
	@mv $@.new $@

# --- the sanitizers ---------------------------------------------------------------------------

# Builds of the core in build/sanitize, of which nothing is shipped. The suite runs there, in a tree
# of links whose package has a core under AddressSanitizer and UndefinedBehaviorSanitizer:
# - PYTHONMALLOC=malloc: Python's own allocator would hide the blocks from ASan;
# - detect_leaks=0: an interpreter keeps much until its end (the C unit tests look for leaks);
# - allocator_may_return_null=1: tests that ask for too much memory expect MemoryError;
# - abort_on_error=1: a finding is the death of the process, which no test takes for its own doing.
sanitize := build/sanitize
sanitized_core := $(sanitize)/shmdomains/memory/_core
c_tests := tests/core_test.c $(handwritten) $(wildcard $(core)/*.h)
c_flags := -std=c11 -O1 -g -fno-omit-frame-pointer -pthread -I$(core)

sanitizers:
	@for library in libasan libubsan libtsan; do \
	    test -e "$$($(CC) -print-file-name=$$library.so)" || { \
	        echo "shmdomains: missing: gcc's $$library; apt install libgcc-$$($(CC) -dumpversion)-dev" >&2; \
	        exit 1; }; \
	done

# The threads of the C unit tests, each as if it were a process, on one mapping. No suppressions:
# what is shared is atomic words and mutexes. TSan does not know fences (-Wtsan says so); what they
# order here are atomic words again, so what it misses cannot raise a false alarm, but it is no
# proof of their order either: that is what the model and the readers among writers are for.
sanitize-threads: $(sanitize)/core_test.tsan
	$(say) 'sanitize: the concurrency tests of the core in one process, under TSan'
	@for part in views threads; do for seed in 1 2 3; do \
	    TSAN_OPTIONS=halt_on_error=1:second_deadlock_stack=1 $< $$part $$seed || exit 1; \
	done; done

$(sanitize)/core_test.tsan: $(c_tests) | sanitizers sanitize-links
	@$(CC) $(c_flags) -Wall -Wextra -Werror -Wno-tsan -fsanitize=thread \
	    -Wl,--wrap=pthread_mutex_clocklock -o $@ $(filter %.c,$^)

# What ASan does not see: decisions on values that nobody ever wrote. (Helgrind is no use: it takes
# every atomic word of C11 for a race.)
sanitize-memory: $(sanitize)/core_test
	@if ! command -v valgrind > /dev/null; then \
	    echo 'sanitize: no valgrind (apt install valgrind), so nobody looks for unwritten values'; \
	    exit 0; \
	fi; \
	printf '==> %s\n' 'sanitize: the unit tests of the core under valgrind'; \
	for part in index heap stores threads; do \
	    valgrind -q --error-exitcode=1 --leak-check=no $< $$part 1 || exit 1; \
	done

$(sanitize)/core_test: $(c_tests) | sanitize-links
	@$(CC) $(c_flags) -Wall -Wextra -Werror -DSD_CRASH_POINTS -o $@ $(filter %.c,$^)

sanitize-suite: sanitizers $(VENV)/.installed-test sanitize-links
	$(say) 'sanitize: building the core under ASan and UBSan'
	@$(py) -m cython -3 -o $(sanitized_core)/core.c $(core)/core.pyx
	@$(CC) $(c_flags) -fsanitize=address,undefined -fno-sanitize-recover=all -DCYTHON_USE_FREELISTS=0 -fvisibility=hidden \
	    -fPIC -shared -I$$($(py) -c 'import sysconfig as s; print(s.get_path("include"))') \
	    -o $(sanitized_core)/core$$($(py) -c 'import sysconfig as s; print(s.get_config_var("EXT_SUFFIX"))') \
	    $(sanitized_core)/core.c $(handwritten)
	$(say) 'sanitize: pytest under ASan and UBSan; what is skipped says why'
	@cd $(sanitize) && env SHMDOMAINS_SANITIZED=1 PYTHONPATH="$$PWD" PYTHONMALLOC=malloc \
	    ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1:abort_on_error=1 \
	    UBSAN_OPTIONS=print_stacktrace=1 \
	    LD_PRELOAD="$$($(CC) -print-file-name=libasan.so) $$($(CC) -print-file-name=libubsan.so)" \
	    $(abspath $(py)) -m pytest -rs -p no:cacheprovider --timeout=300 -o faulthandler_timeout=350 \
	    $(PYTEST_ARGS)

sanitize-links:
	$(call link_package,$(sanitize)/shmdomains)
	@ln -sfn $(abspath tests) $(sanitize)/tests
	@ln -sfn $(abspath bench) $(sanitize)/bench
	@ln -sf $(abspath pyproject.toml) $(abspath README.md) $(sanitize)/

define install
$(say) 'building the core, installing shmdomains$(1) and what it needs into $(VENV)'
$(check_machine)
@rm -f $(core)/core.c $(core)/core$$($(py) -c 'import sysconfig as s; print(s.get_config_var("EXT_SUFFIX"))')
@$(pip) install --quiet --editable '.$(1)'
@$(py) -c 'import shmdomains.memory._core.core as core; print(core.__file__)' > $(VENV)/.installed.new
@mv $(VENV)/.installed.new $(VENV)/.installed
endef

FORCE:
