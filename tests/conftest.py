"""Settings and fixtures that every test file shares."""

import collections
import contextlib
import ctypes
import gc
import importlib.metadata
import os
import pathlib
import re
import signal

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Nearly all of the tests' time is compilation, which this halves; 0 keeps it.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# A third less again, by flags that the XLA of these versions knows: no threads for one
# program, since each core has its worker, and older code for fusions. Flags that are
# given stay as they are.
FLAGS = {"0.8": [], "0.10": ["xla_cpu_use_fusion_emitters=false"], "0.12": []}
*VERSION, _ = importlib.metadata.version("jaxlib").split(".", 2)
if (version := ".".join(VERSION)) in FLAGS:
    older = os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] == "1"
    known = ["xla_cpu_parallel_codegen_split_count=1", *(FLAGS[version] * older)]
    os.environ.setdefault("XLA_FLAGS", " ".join(f"--{flag}" for flag in known))
# What one process has compiled others and later runs load; `pytest --cache-clear`
# removes it. Not where there are several devices: a program's key does not tell how
# the selection is divided among them.
CACHE = pathlib.Path(__file__).parents[1] / ".pytest_cache" / "xla"
if "device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
# Tracing makes many short-lived objects, few of them in cycles.
gc.set_threshold(100_000, 20, 50)

# Compiled code makes the first example of a strategy slow, so no deadline; the
# examples are the same on every machine, so that a failure here fails everywhere.
hypothesis.settings.register_profile(
    "sparse_optax",
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=25,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "sparse_optax"))


@pytest.fixture
def ctrl_c():
    """Ctrl-C as a terminal has it; it is ignored in jobs that a shell put aside."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def data_dir() -> pathlib.Path:
    """The folder with the real data sets, or a skip that says how to get one."""
    folder = os.environ.get("SPARSE_OPTAX_DATA")
    if not folder:
        pytest.skip("SPARSE_OPTAX_DATA is not set: it names the folder of data sets")
    if not pathlib.Path(folder).is_dir():
        pytest.skip(f"SPARSE_OPTAX_DATA={folder} is not a folder")
    return pathlib.Path(folder)


# --- figures of the random tests ------------------------------------------------------
FIGURES = collections.Counter()
MARKS = "<!-- cases -->\n", "<!-- end of cases -->"


def pytest_addoption(parser):
    parser.addoption(
        "--figures",
        metavar="FILE",
        help="with -m fuzz: put the number of cases between the marks of this file",
    )
    parser.addoption(
        "--add-slow",
        action="store_true",
        help="add the slow tests of this run to tests/slow.txt; use --cache-clear",
    )


@pytest.fixture(scope="session")
def figures() -> collections.Counter:
    """Counts the cases of random tests, by what they try."""
    return FIGURES


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    """Adds the cases of one worker to those of the others."""
    FIGURES.update(getattr(node, "workeroutput", {}).get("figures", {}))


def pytest_sessionfinish(session, exitstatus):
    """Writes the figures and the list of slow tests where all tests have passed."""
    config = session.config
    if hasattr(config, "workerinput"):
        config.workeroutput["figures"] = dict(FIGURES)
        return
    if exitstatus:
        return
    if config.getoption("--add-slow"):
        SLOW_LIST.write_text("".join(f"{name}\n" for name in sorted(FOUND_SLOW)))
    if path := config.getoption("--figures"):
        put_figures(pathlib.Path(path), FIGURES)


def put_figures(path: pathlib.Path, figures: collections.Counter) -> None:
    """Writes a table of cases between the marks of a file."""
    start, end = MARKS
    before, _, rest = path.read_text(encoding="utf-8").partition(start)
    _, mark, after = rest.partition(end)
    if not mark:
        raise pytest.UsageError(f"{path} does not hold the marks {start}{end}")
    if not figures:
        raise pytest.UsageError("no random test has run; give -m fuzz as well")
    versions = (f"{x} {importlib.metadata.version(x)}" for x in ("jax", "optax"))
    rows = [f"| {what} | {number:,} |" for what, number in sorted(figures.items())]
    table = "\n".join([f"| {', '.join(versions)} | cases |", "|---|---:|", *rows])
    content = f"{before}{start}{table}\n{end}{after}"
    path.write_text(content, encoding="utf-8")


# --- what the default run leaves out --------------------------------------------------
# `pytest -m exhaustive` runs the rest, and CI runs both. Left out are tests that start
# processes or train for long, those of slow.txt, and of tables whose rows each compile
# a program of their own all but every n-th row.
LONG = (
    "test_checkpoints.py::test_killed_and_restarted",
    "test_checkpoints.py::test_regrow_goes_on_at_another_density",
    "test_checkpoints.py::test_resumed_in_another_process",
    "test_cli.py::test_a_path_that_the_locale_cannot_decode",
    "test_cli.py::test_ctrl_c_of_a_process",
    "test_cli.py::test_killed_process_goes_on_and_ends_the_same",
    "test_cli.py::test_no_worker_outlives_a_run_that_is_told_to_end",
    "test_cli.py::test_reproduce_runs_what_is_missing_once",
    "test_counting.py::test_totals_past_32_bits",
    "test_data.py::test_real_cifar",
    "test_dynamic_sharding.py",
    "test_guides.py::test_a_page_with_devices_of_its_own",
    *(
        f"test_guides.py::test_every_block_runs_and_prints_what_it_says[{page}"
        for page in (
            *("continual", "prune", "reinforcement", "scan-and", "seeds-and", "tour"),
            "transformers",
        )
    ),
    "test_guides.py::test_every_program_runs_alone",
    "test_scale.py",
    "test_selection_sharding.py",
    "test_train.py::test_densities_of_a_cut_share_one_training",
    "test_train.py::test_gsm_is_cut_to_the_largest_weights",
    "test_train.py::test_killed_run_goes_on_bit_for_bit",
    "test_train.py::test_rules_of_one_pool_train_at_their_exact_count",
    "test_train.py::test_run_killed_in_its_base_goes_on_there",
    "test_train.py::test_same_seed_same_run_and_other_seed_another",
    "test_train.py::test_settled_gsm_trains_only_the_largest_weights",
    "test_training_sharding.py",
    "test_two_processes.py",
)
# Tests that took more than a second of processor time to compile and run; the table
# of the contract is thinned instead. `pytest -n auto --cache-clear --add-slow` adds
# those of its run.
SLOW_LIST = pathlib.Path(__file__).with_name("slow.txt")
SLOW = frozenset(SLOW_LIST.read_text().splitlines())
SLOW_SECONDS = 1.0
FOUND_SLOW = set(SLOW)
STARTED = pytest.StashKey[float]()
# Of the contract every sixteenth pair, numbered through all properties, so that each
# transformation and each property is met; of other tables of these files every third
# row, or as said.
PAIRS = 16
COMPILING = (
    *("test_compact", "test_compact_training", "test_control_masks"),
    *("test_dense_first", "test_dense_to_sparse", "test_dynamic_methods"),
    *("test_engine_budget", "test_frozen", "test_gsm", "test_interop"),
    *("test_layerwise", "test_learning_compression", "test_line_search"),
    *("test_models", "test_one_shot", "test_patterns", "test_regularizers"),
    *("test_sampling", "test_selection", "test_soft_sharing", "test_sparse_files"),
    *("test_sparse_momentum", "test_structured", "test_to_sparse", "test_train"),
)
ROWS = {
    "test_every_method_keeps_its_pattern": 13,
    "test_every_method_trains_at_its_exact_count": 9,
}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Marks what the default run leaves out."""
    seen = collections.Counter()
    for item in items:
        name = item.nodeid.split("/")[-1]
        file, _, test = name.partition(".py::")
        test, is_row, _ = test.partition("[")
        if file == "test_contract":
            table, every = file, PAIRS
        elif file in COMPILING and is_row:
            table, every = (file, test), ROWS.get(test, 3)
        else:
            table, every = None, 1
        slow = name in SLOW or name.startswith(LONG)
        if slow or seen[table] % every:
            item.add_marker(pytest.mark.exhaustive)
        seen[table] += 1
    # The long ones first, so that no worker waits for another's at the end.
    items.sort(key=lambda item: not item.nodeid.split("/")[-1].startswith(LONG))


def processor_time() -> float:
    """Seconds of this process, its threads, and the processes that it waited for."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item, nextitem):
    item.stash[STARTED] = processor_time()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Puts the processor time of a test and its fixtures into its last report."""
    report = yield
    if call.when == "teardown":
        seconds = processor_time() - item.stash[STARTED]
        report.user_properties.append(("processor_seconds", seconds))
    return report


# Compiled programs stay in memory; a worker of a long run would grow past 8 GiB.
MOST_BYTES = 4 * 2**30


def resident_bytes() -> int:
    """Memory of this process, where the system tells it."""
    try:
        pages = pathlib.Path("/proc/self/statm").read_text().split()[1]
    except OSError:
        return 0
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def give_back() -> None:
    """Returns free memory to the system, which glibc does not do by itself: without
    it the caches would be cleared after every further test.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item, nextitem):
    if resident_bytes() > MOST_BYTES:
        jax.clear_caches()
        gc.collect()
        give_back()


def pytest_runtest_logreport(report):
    seconds = dict(report.user_properties).get("processor_seconds", 0)
    name = report.nodeid.split("/")[-1]
    if seconds > SLOW_SECONDS and not name.startswith("test_contract.py"):
        FOUND_SLOW.add(name)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Gives all pairs of one transformation to one worker, which compiles it once."""
    from xdist.scheduler import LoadScopeScheduling

    class ByTransformation(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            found = re.search(r"test_contract\.py::\w+\[(\w+)\]$", nodeid)
            return found.group(1) if found else nodeid

    return ByTransformation(config, log)
