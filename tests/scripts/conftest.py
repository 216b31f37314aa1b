import os
import sys
from pathlib import Path

import pytest

from apr_jax.tasks.countdown_vocabulary import vocabulary
from apr_jax.testing import tiny_config, tiny_decoder
from apr_jax.train.export import export_countdown

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))


@pytest.fixture(scope="session", autouse=True)
def _own_compile_cache(tmp_path_factory):
    """Scripts that tests run keep their compiled programs out of the user's cache."""
    earlier = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))
    yield
    if earlier is None:
        del os.environ["XDG_CACHE_HOME"]
    else:
        os.environ["XDG_CACHE_HOME"] = earlier


@pytest.fixture(scope="session")
def countdown(tmp_path_factory):
    """Random weights with the embedded model's name, vocabulary and task."""
    directory = tmp_path_factory.mktemp("models") / "countdown"
    config = tiny_config(vocab_size=len(vocabulary()), bos_id=1, eos_ids=(2,), tie_embeddings=True)
    export_countdown(directory, tiny_decoder(config))
    return directory
