"""Test set-up: CPU, eight virtual devices, highest matmul precision; where the golden cases are."""

import locale
import os
import sys
from pathlib import Path

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("MPLBACKEND", "Agg")
_FLAG = "--xla_force_host_platform_device_count=8"
if _FLAG not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAG}".strip()

ROOT = Path(__file__).resolve().parent.parent


def _folder(variable: str, default: Path) -> Path:
    folder = Path(os.environ.get(variable, default))
    return folder if folder.is_absolute() else (ROOT / folder)


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of reference cases, named by PANTHER_JAX_GOLDEN."""
    folder = _folder("PANTHER_JAX_GOLDEN", ROOT.parent / "shared" / "golden")
    if not folder.is_dir():
        pytest.skip(f"no golden cases at {folder} (set PANTHER_JAX_GOLDEN)")
    return folder


@pytest.fixture(scope="session")
def sample_data() -> Path:
    """The folder of real sample scans, named by PANTHER_JAX_DATA."""
    folder = _folder("PANTHER_JAX_DATA", ROOT.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"no sample scans at {folder} (set PANTHER_JAX_DATA)")
    return folder


@pytest.fixture(autouse=True)
def locale_kept():
    """GDCM, which tests use as an independent reader, leaves the process in the C locale."""
    before = locale.setlocale(locale.LC_ALL)
    yield
    locale.setlocale(locale.LC_ALL, before)


@pytest.fixture(autouse=True)
def no_plugins_of_other_tests():
    """What a test's config files add is not loaded by the workers of a later one."""
    yield
    for name in [n for n in sys.modules if n.startswith("panther_jax_config_")]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def compilation_cache(tmp_path_factory):
    """What several tests of a module compile is compiled once."""
    import jax

    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    jax.config.update(names[0], str(tmp_path_factory.mktemp("cache")))
    jax.config.update(names[1], 0.1)
    yield
    for name, value in before.items():
        jax.config.update(name, value)
