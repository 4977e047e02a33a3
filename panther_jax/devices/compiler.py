"""How programs are compiled: options of ``jax.jit`` and the cache of compiled programs."""

import importlib.metadata
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

CPU_LIBRARY_OPTION = "xla_cpu_experimental_ynn_fusion_type"


def compiled(function: Callable[..., Any], **options: Any) -> Any:
    """``jax.jit`` for a program with convolutions; ``options`` are its own."""
    return jax.jit(function, compiler_options=compiler_options(), **options)


@cache
def compiler_options() -> dict[str, str]:
    """Options of :func:`compiled`; none where XLA does not know them.

    On a CPU XLA gives 2-D convolutions to a library that runs each on one thread; sums and products
    are fast there, and stay.
    """
    if jax.default_backend() != "cpu":
        return {}
    options = {CPU_LIBRARY_OPTION: "LIBRARY_FUSION_TYPE_DOT,LIBRARY_FUSION_TYPE_REDUCE"}
    try:
        number = jax.ShapeDtypeStruct((), jnp.float32)
        jax.jit(lambda x: x, compiler_options=options).lower(number).compile()
    except jax.errors.JaxRuntimeError:  # another version
        return {}
    return options


# ----------------------------------------------------------------------------------- processes


def use_compilation_cache() -> None:
    """Keep compiled programs between calls, unless the environment names another place."""
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        version = importlib.metadata.version("jaxlib")
        cache = Path.home() / ".cache" / "panther_jax" / "xla" / version
        jax.config.update("jax_compilation_cache_dir", str(cache))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
